"""The guard against second derivatives, which no kernel has."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def refuse_second_derivative() -> NoReturn:
    raise RuntimeError(
        "fastrl: double backward is not supported; the gradient of a loss cannot be differentiated again. "
        "Use fastrl.reference, which is plain torch, where second derivatives are needed"
    )


class _OnceOnly(torch.autograd.Function):
    """Identity whose backward says that there is no second derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        refuse_second_derivative()


def once(gradient: Tensor | None) -> Tensor | None:
    """The gradient, guarded against being differentiated."""
    if gradient is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    return _OnceOnly.apply(gradient.detach().requires_grad_())
