"""The one recursion behind `gae` and `discounted_returns`, on both backends, and its operator for torch.compile."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import backend as backends
from fastrl.operators import fake, operator
from fastrl.scan import reverse_scan

_ELEMENTS = 2**19  # taken at once on the torch backend, so that the temporaries stay in the cache


class Steps(NamedTuple):
    """The checked inputs, in one dtype and without gradient."""

    rewards: Tensor  # (B, T)
    values: Tensor | None  # (B, T); None = 0
    keep: Tensor | None  # (B, T) bool
    bootstrap: Tensor | None  # (B,); None = 0

    def part(self, rows: slice) -> Steps:
        return Steps(*(None if x is None else x[rows] for x in self))


class Decay(NamedTuple):
    gamma: float
    lam: float | Tensor  # a tensor is (B,)
    lam_returns: float | Tensor | None  # None = as lam
    carry_masked: bool


def estimate(steps: Steps, decay: Decay, backend: str) -> tuple[Tensor, Tensor]:
    """(advantages, returns); without values both are the returns."""
    name = backends.of(steps.rewards, backend)
    gamma, lam, lam_returns, carry_masked = decay
    advantages, returns = _lambda_returns(
        *steps, gamma, *_number_and_rows(lam), *_number_and_rows(lam_returns), carry_masked, name
    )
    return returns if steps.values is None else advantages, returns


def _number_and_rows(lam: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """An operator's argument is a number or a tensor, not either."""
    return (None, lam) if isinstance(lam, Tensor) else (lam, None)


@operator("lambda_returns")
def _lambda_returns(
    rewards: Tensor,
    values: Tensor | None,
    keep: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float | None,
    lam_rows: Tensor | None,
    lam_returns: float | None,
    lam_returns_rows: Tensor | None,
    carry_masked: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns); without values the first has no elements. λ is a number or (B,), λ of the returns may be
    neither."""
    steps = Steps(rewards, values, keep, bootstrap)
    decay = Decay(
        gamma,
        lam if lam_rows is None else lam_rows,
        lam_returns if lam_returns_rows is None else lam_returns_rows,
        carry_masked,
    )
    if backend == "torch":
        advantages, returns = _by_torch(steps, decay)
    else:
        import fastrl_kernels as kernels

        dense = Steps(*(None if x is None else x.contiguous() for x in steps))
        advantages, returns = kernels.lambda_returns(*dense, **decay._asdict())
    return returns.new_empty(0) if values is None else advantages, returns


@fake("lambda_returns")
def _(rewards: Tensor, values: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    returns = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    return returns.new_empty(0) if values is None else torch.empty_like(returns), returns


def _by_torch(steps: Steps, decay: Decay) -> tuple[Tensor, Tensor]:
    """A few rows at a time, so that their temporaries stay in the cache."""
    returns = torch.empty_like(steps.rewards, memory_format=torch.contiguous_format)
    advantages = returns if steps.values is None else torch.empty_like(returns)
    rows, width = returns.shape
    count = max(1, _ELEMENTS // max(width, 1))
    lam, lam_returns = (_per_row(x, returns) for x in (decay.lam, decay.lam_returns))
    for start in range(0, rows, count):
        some = slice(start, start + count)
        part, out = steps.part(some), returns[some]
        bits = None if part.keep is None else part.keep.to(_BITS[returns.dtype]).neg_()
        torch.add(part.rewards, _state(part, decay, lam[some], bits), out=out)
        if part.values is not None:
            _zero_masked_(torch.sub(out, part.values, out=advantages[some]), bits)
        if lam_returns is not None:
            torch.add(part.rewards, _state(part, decay, lam_returns[some], bits), out=out)
        _zero_masked_(out, bits)
    return advantages, returns


def _state(steps: Steps, decay: Decay, lam: Tensor, bits: Tensor | None) -> Tensor:
    """(B, T): cₜ₊₁ = γ·(Vₜ₊₁ + λ·Aₜ₊₁), so that Rₜ = rₜ + cₜ₊₁ and Aₜ = Rₜ − Vₜ.

    It follows one affine recursion, cₜ = γλ·cₜ₊₁ + γλ·rₜ + γ(1 − λ)·Vₜ, where two would be needed for Aₜ and for the
    value behind the masked steps.
    """
    rewards, values, _, bootstrap = steps
    factor = decay.gamma * lam
    term = rewards * factor[:, None]
    if values is not None:
        term.addcmul_(values, (decay.gamma - factor)[:, None])
    last = torch.zeros_like(lam) if bootstrap is None else decay.gamma * bootstrap
    return reverse_scan(factor, _zero_masked_(term, bits), last, bits if decay.carry_masked else None)


def _per_row(lam: float | Tensor | None, like: Tensor) -> Tensor | None:
    """(B,) from a number or a tensor."""
    if lam is None:
        return None
    return lam.to(like.dtype) if isinstance(lam, Tensor) else like.new_full(like.shape[:1], lam)


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _zero_masked_(x: Tensor, bits: Tensor | None) -> Tensor:
    """x with 0 where `bits` is 0, whatever stood there; elsewhere `bits` is all ones. On a CPU several times faster
    than where or masked_fill, which torch does not vectorise."""
    if bits is not None:
        x.view(bits.dtype).bitwise_and_(bits)
    return x
