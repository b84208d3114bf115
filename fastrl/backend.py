"""Which backend a tensor takes, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks

logger = logging.getLogger("fastrl")

BACKENDS = ("auto", "triton", "torch")
_ACCELERATORS = ("cuda",)  # NVIDIA and AMD; the launchers handle no other device


class Choice(NamedTuple):
    name: str
    why: str


_TRITON_FOUND = importlib.util.find_spec("triton") is not None  # once: torch.compile traces what looks it up


def has_triton() -> bool:
    return _TRITON_FOUND


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(device: torch.device, dtype: torch.dtype, backend: str = "auto", *, warn: bool = True) -> Choice:
    """The backend for tensors of this device and dtype; "auto" explains itself, "triton" never falls back.

    Where "auto" takes plain torch on an accelerator, the logger `fastrl` says so, once per reason, unless `warn` is
    False.

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run.
    """
    if backend not in BACKENDS:
        _checks.refuse("backend", f"one of {', '.join(map(repr, BACKENDS))}", repr(backend))
    if backend == "torch":
        return Choice("torch", "asked for")
    obstacle = _obstacle(device, dtype)
    if backend == "triton":
        if obstacle:
            _checks.refuse("backend", "inputs that Triton can take", f"'triton' with {obstacle}", 'use backend="auto"')
        return Choice("triton", "asked for")
    if device.type not in _ACCELERATORS:
        return Choice("torch", f"tensors are on {device.type}, not on an accelerator")
    if obstacle:
        if warn:
            _warn_fallback(obstacle)
        return Choice("torch", obstacle)
    return Choice("triton", f"tensors are on {device.type}")


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    if not has_triton():
        return "triton not installed"
    if dtype == torch.float64:
        return "float64, which the kernels do not compute in"
    if device.type not in _ACCELERATORS and not interpreting():
        return f"tensors on {device.type} and TRITON_INTERPRET not set to 1"
    return ""


@functools.cache
def _warn_fallback(reason: str) -> None:
    logger.warning("backend 'auto' takes plain torch on an accelerator: %s", reason)


def load(name: str) -> Any:
    """The backend's module; Triton is imported on first use."""
    return importlib.import_module(f"fastrl.{name}_backend")


def load_sparse(name: str) -> Any:
    """The part of a backend that holds the sparse gradient."""
    return importlib.import_module(f"fastrl.{name}_sparse")


def of(tensor: Tensor, backend: str) -> str:
    """Name of the backend that `tensor` takes."""
    return choose(tensor.device, tensor.dtype, backend).name
