"""Rollout correction and the off-policy sequence mask, in plain torch: detached weights of the policy term.

What depends on a token or its sequence is computed with the loss (and inside the Triton token kernel); what depends on
the whole batch is taken from the data once, before the loss, by `correct_batch`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.clamping import hold
from fastrl.flat import Flat, segment_max, segment_sum, segment_total
from fastrl.options import CorrectionLevel, CorrectionMode, Divergence, DivergenceLevel
from fastrl.spec import LossSpec

_CERTAIN = 1e-6  # probabilities are kept this far from 0 and 1 in the binary divergences (OpenRLHF)


class Behaviour(NamedTuple):
    """Old and rollout policy at n tokens of whole sequences."""

    old_logps: Tensor  # (n,)
    rollout_logps: Tensor  # (n,)
    valid: Tensor  # (n,) bool
    sequence: Tensor  # (n,)
    lengths: Tensor  # (S,)

    @property
    def log_rho(self) -> Tensor:
        """(n,) log(π_old/π_rollout); 0 under the mask and where the sampler reported NaN."""
        scored = self.valid & ~self.rollout_logps.isnan()
        return torch.where(scored, self.old_logps - self.rollout_logps, 0.0)

    def total(self, values: Tensor) -> Tensor:
        return segment_total(values, self.sequence, self.lengths.shape[0])

    def mean(self, values: Tensor) -> Tensor:
        return self.total(values) / self.lengths.double().clamp_min(1)[self.sequence]


def importance_weights(b: Behaviour, spec: LossSpec) -> Tensor:
    """(n,) weights of `spec.rollout`, before rejections: exp of log ρ at its level, truncated or masked."""
    how = spec.rollout
    log_rho = b.log_rho
    if how.level is None:
        return torch.ones_like(log_rho)
    if how.level == CorrectionLevel.SEQUENCE:
        log_rho = b.total(log_rho).to(log_rho.dtype)
    elif how.level == CorrectionLevel.GEOMETRIC:
        log_rho = b.mean(log_rho).to(log_rho.dtype)
    weights = hold(log_rho, spec.log_ratio_clamp).exp()
    if how.mode == CorrectionMode.TRUNCATE:
        return weights if how.lower is None and how.upper is None else weights.clamp(how.lower, how.upper)
    return torch.where(_outside(weights, how.lower, how.upper), 0.0, weights)


def _outside(values: Tensor, low: float | None, high: float | None) -> Tensor:
    outside = torch.zeros_like(values, dtype=torch.bool)
    if low is not None:
        outside = outside | (values < low)
    if high is not None:
        outside = outside | (values > high)
    return outside


def rejected(b: Behaviour, spec: LossSpec) -> Tensor:
    """(n,) bool: tokens whose divergence, at its level, leaves its bounds."""
    how = spec.rollout
    if how.reject is None:
        return torch.zeros_like(b.valid)
    divergence = torch.where(b.valid, _divergence(b, how.reject, spec), 0.0)
    if how.reject_level == DivergenceLevel.SEQUENCE_MEAN:
        divergence = b.mean(divergence)
    elif how.reject_level == DivergenceLevel.SEQUENCE_SUM:
        divergence = b.total(divergence)
    elif how.reject_level == DivergenceLevel.SEQUENCE_MAX:
        lowest = torch.where(b.valid, divergence, -torch.inf)
        divergence = segment_max(lowest, b.sequence, b.lengths.shape[0])
    return _outside(divergence, how.reject_lower, how.reject_upper)


def _divergence(b: Behaviour, name: str, spec: LossSpec) -> Tensor:
    """(n,) divergence of each token between rollout and old policy."""
    x = hold(b.log_rho, spec.log_ratio_clamp)
    if name == Divergence.K1:
        return -x
    if name == Divergence.K2:
        return 0.5 * x * x
    if name == Divergence.K3:
        return (torch.expm1(x) - x).clamp_min(0)
    p, q = (y.exp().clamp(_CERTAIN, 1 - _CERTAIN) for y in (b.rollout_logps, b.old_logps))
    kl = p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))
    value = (p - q).abs() if name == Divergence.TV else kl
    return torch.where(b.rollout_logps.isnan(), 0.0, value)


def policy_weights(b: Behaviour, spec: LossSpec) -> Tensor:
    """(n,) weights of `spec.rollout`, 0 where it rejects."""
    return torch.where(rejected(b, spec), 0.0, importance_weights(b, spec))


def sequence_weights(weights: Tensor, keep: Tensor, floor: float = 1e-10) -> Tensor:
    """(B, T) weights per token -> (B, T): the geometric mean of each sequence's, exp(mean log(w + floor)) over its
    valid tokens, for an objective that has one loss per sequence (verl 0.9's geo_mean; its floor)."""
    logs = torch.where(keep, (weights.detach().double() + floor).log(), 0.0)
    mean = logs.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp_min(1)
    return mean.exp().to(weights.dtype).expand(weights.shape)


def off_policy(logps: Tensor, advantages: Tensor, b: Behaviour, spec: LossSpec) -> Tensor:
    """(n,) bool: tokens with A < 0 in sequences whose mean of behaviour − logp exceeds `off_policy_threshold`.

    The behaviour is the sampler, or the old policy where no rollout log-probs were given (`b.rollout_logps` is then
    `b.old_logps`). An unscored token (NaN) counts as 0 (TRL 1.16; DeepSeek-V3.2, arXiv:2512.02556).
    """
    scored = b.valid & ~b.rollout_logps.isnan()
    gap = torch.where(scored, b.rollout_logps - logps.detach(), 0.0)
    return (advantages < 0) & (b.mean(gap) > spec.off_policy_threshold)


def correct_batch(flat: Flat, spec: LossSpec) -> Flat:
    """The batch with the corrections that depend on all of it: normalised weights, the second moment, rejected tokens
    out of the mask and every count. Unchanged if the spec has none. No host synchronisation."""
    how = spec.rollout
    if how is None or not how.by_batch:
        return flat
    valid, sequence = flat.valid(), flat.sequence_of_token()
    b = Behaviour(flat.old_logps, flat.rollout_logps, valid, sequence, flat.lengths)
    weights = importance_weights(b, spec)
    drop = rejected(b, spec)
    if how.mode == CorrectionMode.MASK:
        drop = drop | (weights == 0)
    if how.normalize:
        weights = _normalise(weights, b, by_token=how.level == CorrectionLevel.TOKEN)
    if how.second_moment is not None:
        drop = drop | _second_moment_outliers(b.log_rho, valid, how.second_moment)
    flat = flat._replace(policy_weights=torch.where(drop, 0.0, weights).to(flat.old_logps.dtype))
    return flat if how.rejected_in_denominator else _without(flat, drop & valid)


def _normalise(weights: Tensor, b: Behaviour, by_token: bool) -> Tensor:
    """Weights over their mean: over tokens, or over sequences with a valid token (verl, before rejections)."""
    share = b.valid.double()
    if not by_token:
        share = share / b.lengths.double().clamp_min(1)[b.sequence]
    mean = torch.where(b.valid, share * weights, 0.0).sum() / share.sum().clamp_min(1e-30)
    return torch.where(mean > 1e-8, weights / mean, weights)


def _second_moment_outliers(log_rho: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """(n,) bool: the fewest tokens, largest (log ρ)² first, without which the mean of the rest is below `threshold`;
    one token always stays (M2PO, arXiv:2510.01161; AReaL)."""
    valid = valid & ~log_rho.isnan()  # no outlier: it stays, and stays visible
    square = torch.where(valid, log_rho.double() ** 2, -1.0)
    ordered, order = square.sort(descending=True, stable=True)
    counted = (ordered >= 0).double()
    # mean of what is left after dropping the i largest, from the small end
    rest = (ordered * counted).flip(0).cumsum(0).flip(0)
    left = counted.flip(0).cumsum(0).flip(0)
    fine = (rest / left.clamp_min(1) < threshold) & (left > 0)
    dropped = torch.minimum((fine.double().cumsum(0) == 0).sum(), (left[:1].sum().long() - 1).clamp_min(0))
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (rank < dropped) & valid


def _without(flat: Flat, drop: Tensor) -> Flat:
    """The batch with some of its valid tokens masked."""
    mask = flat.valid() & ~drop
    lengths = segment_sum(mask.float(), flat.sequence_of_token(), flat.num_sequences)
    # + 0·count: a NaN that marks malformed offsets must stay
    counts = torch.stack([lengths.sum(), (lengths > 0).sum().float(), drop.sum().float()]) + 0 * flat.counts[0]
    changes: dict[str, Any] = {"mask": mask, "lengths": lengths, "counts": counts}
    return flat._replace(**changes)
