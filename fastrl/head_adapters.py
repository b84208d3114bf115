"""Heads under PEFT: the plain layer below the wrappers, and the LoRA adapters on it."""

from __future__ import annotations

from typing import Any, NoReturn

from fastrl import _checks
from fastrl.head_weights import LowRank

_REMEDY = "merge the adapter, leave the head out of it, or start from the model's own logits"


def base_model(model: Any) -> Any:
    """The Hugging Face model below a PEFT wrapper.

    Raises:
        ValueError: an adapter that changes what the base model is given (prompt, prefix and p-tuning).
    """
    if not hasattr(model, "get_base_model"):
        return model
    configs = getattr(model, "peft_config", {})
    for name in getattr(model, "active_adapters", configs):
        if getattr(configs.get(name), "is_prompt_learning", False):
            came = f"{configs[name].peft_type}, whose virtual tokens the base model does not see"
            _checks.refuse("model", "adapters on the layers of a model", came, "start from the model's own logits")
    return model.get_base_model()


def plain_layer(layer: Any) -> tuple[Any, tuple[LowRank, ...]]:
    """The output layer without its wrappers, and what LoRA adds to its weight.

    A wrapper is read as its forward would run now: a merged or disabled adapter adds nothing, several active ones add
    up, and `modules_to_save` stands for the copy that is active.

    Raises:
        ValueError: an adapter that is not a plain low-rank update of the weight, by name.
    """
    kind = type(layer).__name__
    if kind == "ModulesToSaveWrapper":
        return _checked_plain(_saved_module(layer)), ()
    if kind == "Linear" and hasattr(layer, "base_layer") and hasattr(layer, "lora_A"):
        return _checked_plain(layer.base_layer), _active_adapters(layer)
    return _checked_plain(layer), ()


def _checked_plain(layer: Any) -> Any:
    """The layer, refused if it is an adapter's wrapper (one inside another, or of a kind that is not known)."""
    if hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
        _refuse(f"{type(layer).__module__}.{type(layer).__name__}, an adapter on it")
    return layer


def _saved_module(layer: Any) -> Any:
    active = list(layer.active_adapters)
    if layer.disable_adapters or not active:
        return layer.original_module
    if len(active) > 1 or active[0] not in layer.modules_to_save:
        _refuse(f"modules_to_save with the active adapters {active}")
    return layer.modules_to_save[active[0]]


def _active_adapters(layer: Any) -> tuple[LowRank, ...]:
    if layer.merged:
        if layer.disable_adapters:  # PEFT would take it out of the weight at the next forward
            _refuse("a LoRA adapter that is merged and disabled at once")
        return ()
    if layer.disable_adapters:
        return ()
    return tuple(_low_rank(layer, name) for name in layer.active_adapters if name in layer.lora_A)


def _low_rank(layer: Any, name: str) -> LowRank:
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or layer.use_dora.get(name, False):
        _refuse(f"LoRA adapter {name!r} of the kind {type(variant).__name__ if variant else 'DoRA'}")
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None:
        _refuse(f"LoRA adapter {name!r} with a bias")
    return LowRank(a.weight, b.weight, float(layer.scaling[name]), layer.lora_dropout[name])


def _refuse(came: str) -> NoReturn:
    _checks.refuse("model", "an output layer, plain or with LoRA adapters", came, _REMEDY)
