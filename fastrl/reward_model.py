"""Losses of a reward model: of two answers, and of a ranked list of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks
from fastrl import backend as backends
from fastrl.double_backward import once
from fastrl.dtypes import wide

_PAIRS = 2**20  # pairs held at once on the torch backend


def reward_model_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
) -> Tensor:
    """L = mean(−log σ(c − r − margin)) + center_coef·mean((c + r)²), the Bradley-Terry loss.

    Args:
        chosen, rejected: (B,) rewards of the better and of the worse answer, differentiable.
        margin: how far apart they should be, a number or (B,), data (Llama 2, arXiv:2307.09288).
        center_coef: ≥ 0, pulls the rewards' sums towards 0 (arXiv:2312.09244).

    Returns:
        0-d float32 (float64 for float64 rewards), finite for finite rewards of any size; 0 for B = 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and what to do.
    """
    _checks.floating("chosen", chosen)
    _checks.floating("rejected", rejected)
    if chosen.ndim != 1:
        _checks.refuse("chosen", "shape (B,), one reward per answer", chosen, "e.g. rewards.squeeze(-1)")
    _checks.shape("rejected", rejected, tuple(chosen.shape), "the shape of chosen")
    _checks.same_device("rejected", rejected, chosen.device, "chosen")
    _check_coefficient(center_coef)
    dtype = torch.promote_types(wide(chosen.dtype), wide(rejected.dtype))
    c, r = chosen.to(dtype), rejected.to(dtype)
    gap = c - r
    if isinstance(margin, Tensor):
        _checks.shape("margin", margin, tuple(chosen.shape), "one margin per pair (or pass a number)")
        _checks.same_device("margin", margin, chosen.device, "chosen")
        _checks.no_grad_needed("margin", margin)
        gap = gap - margin.to(dtype)
    elif margin is not None:
        gap = gap - _finite("margin", margin)
    loss = -torch.nn.functional.logsigmoid(gap)
    if center_coef:
        loss = loss + center_coef * (c + r) ** 2
    return loss.sum() / max(loss.shape[0], 1)


def ranked_reward_loss(scores: Tensor, *, mask: Tensor | None = None, backend: str = "auto") -> Tensor:
    """L = −mean over rows of 1/C(K,2)·Σ_{i<j} log σ(sᵢ − sⱼ): every pair of a ranked list. K = 2: `reward_model_loss`.

    The K² pairs are never held at once, and the gradient is computed in the same pass.

    Args:
        scores: (B, K), best answer first, differentiable.
        mask: (B, K) bool or 0/1, which answers there are; a row divides by the pairs of its own k answers, and one with
            fewer than two answers neither adds to the sum nor counts in the mean. Nothing is read where it is 0.
        backend: "auto", "triton" (one launch) or "torch".

    Returns:
        0-d float32 (float64 for float64 scores); 0 where there is no pair. Double backward is not supported.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and what to do.

    Source: InstructGPT, arXiv:2203.02155, equation 1.
    """
    _checks.floating("scores", scores)
    if scores.ndim != 2:
        _checks.refuse("scores", "shape (B, K), the best of K answers first", scores)
    keep = _checks.keep(mask, scores, "scores")
    grad = torch.is_grad_enabled() and scores.requires_grad
    return _RankedReward.apply(scores, _Params(keep, grad, backends.of(scores, backend)))


class _Params(NamedTuple):
    keep: Tensor | None
    grad: bool
    backend: str


class _RankedReward(torch.autograd.Function):
    """scores -> loss; the gradient is computed in forward, when one is wanted."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, params: _Params) -> Tensor:
        if params.backend == "torch":
            loss, rows, gradient = _ranked_reward(scores, params.keep, grad=params.grad)
        else:
            import fastrl_kernels as kernels

            keep = None if params.keep is None else params.keep.contiguous()
            loss, rows, gradient = kernels.ranked_reward(scores.contiguous(), keep, grad=params.grad)
        ctx.save_for_backward(gradient, rows)
        ctx.dtype = scores.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        gradient, rows = ctx.saved_tensors
        return once((gradient * (upstream / rows)).to(ctx.dtype)), None


def _ranked_reward(scores: Tensor, keep: Tensor | None, *, grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, the number of rows it is the mean of, and the derivatives of the rows' losses; some places i at a time."""
    s = scores.to(wide(scores.dtype)).contiguous()  # a GPU adds up in another order along other strides
    valid = torch.ones_like(s, dtype=torch.bool) if keep is None else keep.contiguous()
    s = torch.where(valid, s, 0)
    rows, width = s.shape
    count = valid.sum(1, keepdim=True).to(s.dtype)
    scale = torch.where(count > 1, 1 / (count * (count - 1) / 2).clamp_min(1), 0)  # (B, 1)
    total, gradient = s.new_zeros(()), torch.zeros_like(s) if grad else None
    step = max(1, _PAIRS // max(rows * width, 1))
    for start in range(0, width - 1, step):
        i = slice(start, start + step)
        rest = slice(start, width)  # only places behind an i make a pair with it
        gap = s[:, i, None] - s[:, None, rest]  # (B, i, j)
        pair = (valid[:, i, None] & valid[:, None, rest]).triu(1)
        total = total + (torch.where(pair, -torch.nn.functional.logsigmoid(gap), 0).sum((1, 2)) * scale[:, 0]).sum()
        if gradient is not None:
            slope = torch.where(pair, torch.sigmoid(-gap), 0) * scale[:, None]
            gradient[:, i] -= slope.sum(2)
            gradient[:, rest] += slope.sum(1)
    counted = (count > 1).sum().clamp_min(1).to(s.dtype)
    return total / counted, counted, gradient


def _check_coefficient(value: Any) -> None:
    if _finite("center_coef", value) < 0:
        _checks.refuse("center_coef", "a number ≥ 0", value)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _checks.refuse(name, "a number", value, error=TypeError)
    if not abs(value) < float("inf"):
        _checks.refuse(name, "a finite number", value)
    return float(value)
