"""Run a function in place of a causal model's forward, through whatever wraps the model.

DistributedDataParallel reduces gradients only for what went through its own forward, and PEFT and mixed-precision
wrappers do their work around it. A loss from hidden states therefore runs inside the wrapped model's call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from fastrl import _checks

_NOTHING = object()


def causal_model(model: Any) -> Any:
    """The causal language model under a PEFT wrapper, or the model itself.

    Raises:
        ValueError: an adapter that changes the inputs (prompt learning), whose hidden states are shifted.
    """
    if not hasattr(model, "get_base_model"):
        return model
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            kind = f"{type(config).__name__} {name!r}, which adds virtual tokens"
            _checks.refuse("model", "an adapter on the weights (LoRA and the like)", kind, "use one of those")
    return model.get_base_model()


def backbone(model: Any) -> Any:
    """The part of a causal model that ends before its head.

    Raises:
        ValueError: the model names none.
    """
    body = getattr(model, "base_model", model)
    if body is model:
        remedy = "compute the loss from its logits"
        _checks.refuse("model", "a Hugging Face causal model with a backbone", type(model).__name__, remedy)
    return body


@contextlib.contextmanager
def forward_replaced(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """`model.forward` is `function` on this instance while the block runs, and what it was afterwards."""
    before = model.__dict__.get("forward", _NOTHING)
    model.forward = function
    try:
        yield
    finally:
        if before is _NOTHING:
            del model.forward
        else:
            model.forward = before
