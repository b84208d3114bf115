"""What stands where TRL calls its model: the same forward, which ends in fastrl instead of TRL's fused head.

TRL builds the inputs of the model (images, router logits, autocast) in `_get_per_token_logps_and_entropies`, calls
`model(**inputs, labels=..., fused_lm_head=True)` and reads log_probs, entropy and aux_loss. `Scorer` is called instead.
The model itself is called through every wrapper (DDP, PEFT, accelerate). At the hidden level the innermost `forward` is
replaced, on this instance and for the length of the call, so that the loss is computed inside the wrappers' forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.functional import logprobs_from_hidden, logprobs_from_logits
from fastrl.head import LMHead

HIDDEN, LOGITS, LOGPROBS = "hidden", "logits", "logprobs"
LEVELS = (HIDDEN, LOGITS, LOGPROBS)


class Scored(NamedTuple):
    """What TRL reads of its model's output, (B, T) each and a scalar, and fastrl's loss; a tuple, as DDP needs."""

    log_probs: Tensor
    entropy: Tensor
    aux_loss: Tensor | None = None
    loss: Tensor | None = None


Finish = Callable[[Tensor, LMHead | None, Tensor, Tensor], Scored]
"""(B, T, H) hidden states and head, or (B, T, V) logits and None; (B, T) ids and mask -> what is made of them."""


def base_model(model: Any, accelerator: Any) -> Any:
    """The causal language model inside the wrappers."""
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass
class Scorer:
    """A callable in the place of TRL's model; `scored` is the result of its last call."""

    model: Any
    """As TRL would call it, wrappers included."""
    base: Any
    """Its `base_model`."""
    level: str
    keep: int
    """T, the completion's tokens."""
    finish: Finish
    float32_head: bool = False
    """TRL's cast_lm_head_to_fp32."""
    scored: Scored | None = None

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Scored:
        ids, mask = inputs["input_ids"][:, -self.keep :], labels[:, -self.keep :] != -100

        def end(rows: Tensor, head: LMHead | None) -> Scored:
            return self.finish(rows, head, ids, mask)

        if self.level == HIDDEN:
            with _forward_of(self.base, functools.partial(self._forward, end)):
                self.scored = self.model(**inputs)
        else:
            only = {"logits_to_keep": self.keep + 1} if _takes(self.base, "logits_to_keep") else {}
            outputs = self.model(**inputs, use_cache=False, **only)
            logits = completion_rows("logits", outputs.logits, self.keep, self.keep + 1, inputs["input_ids"].shape[1])
            aux_loss = outputs.aux_loss if inputs.get("output_router_logits") else None
            self.scored = end(logits, None)._replace(aux_loss=aux_loss)
        return self.scored

    def _forward(self, end: Callable[[Tensor, LMHead | None], Scored], **inputs: Any) -> Scored:
        """The base model's forward up to its head, and `end` in place of it."""
        inputs.pop("labels", None)  # PEFT passes one on, as None
        outputs = self.base.base_model(**inputs | {"use_cache": False})
        ids = inputs.get("input_ids")
        length = (inputs["inputs_embeds"] if ids is None else ids).shape[1]  # embeddings: with virtual tokens
        hidden = completion_rows("hidden", outputs.last_hidden_state, self.keep, length)
        aux_loss = router_loss(self.base, outputs, inputs) if inputs.get("output_router_logits") else None
        return self._finished(end, hidden)._replace(aux_loss=aux_loss)

    @torch.compiler.disable  # under torch_compile the backbone is one graph; what follows has kernels of its own
    def _finished(self, end: Callable[[Tensor, LMHead | None], Scored], hidden: Tensor) -> Scored:
        head = LMHead.from_model(self.base)
        if not self.float32_head:
            return end(hidden, _as(hidden, head))
        with torch.autocast(hidden.device.type, enabled=False):
            return end(hidden.float(), head)


@contextlib.contextmanager
def _forward_of(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in the place of the instance's own, until the end of the block."""
    absent = object()
    own = vars(module).get("forward", absent)
    module.forward = forward
    try:
        yield
    finally:
        if own is absent:
            del module.forward
        else:
            module.forward = own


def completion_rows(name: str, values: Tensor, keep: int, *lengths: int) -> Tensor:
    """(B, L, ·) -> (B, T, ·): the rows that score the last T = `keep` tokens.

    Raises:
        ValueError: L is none of `lengths`, what the model was asked for, or too short for T tokens and one before.
    """
    if values.shape[1] not in lengths or values.shape[1] <= keep:
        expected = f"length {' or '.join(map(str, lengths))}, above the {keep} tokens of the completion"
        _checks.refuse(name, expected, values, "the model returns other positions than it was given")
    return values[:, -keep - 1 : -1]


def _as(hidden: Tensor, head: LMHead) -> LMHead:
    """The head in the dtype of the states, whole if it is sharded; PEFT keeps a trained copy in float32. Under autocast
    both are cast later."""
    if head.weight.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return head
    weight, bias = head.whole()
    bias = None if bias is None else bias.to(hidden.dtype)
    return dataclasses.replace(head, weight=weight.to(hidden.dtype), bias=bias)


def _takes(model: Any, name: str) -> bool:
    """Whether the model's forward takes an argument of this name, or any."""
    parameters = inspect.signature(type(model).forward).parameters
    return name in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def router_loss(base: Any, outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """The load-balancing loss of a mixture of experts, by transformers' function, as the model's forward has it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = base.config.get_text_config()
    experts = config.num_experts if hasattr(config, "num_experts") else base.num_experts
    return load_balancing_loss_func(
        outputs.router_logits, experts, config.num_experts_per_tok, inputs.get("attention_mask")
    )


def with_logps(temperature: float, rows: Tensor, head: LMHead | None, ids: Tensor, mask: Tensor) -> Scored:
    """Log-probs and entropies alone, by the code that the loss scores with: an on-policy ratio is then exactly 1."""
    if head is None:
        return Scored(*logprobs_from_logits(rows, ids, temperature=temperature, mask=mask))
    return Scored(*logprobs_from_hidden(rows, head, ids, temperature=temperature, mask=mask))
