"""The objectives on flat [n] tensors, in plain torch: the specification, one entry of `OBJECTIVES` each.

A function gives one loss per token, unmasked and unreduced; autograd differentiates it. Its Triton twin is in
`kernels/fastrl_kernels/objective_fns.py`, value and derivative together; a test walks this registry and compares. To
add an objective: a function with `@define` here (and its numbers in `OwnNumbers`), its twin there, a preset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.registry import (
    OBJECTIVES,
    SEQUENCE,
    SEQUENCE_SUM,
    TOKEN,
    Flags,
    Terms,
    bounds,
    clip,
    define,
)


@dataclass(frozen=True, kw_only=True)
class OwnNumbers:
    """Fields of `LossSpec` that one objective reads, named after it; each must be positive, but for the bounds of a
    covariance."""

    sapo_temperature_positive: float = 1.0
    """τ for A > 0."""
    sapo_temperature_negative: float = 1.05
    """τ for A ≤ 0."""
    vespo_k_positive: float = 2.0
    """k for A ≥ 0."""
    vespo_lambda_positive: float = 3.0
    """λ for A ≥ 0."""
    vespo_k_negative: float = 3.0
    """k for A < 0."""
    vespo_lambda_negative: float = 2.0
    """λ for A < 0."""
    dppo_ratio_cap: float = 20.0
    """The detached ratio is at most this."""
    topr_ratio_cap: float = 1.0
    """For A ≤ 0 the detached ratio is at most this."""
    dro_beta: float = 0.1
    """Weight of the squared log-ratio."""
    clip_cov_fraction: float = 2e-4
    """The fraction of valid tokens (at least one) that lose their gradient."""
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    """Tokens are drawn from those with clip_cov_low < covariance < clip_cov_high."""
    kl_cov_fraction: float = 2e-4
    """The fraction of valid tokens (at least one), those with the highest covariance, that are penalised."""
    kl_cov_coef: float = 1.0
    """Weight of |log r| at those tokens."""


def _never(values: Tensor) -> Tensor:
    return torch.zeros_like(values, dtype=torch.bool)


def _ratio_flags(t: Terms, spec: Any) -> Flags:
    """r < 1 − ε₋ with A < 0, r > 1 + ε₊ with A > 0."""
    (low, high), ratio = bounds(spec), t.log_ratio.exp()
    return Flags(
        _never(ratio) if low is None else (ratio < low) & (t.advantages < 0),
        _never(ratio) if high is None else (ratio > high) & (t.advantages > 0),
    )


def _ppo_flags(t: Terms, spec: Any) -> Flags:
    flags = _ratio_flags(t, spec)
    return flags if spec.dual_clip is None else flags._replace(dual=_dual_clipped(_clipped_surrogate(t, spec), t, spec))


def _clipped_surrogate(t: Terms, spec: Any) -> Tensor:
    def surrogate(ratio: Tensor) -> Tensor:
        unclipped = clip(ratio, None, spec.delta)
        return -torch.minimum(unclipped * t.advantages, clip(ratio, *bounds(spec)) * t.advantages)

    if spec.log_ratio_clamp is not None:
        return surrogate(t.log_ratio.exp())
    # An unbounded ratio may be infinite where the clipped term is chosen: its zero gradient must not meet the infinity.
    value = surrogate(t.log_ratio.detach().exp())
    settled = t.log_ratio.detach().exp().isinf() & value.isfinite()
    return torch.where(settled, value, surrogate(torch.where(settled, 0.0, t.log_ratio).exp()))


def _dual_clipped(loss: Tensor, t: Terms, spec: Any) -> Tensor:
    return (t.advantages < 0) & (loss > -spec.dual_clip * t.advantages)


_CLIP = ("epsilon_low", "epsilon_high")


@define("ppo_clip", reads=(*_CLIP, "delta", "dual_clip"), flags=_ppo_flags)
def ppo_clip(t: Terms, spec: Any) -> Tensor:
    """ℓ = −min( min(r, δ)·A , clip(r, 1−ε₋, 1+ε₊)·A ); with a dual clip c and A < 0, ℓ = min(ℓ, −c·A).

    A bound that is None is absent. The gradient is −r·A where the unclipped term is chosen (inclusive at the bounds),
    else 0. PPO: arXiv:1707.06347; clip-higher: arXiv:2503.14476; δ: arXiv:2505.07291; dual clip: arXiv:1912.09729.
    """
    loss = _clipped_surrogate(t, spec)
    if spec.dual_clip is None:
        return loss
    return torch.where(_dual_clipped(loss, t, spec), -spec.dual_clip * t.advantages, loss)


@define("cispo", reads=_CLIP, flags=_ratio_flags)
def cispo(t: Terms, spec: Any) -> Tensor:
    """ℓ = −sg(clip(r, 1−ε₋, 1+ε₊))·A·log π: a clipped weight, and a gradient at every token (arXiv:2506.13585)."""
    return -clip(t.log_ratio.exp(), *bounds(spec)).detach() * t.advantages * t.logps


@define("sapo", levels=(TOKEN, SEQUENCE), numbers=("sapo_temperature_positive", "sapo_temperature_negative"))
def sapo(t: Terms, spec: Any) -> Tensor:
    """ℓ = −A·(4/τ)·σ(τ·(r − 1)), τ by the sign of A: a smooth gate instead of a clip (arXiv:2511.20347)."""
    positive, negative = spec.sapo_temperature_positive, spec.sapo_temperature_negative
    tau = torch.where(t.advantages > 0, torch.full_like(t.advantages, positive), negative)
    return -t.advantages * (4 / tau) * torch.sigmoid(tau * (t.log_ratio.exp() - 1))


def _clip_log_ratio(log_ratio: Tensor, advantages: Tensor, spec: Any) -> Tensor:
    """sgn(A)·min( sgn(A)·d, sgn(A)·clip(d, −ε₋, ε₊) ): 0 where A = 0."""
    low, high = bounds(spec)
    pessimistic = torch.where(advantages < 0, clip(log_ratio, low, None), clip(log_ratio, None, high))
    return torch.where((advantages == 0) & ~log_ratio.isnan(), 0.0, pessimistic)


def _log_flags(t: Terms, spec: Any) -> Flags:
    """d < −ε₋ with A < 0, d > ε₊ with A > 0, for the token's own log-ratio d."""
    (low, high), own = bounds(spec), t.logps - t.old_logps
    return Flags(
        _never(own) if low is None else (own < low) & (t.advantages < 0),
        _never(own) if high is None else (own > high) & (t.advantages > 0),
    )


