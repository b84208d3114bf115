"""Checks at the public boundary. Every message says the argument, what was expected, what came, and what to do."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

WIDE_FLOATS = (torch.float32, torch.float64)
FLOATS = (torch.bfloat16, torch.float16, *WIDE_FLOATS)
INTS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def describe(value: Any) -> str:
    """A short description of what came, for the end of a message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def refuse(name: str, expected: str, got: Any, remedy: str = "", error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` in the one form all messages share."""
    came = got if isinstance(got, str) else describe(got)
    raise error(f"{name}: expected {expected}, got {came}{'; ' + remedy if remedy else ''}")


def tensor(name: str, value: Any, remedy: str = "") -> None:
    if not isinstance(value, Tensor):
        refuse(name, "a torch.Tensor", value, remedy, TypeError)


def floating(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    tensor(name, value)
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        refuse(name, f"a floating dtype ({names})", value, f"cast it: {name}.float()", TypeError)


def integer(name: str, value: Tensor) -> None:
    tensor(name, value)
    if value.dtype not in INTS:
        refuse(name, "an integer tensor of token ids", value, f"cast it: {name}.long()", TypeError)


def shape(name: str, value: Tensor, expected: tuple[int, ...], of: str, remedy: str = "") -> None:
    if tuple(value.shape) != tuple(expected):
        refuse(name, f"shape {tuple(expected)}, {of}", value, remedy)


def same_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    if value.device != device:
        refuse(name, f"a tensor on {device}, the device of {of}", value, f"move it: {name}.to('{device}')")


def keep(mask: Tensor | None, like: Tensor, of: str) -> Tensor | None:
    """The mask of `like`, checked, as bool; None = all count."""
    if mask is None:
        return None
    tensor("mask", mask)
    shape("mask", mask, tuple(like.shape), f"the shape of {of}")
    same_device("mask", mask, like.device, of)
    return mask.to(torch.bool)  # as mask != 0, at half the time on a CPU


def number(name: str, value: Any, *, above: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(name, "a number", value, error=TypeError)
    if not value > above or value != value or value == float("inf"):
        refuse(name, f"a finite number above {above:g}", value)


def number_from_zero(name: str, value: Any) -> None:
    if isinstance(value, bool) or value != 0:
        number(name, value)


def fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(name, "a number", value, error=TypeError)
    if not 0 <= value <= 1:
        refuse(name, "a number from 0 to 1", value)


def no_grad_needed(name: str, value: Tensor) -> None:
    if value.requires_grad:
        refuse(name, "a tensor without gradient (it is data here, not a parameter)", value, f"pass {name}.detach()")
