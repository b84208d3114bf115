"""The language-model head that turns hidden states into logits, as data."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import _checks

# Config fields that scale logits, by what they do. A field not listed here that looks like a logit transform is
# refused in `_refuse_unknown_transforms`.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = softcap(logit_scale · (hidden @ weightᵀ + bias)), softcap(z) = softcap·tanh(z / softcap).

    The temperature of the call comes last. Scale, softcap and temperature are computed in fp32 after the matmul.

    Args:
        weight: (V, H), dtype of the hidden states; gets a gradient if it requires one.
        bias: (V,) or None.
        logit_scale: a positive number.
        softcap: a positive number, or None for no softcap.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _check_plain("weight", self.weight)
        _checks.floating("weight", self.weight)
        if self.weight.ndim != 2 or self.weight.shape[0] == 0:
            _checks.refuse("weight", "shape (V, H) with V > 0", self.weight, "a linear layer's .weight has this shape")
        if self.bias is not None:
            _check_plain("bias", self.bias)
            _checks.shape("bias", self.bias, (self.weight.shape[0],), "(V,) as weight")
            _checks.same_device("bias", self.bias, self.weight.device, "weight")
            if self.bias.dtype != self.weight.dtype:
                _checks.refuse("bias", f"dtype {self.weight.dtype} as weight", self.bias, "cast it", TypeError)
        _checks.number("logit_scale", self.logit_scale)
        if self.softcap is not None:
            _checks.number("softcap", self.softcap)

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """The head of a Hugging Face causal language model, with the logit transform that its config asks for.

        The head is read now: call it again after the parameters were replaced (an in-place optimiser step is fine).

        Raises:
            ValueError: the head is missing, wrapped by an adapter, quantised or sharded, or the model changes its
                logits in a way that this class does not know.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if layer is None or not hasattr(layer, "weight"):
            _checks.refuse("model", "a model with an output embedding", type(model).__name__, "build LMHead(weight) by hand")
        if hasattr(layer, "base_layer"):
            remedy = "merge the adapter or leave the head out of target_modules"
            _checks.refuse("model", "a plain output layer", f"an adapter on it ({type(layer).__name__})", remedy)
        config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
        _refuse_unknown_transforms(base, config)
        bias = getattr(layer, "bias", None)
        return cls(layer.weight, bias, logit_scale=_scale(config), softcap=getattr(config, _SOFTCAP, None))


def _scale(config: Any) -> float:
    """The factor on the logits, 1.0 when the config names none."""
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= 1.0 if getattr(config, name, None) is None else float(getattr(config, name))
    for name in _DIVISORS:
        value = getattr(config, name, None)
        if value is not None:
            multiplies = config.model_type in _MULTIPLIES_BY_LOGITS_SCALING
            scale *= float(value) if multiplies else 1.0 / float(value)
    return scale


def _check_plain(name: str, value: Any) -> None:
    """Refuse parameters whose storage is not the whole plain matrix."""
    _checks.tensor(name, value)
    kind = type(value).__name__
    if kind == "DTensor":
        _checks.refuse(name, "a plain tensor", "a sharded DTensor", f"gather it first: {name}.full_tensor()")
    if hasattr(value, "ds_id") or value.device.type == "meta":
        remedy = "enter deepspeed.zero.GatheredParameters([...]) or materialise it first"
        _checks.refuse(name, "a materialised tensor", "a partitioned or meta parameter", remedy)
    if kind in ("Params4bit", "Int8Params") or hasattr(value, "quant_state"):
        _checks.refuse(name, "an unquantised tensor", f"a quantised {kind}", "keep the head out of quantisation")


# What a causal model may do to `logits` between the head and its return, as unparsed source with `self.config.` and
# `config.` removed. Anything else is refused: a forgotten transform trains silently wrong.
_KNOWN_STATEMENTS = {
    "logits / final_logit_softcapping",
    "torch.tanh(logits)",
    "logits * final_logit_softcapping",
    "logits / logits_scaling",
    "logits * logits_scaling",
    "logits * logit_scale",
    "logits * self.logit_scale",
    "logits * lm_head_multiplier",
    "logits * output_multiplier",
    "logits.float()",
    "outputs.logits",
}


def _refuse_unknown_transforms(model: Any, config: Any) -> None:
    """Read the model's forward and refuse an assignment to `logits` that is not a known transform."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    except (OSError, TypeError, SyntaxError):
        _checks.refuse("model", "a forward whose source can be read", type(model).__name__, "build LMHead(...) by hand")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) != "logits":
            continue
        text = ast.unparse(node.value).replace("self.config.get_text_config().", "").replace("self.config.", "")
        text = text.replace("self.model.config.", "").replace("text_config.", "").replace("config.", "")
        if text in _KNOWN_STATEMENTS or _is_plain_head(text):
            continue
        _checks.refuse(
            "model",
            "a model whose logits are its head times known factors",
            f"{type(model).__name__}, which computes `logits = {ast.unparse(node.value)}`",
            "build LMHead(weight, bias, logit_scale, softcap) by hand if that is equivalent, or start from its logits",
        )


def _is_plain_head(text: str) -> bool:
    """Whether the statement only applies the output layer to (a slice of) the hidden states, possibly cast to fp32."""
    text = text.removesuffix(".float()").removesuffix(".contiguous()")
    names = ("lm_head", "embed_out", "output", "head")
    inner = ("hidden_states", "outputs.last_hidden_state", "outputs[0]", "last_hidden_state", "hidden_states[0]")
    heads = tuple(f"self.{name}({hidden}" for name in names for hidden in inner)
    if not text.startswith(heads) or not text.endswith(")"):
        return False
    rest = text[len(max((h for h in heads if text.startswith(h)), key=len)) : -1]
    return rest in ("", ".contiguous()") or (rest.startswith("[:, ") and rest.endswith("]") and "(" not in rest.replace("slice_indices", ""))
