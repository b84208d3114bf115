"""The KL penalty against the reference policy: estimators, their gradients, their clamps, in plain torch.

The Triton twins are in `kernels/fastrl_kernels/kl_fns.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.clamping import clamp_log_ratio, hold
from fastrl.options import option
from fastrl.spec import KLEstimator, KLGradient, LossSpec


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


def kl_penalty(x: Tensor, ratio: Tensor, spec: LossSpec) -> Tensor:
    """KL estimate per token from x = logp − ref_logp (Schulman, "Approximating KL divergence", 2020).

    k3 takes an exp, so its x is held to ±`log_ratio_clamp`; the others are exact everywhere. `kl_clamp` holds the
    estimate itself. kl_gradient: plain differentiates that; importance_weighted multiplies it by `ratio`, not detached,
    whose gradient is that of the exact KL on old samples (TRL `use_bias_correction_kl`); straight_through keeps the
    value and takes the gradient of k2, x (verl's "k3+").
    """
    held = clamp_log_ratio(x, spec) if spec.kl_estimator == KLEstimator.K3 else x
    value = hold(KL_ESTIMATORS[KLEstimator(spec.kl_estimator)](held), spec.kl_clamp)
    if spec.kl_gradient == KLGradient.IMPORTANCE_WEIGHTED:
        return ratio * value
    if spec.kl_gradient == KLGradient.STRAIGHT_THROUGH:
        surrogate = k2(x)
        return value.detach() + (surrogate - surrogate.detach())
    return value


@functools.cache
def kl_objective(
    estimator: str = KLEstimator.K3, clamp: float | None = None, *, weighted: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """The KL as a loss of its own: `LossSpec(objective=kl_objective(...))` with the reference as `old_logps`.

    ℓ = hold(w·k(x), ±clamp) with x = logp − ref, held to ±`log_ratio_clamp`, and w = exp(x − sg x), which is 1: the
    estimator's value, and on policy the gradient of the exact KL, that of the sampling probability included (k3: x,
    Tang & Munos 2025, arXiv:2506.09477). Zero gradient where a bound bites, that of w too (NeMo-RL).

    weighted: w = π/π_behaviour instead, for samples of another policy; pass ref − behaviour log-probs as `advantages`,
    which are not read otherwise.

    Raises:
        ValueError: an unknown estimator.
    """
    estimate = KL_ESTIMATORS[option(KLEstimator, estimator, "estimator")]

    def objective(x: Tensor, advantages: Tensor) -> Tensor:
        weight = (x + advantages if weighted else x - x.detach()).exp()
        return hold(weight * estimate(x), clamp)

    return objective