@define("gmpo", levels=(SEQUENCE,), reads=_CLIP, centre=0.0, flags=_log_flags, prepare=_clip_log_ratio)
def gmpo(t: Terms, spec: Any) -> Tensor:
    """ℓ = −A·exp( mean over the sequence of sgn(A)·min(sgn(A)·d, sgn(A)·clip(d, −ε₋, ε₊)) ), d = log r of a token.

    The geometric mean of ratios clipped one by one, with bounds in log space (arXiv:2507.20673).
    """
    return -t.advantages * t.log_ratio.exp()


_VESPO = ("vespo_k_positive", "vespo_lambda_positive", "vespo_k_negative", "vespo_lambda_negative")
_LOG_1E_8 = math.log(1e-8)


@define("vespo", levels=(TOKEN, SEQUENCE), numbers=_VESPO, weighs_sequences=True)
def vespo(t: Terms, spec: Any) -> Tensor:
    """ℓ = −sg(φ(w))·A·log π, φ(w) = e^λ·w^k·e^(−λw), log w = Σₜ log r + Σₜ log(rollout weight) held to [log 1e-8, 20].

    k and λ by the sign of A; φ(1) = 1 (arXiv:2602.10693). Rollout weights are part of w, a weight of the sequence
    once and one of 0 as 1e-8, and not a factor of the loss; only `reject` and the off-policy mask drop tokens.
    """
    return -vespo_weight(t, spec) * t.advantages * t.logps


def vespo_weight(t: Terms, spec: Any) -> Tensor:
    """φ(w) of vespo, detached, (n,)."""
    log_w = t.sequence_log_weight.detach().clamp(_LOG_1E_8, 20.0)
    positive = t.advantages >= 0
    k = torch.where(positive, torch.full_like(log_w, spec.vespo_k_positive), spec.vespo_k_negative)
    lam = torch.where(positive, torch.full_like(log_w, spec.vespo_lambda_positive), spec.vespo_lambda_negative)
    return torch.exp(lam + k * log_w - lam * log_w.exp())


def _dppo_loss(t: Terms, spec: Any, flags: Flags) -> Tensor:
    weight = clip(t.log_ratio.exp(), None, spec.dppo_ratio_cap).detach()
    return torch.where(flags.low | flags.high, 0.0, -weight * t.advantages * t.logps)


def _tv_flags(t: Terms, spec: Any) -> Flags:
    low, high = bounds(spec)
    shift = (t.logps.exp() - t.old_logps.exp()).detach()
    rises = t.advantages > 0
    return Flags(
        _never(shift) if low is None else ~rises & (shift < low),
        _never(shift) if high is None else rises & (shift > high),
    )


