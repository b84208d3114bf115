"""One scored batch for every framework's test, and the comparison: value and gradient, float64, with a check that the
comparison can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS = (7, 4, 0, 6)  # one sequence without a token that counts
DRIFTS = (0.06, -0.01, 0.0, -0.08)  # mean log-ratio of a sequence: beyond, within, beyond a sequence-level clip range


class Scored(NamedTuple):
    """(B, T) float64: ratios well beyond every clip range, advantages of both signs and one 0."""

    logps: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor  # bool, with a hole

    def rows(self, part: slice) -> Scored:
        return Scored(*(x[part] for x in self))


def scored(seed: int = 0, spread: float = 0.5) -> Scored:
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(4, 7, generator=g, dtype=torch.float64)

    old = -noise(1.0).abs() - 1.2
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = False
    advantages = torch.tensor([1.1, -0.8, 0.7, -0.3], dtype=torch.float64)[:, None] + noise(0.3)
    advantages[3, 1] = 0.0
    apart = noise(spread)
    apart = apart - sequence_mean(apart, mask) + torch.tensor(DRIFTS, dtype=torch.float64)[:, None]
    return Scored(old + apart, old, old + noise(0.4), old + noise(0.2), advantages, mask)


def value_and_gradient(loss: Callable[[Tensor], Tensor], logps: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logps.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_same(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    logps: Tensor,
    *,
    value: bool = True,
    rtol: float = 1e-9,
) -> None:
    """Same value and same gradient with respect to the log-probs (or logits)."""
    want, want_gradient = value_and_gradient(theirs, logps)
    got, gradient = value_and_gradient(ours, logps)
    assert want_gradient.abs().max() > 1e-4, "a loss without gradient proves nothing"
    if value:
        torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=rtol, atol=1e-12)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum()


def ppo(logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    """−min(r·A, clip(r)·A), at least −dual·A for A < 0."""
    ratio = (logps - old).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return loss if dual is None else torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


def cispo(logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """−sg(clip(r))·A·log π."""
    return -(logps - old).exp().clamp(1 - low, 1 + high).detach() * advantages * logps


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) mean over the tokens that count."""
    return (torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
