"""What a Hugging Face model does between its hidden states and its logits: read from its config and its source."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from typing import Any

from fastrl import _checks

# Config fields that scale the logits (or, the same thing, the hidden states before a head without bias).
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)


def unwrapped(model: Any) -> Any:
    """The model below torch.compile, DistributedDataParallel or a DeepSpeed engine."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine"):
            model = model.module
        else:
            return model


def logit_transform(model: Any) -> tuple[float, float | None]:
    """(scale, softcap) of a causal language model's logits.

    Raises:
        ValueError: its forward does something to them that is not known.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    _refuse_unknown_transforms(model.__class__)
    return _scale(config), getattr(config, _SOFTCAP, None)


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
