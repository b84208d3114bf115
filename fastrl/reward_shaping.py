"""The KL to the reference policy as part of the reward or of the advantage, instead of the loss. Data: no gradient.

Elementwise work of [B, T] in torch operations, on any device, without a host synchronisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.dtypes import wide
from fastrl.kl import KL_ESTIMATORS
from fastrl.returns import discounted_returns
from fastrl.spec import KLEstimator, option

_EXPONENT_BOUND = 20.0  # of k3, as LossSpec.log_ratio_clamp


class ShapedRewards(NamedTuple):
    """`rewards`: (B, T), 0 under the mask. `kl`: 0-d, the mean over sequences of their mean KL per token."""

    rewards: Tensor
    kl: Tensor


def kl_shaped_rewards(
    rewards: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    *,
    mask: Tensor | None = None,
    kl_coef: float | Tensor,
    kl_estimator: str = "k1",
    kl_clamp: float | None = None,
) -> ShapedRewards:
    """Token rewards r̃ₜ = rₜ − kl_coef·KLₜ, with a reward per sequence standing on its last valid token.

    KLₜ is the estimator of x = logpₜ − refₜ: "k1" x, "abs" |x|, "k2" x²/2, "k3" e⁻ˣ − 1 + x (x held to ±20), then held
    to ±kl_clamp.

    Args:
        rewards: (B,) one per sequence, dropped if it has no valid token, or (B, T) one per token.
        logps: (B, T) of the policy that sampled (old_logps; verl and OpenRLHF take the same).
        ref_logps: (B, T).
        mask: (B, T) bool or 0/1, any pattern; None = all. Nothing is read where it is 0.
        kl_coef: a number of at least 0 or a 0-d tensor, e.g. `controller.value`.
        kl_clamp: 10 in OpenRLHF and AReaL, and in verl for k3; None = unbounded (TRL).

    Returns:
        ShapedRewards(rewards, kl): float32 (float64 if any input is). `kl` is what `AdaptiveKLController.update` takes,
        verl's mean over sequences; those without a valid token do not count.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, name or number.

    Source: arXiv:1909.08593; "Approximating KL divergence" (Schulman, 2020).
    """
    keep, kl = _kl(logps, ref_logps, mask, kl_estimator, kl_clamp)
    coef = _coefficient(kl_coef)
    score = _per_token("rewards", rewards, keep, [(keep.shape[0],), tuple(keep.shape)]).to(
        wide(rewards.dtype, kl.dtype)
    )
    if rewards.ndim == 1:
        later = keep.flip(1).cumsum(1).flip(1)  # valid tokens from here on
        score = torch.where(keep & (later == 1), score, 0)
    lengths = keep.sum(1)
    mean = (kl.sum(1) / lengths.clamp_min(1)).sum() / (lengths > 0).sum().clamp_min(1)
    return ShapedRewards(torch.where(keep, score - coef * kl, 0), mean)


def kl_shaped_advantages(
    advantages: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    *,
    mask: Tensor | None = None,
    kl_coef: float | Tensor,
    gamma: float = 0.0,
) -> Tensor:
    """Advantages with a KL term of mean zero: Ãₜ = Aₜ + kl_coef·Σ_{s≥t} γ^{s−t}·(mean x − xₛ), x = logp − ref.

    The mean is over the valid tokens of the batch, so the term rewards tokens closer to the reference than average and
    leaves the average advantage where it was (with γ = 0).

    Args:
        advantages: (B,), (B, 1) or (B, T).
        logps, ref_logps, mask, kl_coef: as for `kl_shaped_rewards`.
        gamma: discount of the KL of later tokens, within [0, 1]; 0 = each token answers for itself.

    Returns:
        (B, T) float32 (float64 if any input is), 0 under the mask.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or number.

    Source: the Tinker cookbook's KL penalty.
    """
    keep, x = _kl(logps, ref_logps, mask, KLEstimator.K1, None)
    coef = _coefficient(kl_coef)
    _checks.fraction("gamma", gamma)
    term = torch.where(keep, x.sum() / keep.sum().clamp_min(1) - x, 0)
    if gamma:
        term = discounted_returns(term, gamma=gamma, mask=keep)
    B, T = keep.shape
    given = _per_token("advantages", advantages, keep, [(B,), (B, 1), (B, T)]).to(wide(advantages.dtype, x.dtype))
    return torch.where(keep, given + coef * term, 0)


def _kl(
    logps: Tensor, ref_logps: Tensor, mask: Tensor | None, estimator: str, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """The (B, T) valid tokens, and their KL estimates, 0 elsewhere."""
    _checks.floating("logps", logps)
    if logps.ndim != 2:
        _checks.refuse("logps", "shape (B, T)", logps)
    _checks.floating("ref_logps", ref_logps)
    _checks.shape("ref_logps", ref_logps, tuple(logps.shape), "the shape of logps")
    _checks.same_device("ref_logps", ref_logps, logps.device, "logps")
    name = option(KLEstimator, estimator, "kl_estimator")
    keep = _checks.keep(mask, logps, "logps")
    if keep is None:
        keep = torch.ones_like(logps, dtype=torch.bool)
    dtype = wide(logps.dtype, ref_logps.dtype)
    x = torch.where(keep, logps.detach().to(dtype) - ref_logps.detach().to(dtype), 0)
    if name == KLEstimator.K3:
        x = x.clamp(-_EXPONENT_BOUND, _EXPONENT_BOUND)
    kl = KL_ESTIMATORS[name](x)
    if clamp is not None:
        _checks.number("kl_clamp", clamp)
        kl = kl.clamp(-clamp, clamp)
    return keep, kl


def _per_token(name: str, values: Tensor, keep: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """Values of one of the shapes as (B, T)."""
    _checks.floating(name, values)
    if tuple(values.shape) not in shapes:
        _checks.refuse(name, f"shape {' or '.join(map(str, shapes))} with (B, T) = {tuple(keep.shape)} logps", values)
    _checks.same_device(name, values, keep.device, "logps")
    values = values.detach()
    return (values[:, None] if values.ndim == 1 else values).expand(keep.shape)


def _coefficient(kl_coef: float | Tensor) -> float | Tensor:
    if isinstance(kl_coef, Tensor):
        _checks.shape("kl_coef", kl_coef, (), "a number or a 0-d tensor")
        return kl_coef.detach()
    _checks.number_from_zero("kl_coef", kl_coef)
    return kl_coef
