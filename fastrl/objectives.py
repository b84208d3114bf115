"""The objectives and KL estimators on flat [N] tensors, in plain torch: the specification.

Each function gives one loss per token, unmasked and unreduced; autograd differentiates it. The Triton twin of each is
in `kernels/fastrl_kernels/objective_fns.py`, value and derivative together; a test walks this registry and compares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.spec import KLEstimator, LossSpec, Objective


def clamp_log_ratio(log_ratio: Tensor, spec: LossSpec) -> Tensor:
    """The log-ratio held to ±`spec.log_ratio_clamp` before any exp; zero gradient outside, NaN stays NaN."""
    bound = spec.log_ratio_clamp
    if bound is None:
        return log_ratio
    # Not clamp(): its gradient at NaN is 0, which would hide the NaN.
    return torch.where(log_ratio > bound, bound, torch.where(log_ratio < -bound, -bound, log_ratio))


def ppo_clip(log_ratio: Tensor, advantages: Tensor, spec: LossSpec) -> Tensor:
    """ℓ = −min( min(r, δ)·A , clip(r, 1−ε₋, 1+ε₊)·A ); with a dual clip c and A < 0, ℓ = min(ℓ, −c·A).

    A bound that is None is absent. The gradient is −r·A where the unclipped term is chosen (inclusive at the bounds),
    else 0. PPO: arXiv:1707.06347; clip-higher: arXiv:2503.14476; δ: arXiv:2505.07291; dual clip: arXiv:1912.09729.
    """
    ratio = log_ratio.exp()
    low = None if spec.epsilon_low is None else 1 - spec.epsilon_low
    high = None if spec.epsilon_high is None else 1 + spec.epsilon_high
    clipped = ratio if low is None and high is None else ratio.clamp(low, high)
    unclipped = ratio if spec.delta is None else ratio.clamp(max=spec.delta)
    loss = -torch.minimum(unclipped * advantages, clipped * advantages)
    if spec.dual_clip is not None:
        loss = torch.where(dual_clipped(loss, advantages, spec), -spec.dual_clip * advantages, loss)
    return loss


def dual_clipped(loss: Tensor, advantages: Tensor, spec: LossSpec) -> Tensor:
    """Where the dual clip replaces the loss: A < 0 and ℓ > −c·A."""
    return (advantages < 0) & (loss > -spec.dual_clip * advantages)


OBJECTIVES: dict[Objective, Callable[[Tensor, Tensor, LossSpec], Tensor]] = {
    Objective.PPO_CLIP: ppo_clip,
}


def objective(log_ratio: Tensor, advantages: Tensor, spec: LossSpec) -> Tensor:
    """Loss per token of the spec's objective, (N,) -> (N,); `log_ratio` is already clamped."""
    if not callable(spec.objective):
        return OBJECTIVES[Objective(spec.objective)](log_ratio, advantages, spec)
    loss = spec.objective(log_ratio, advantages)
    if not isinstance(loss, Tensor) or loss.shape != log_ratio.shape:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"objective: the custom function must return one loss per token, a tensor of shape "
            f"{tuple(log_ratio.shape)}, got {came}; return the per-token loss without reducing it"
        )
    return loss


def k1(x: Tensor) -> Tensor:
    """x"""
    return x


def absolute(x: Tensor) -> Tensor:
    """|x|"""
    return x.abs()


def k2(x: Tensor) -> Tensor:
    """x²/2"""
    return 0.5 * x * x


def k3(x: Tensor) -> Tensor:
    """e⁻ˣ − 1 + x, by expm1 so that it is never negative near 0."""
    return (torch.expm1(-x) + x).clamp_min(0)


KL_ESTIMATORS: dict[KLEstimator, Callable[[Tensor], Tensor]] = {
    KLEstimator.K1: k1,
    KLEstimator.ABS: absolute,
    KLEstimator.K2: k2,
    KLEstimator.K3: k3,
}


def kl_penalty(x: Tensor, spec: LossSpec) -> Tensor:
    """KL estimate per token from x = logp − ref_logp (Schulman, "Approximating KL divergence", 2020).

    k3 takes an exp, so its x is held to ±`log_ratio_clamp`; the others are exact everywhere.
    """
    if spec.kl_estimator == KLEstimator.K3:
        x = clamp_log_ratio(x, spec)
    return KL_ESTIMATORS[KLEstimator(spec.kl_estimator)](x)