@define("dppo_tv", levels=(TOKEN,), reads=_CLIP, numbers=("dppo_ratio_cap",), centre=0.0, flags=_tv_flags)
def dppo_tv(t: Terms, spec: Any) -> Tensor:
    """ℓ = −sg(min(r, cap))·A·log π, 0 where π − π_old > ε₊ (A > 0) or < −ε₋ (A ≤ 0): a bound on the total variation of
    the token's own probability instead of its ratio (arXiv:2602.04879)."""
    return _dppo_loss(t, spec, _tv_flags(t, spec))


def binary_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """KL between the two coin flips "this token or another": π_o·log(π_o/π) + (1−π_o)·log((1−π_o)/(1−π)), 1e-8 added
    to both complements."""
    p, q = logps.exp(), old_logps.exp()
    return q * (old_logps - logps) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))


def _kl_flags(t: Terms, spec: Any) -> Flags:
    low, high = bounds(spec)
    logps = t.logps.detach()
    divergence, rises = binary_kl(logps, t.old_logps), t.advantages > 0
    return Flags(
        _never(logps) if low is None else ~rises & (divergence > -low) & (logps < t.old_logps),
        _never(logps) if high is None else rises & (divergence > high) & (logps > t.old_logps),
    )


@define("dppo_kl", levels=(TOKEN,), reads=_CLIP, numbers=("dppo_ratio_cap",), centre=0.0, flags=_kl_flags)
def dppo_kl(t: Terms, spec: Any) -> Tensor:
    """As dppo_tv, with the binary KL of old against new bounded by ε₊ (A > 0) and ε₋ (A ≤ 0), and only where the
    probability has already moved the way that A pushes it (arXiv:2602.04879)."""
    return _dppo_loss(t, spec, _kl_flags(t, spec))


@define("reinforce", levels=(TOKEN,))
def reinforce(t: Terms, spec: Any) -> Tensor:
    """ℓ = −A·log π (Williams 1992). Detached importance weights come from `rollout`; old_logps are only measured."""
    return -t.advantages * t.logps


@define("importance_sampling")
def importance_sampling(t: Terms, spec: Any) -> Tensor:
    """ℓ = −r·A, unclipped, with the gradient −r·A at every token (SkyRL; Tinker, which sums)."""
    return -t.log_ratio.exp() * t.advantages


@define("topr", levels=(TOKEN, SEQUENCE, SEQUENCE_SUM), numbers=("topr_ratio_cap",))
def topr(t: Terms, spec: Any) -> Tensor:
    """ℓ = −A·log π for A > 0, −sg(min(r, cap))·A·log π otherwise: good samples count in full, bad ones taper off as the
    policy leaves them (arXiv:2503.14286)."""
    weight = clip(t.log_ratio.exp(), None, spec.topr_ratio_cap).detach()
    return -torch.where(t.advantages > 0, 1.0, weight) * t.advantages * t.logps


@define("dro", levels=(TOKEN,), numbers=("dro_beta",), vanishes=False)
def dro(t: Terms, spec: Any) -> Tensor:
    """ℓ = −(A·log π − β/2·(log r)²): policy gradient with a squared distance to the old policy (Kimi k1.5,
    arXiv:2501.12599; DRO, arXiv:2405.19107)."""
    return -(t.advantages * t.logps - 0.5 * spec.dro_beta * t.log_ratio.square())


_CLIP_COV = ("clip_cov_fraction", "clip_cov_low", "clip_cov_high")


@define("clip_cov", levels=(TOKEN,), reads=_CLIP, numbers=_CLIP_COV, flags=_ratio_flags, selects=True)
def clip_cov(t: Terms, spec: Any) -> Tensor:
    """The PPO clip without a few tokens, drawn from those whose covariance (A − Ā)·(log π − mean log π) lies between
    two bounds and that the clip leaves alone (arXiv:2505.22617). `seed` fixes the draw."""
    return _clipped_surrogate(t, spec)


_KL_COV = ("kl_cov_coef", "kl_cov_fraction")


@define("kl_cov", levels=(TOKEN,), numbers=_KL_COV, selects=True, reads_selected=True, vanishes=False)
def kl_cov(t: Terms, spec: Any) -> Tensor:
    """ℓ = −r·A, plus coef·|log r| at the fraction of tokens with the highest covariance (arXiv:2505.22617)."""
    penalty = t.selected * spec.kl_cov_coef * t.log_ratio.abs()
    return -t.log_ratio.exp() * t.advantages + penalty


def objective(t: Terms, spec: Any) -> Tensor:
    """Loss per token of the spec's objective, (n,)."""
    if not callable(spec.objective):
        return OBJECTIVES[spec.objective].loss(t, spec)
    loss = spec.objective(t.log_ratio, t.advantages)
    if not isinstance(loss, Tensor) or loss.shape != t.log_ratio.shape:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"objective: the custom function must return one loss per token, a tensor of shape "
            f"{tuple(t.log_ratio.shape)}, got {came}; return the per-token loss without reducing it"
        )
    return loss
