"""The language-model head that turns hidden states into logits, as data."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastrl import _checks

# Config fields that scale the logits (or, the same thing, the hidden states before a head without bias).
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
            _checks.refuse(
                "model", "a model with an output embedding", type(model).__name__, "build LMHead(weight) by hand"
            )
        if hasattr(layer, "base_layer"):
            remedy = "merge the adapter or leave the head out of target_modules"
            _checks.refuse("model", "a plain output layer", f"an adapter on it ({type(layer).__name__})", remedy)
        config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
        _refuse_unknown_transforms(base.__class__)
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


# What a causal model may do to its hidden states and logits between the backbone and its return; anything else is
# refused, because a forgotten transform trains silently wrong. `_scale` reads the factors from the config.
_CONFIG = r"(?:self\.(?:model\.)?(?:config\.)?(?:get_text_config\(\)\.)?)?"
_STATE = r"(?:hidden_states|last_hidden_state|\w*outputs?(?:\.last_hidden_state|\[0\]))"
_ROWS = rf"(?:{_STATE}(?:\[:, \w+, :\])?|slice_logits_to_keep\({_STATE}, logits_to_keep\))"
_CAST = r"(?:\.to\((?:dtype=)?self\.\w+\.weight\.dtype\)|\.contiguous\(\))?"
_KNOWN_STATEMENTS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?:hidden_states|last_hidden_state) = {_ROWS}(?: if return_dict else \w+\[0\])?",
        rf"hidden_states = hidden_states / {_CONFIG}logits_scaling",
        rf"(?:lm_)?logits = self\.(?:lm_head|embed_out|output_projection|proj_out|head|output)\({_ROWS}{_CAST}\)"
        rf"(?:\.float\(\)|\.contiguous\(\))*(?: \* {_CONFIG}(?:lm_head_multiplier|logits_scaling))?",
        rf"logits = logits(?:\.float\(\))? / {_CONFIG}(?:final_logit_softcapping|logits_scaling)",
        rf"logits = logits \* {_CONFIG}(?:final_logit_softcapping|logit_scale|output_multiplier)",
        r"logits = torch\.tanh\(logits\)",
        r"logits = logits\.(?:float|contiguous)\(\)",
    )
)
_WATCHED = re.compile(r"(?:lm_)?logits\b|hidden_states\b|last_hidden_state\b")


@functools.cache
def _refuse_unknown_transforms(model_class: Any) -> None:
    """Read the class's forward and refuse a statement on its logits or hidden states that is not known."""
    name = model_class.__name__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(model_class.forward))))
    except (OSError, TypeError, SyntaxError):
        _checks.refuse("model", "a forward whose source can be read", name, "build LMHead(...) by hand")
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AugAssign)]
    found = False
    for node in statements:
        text = ast.unparse(node)
        if not _WATCHED.match(text):
            continue
        if not any(pattern.fullmatch(text) for pattern in _KNOWN_STATEMENTS):
            _checks.refuse(
                "model",
                "a model whose logits are its head times known factors",
                f"{name}, which computes `{text}`",
                "build LMHead(weight, bias, logit_scale, softcap) if that is equivalent, or start from its logits",
            )
        found = found or bool(re.match(r"(?:lm_)?logits = self\.", text))
    if not found:
        _checks.refuse("model", "a forward that applies its head to hidden states", name, "build LMHead(...) by hand")
