"""Tokens picked within the whole batch by their entropy or covariance: from the policy's own log-probs, in plain torch,
without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.flat import Flat
from fastrl.registry import Terms, bounds, clip
from fastrl.spec import LossSpec


def select(logps: Tensor, entropy: Tensor | None, advantages: Tensor, flat: Flat, spec: LossSpec) -> Flat:
    """The batch with `selected` as the spec wants it; unchanged if it picks nothing, or the caller has picked."""
    if not spec.by_batch or flat.selected is not None:
        return flat
    valid = flat.valid()
    if spec.top_entropy_quantile < 1:
        picked = high_entropy(entropy, valid, spec.top_entropy_quantile)
    else:
        old = logps if flat.old_logps is None else flat.old_logps.to(logps.dtype)
        picked = _by_covariance(logps, old, advantages, valid, spec)
    return flat._replace(selected=picked.to(logps.dtype))


def high_entropy(entropy: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """(N,) bool: valid tokens whose entropy reaches the 1 − `fraction` quantile of the valid ones, interpolated
    linearly as `torch.quantile` does (arXiv:2506.01939; TRL `top_entropy_quantile`)."""
    ordered = torch.where(valid, entropy, torch.inf).sort().values
    last = (valid.sum() - 1).clamp_min(0)
    place = (1 - fraction) * last.double()
    # A place that is an index but for the rounding of the fraction is that index, in every dtype.
    place = torch.where((place - place.round()).abs() < 1e-6, place.round(), place)
    below = place.floor()
    index = torch.stack([below, place.ceil()]).long().clamp(max=max(len(ordered) - 1, 0))
    low, high = ordered[index].unbind(0) if len(ordered) else entropy.new_zeros(2).unbind(0)
    return valid & (entropy >= torch.lerp(low, high, (place - below).to(entropy.dtype)))


def _by_covariance(logps: Tensor, old: Tensor, advantages: Tensor, valid: Tensor, spec: LossSpec) -> Tensor:
    """(N,) bool: tokens picked by (A − mean A)·(log π − mean log π), means over the valid tokens (arXiv:2505.22617).

    kl_cov: the highest. clip_cov: all but some drawn by `seed` among those between the bounds that the ratio clip
    leaves alone. The number is the fraction of the valid tokens rounded down, at least one.
    """
    count = valid.double().sum()

    def centred(x: Tensor) -> Tensor:
        x = torch.where(valid, x.double(), 0.0)
        return x - x.sum() / count.clamp_min(1)

    covariance = centred(advantages) * centred(logps)
    if spec.objective == "kl_cov":
        return _lowest(-covariance, valid, (count * spec.kl_cov_fraction).floor())
    terms = Terms(logps, logps - old, advantages, old, None, None)
    candidates = valid & (covariance > spec.clip_cov_low) & (covariance < spec.clip_cov_high)
    candidates = candidates & ~_clipped(terms, spec)
    keys = _shuffled(len(logps), spec.seed, logps.device)
    return ~_lowest(keys, candidates, (count * spec.clip_cov_fraction).floor())


def _clipped(t: Terms, spec: LossSpec) -> Tensor:
    """Where the clipped term is the larger loss."""
    ratio = t.log_ratio.exp()
    return -clip(ratio, *bounds(spec)) * t.advantages > -ratio * t.advantages


def _lowest(keys: Tensor, candidates: Tensor, number: Tensor) -> Tensor:
    """(N,) bool: the `number` (at least one) candidates with the lowest keys."""
    order = torch.where(candidates, keys.double(), torch.inf).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return candidates & (rank < number.clamp_min(1))


def _shuffled(n: int, seed: int, device: torch.device) -> Tensor:
    """(n,) pseudo-random keys that depend on the seed and the place alone: the same on every device (splitmix64)."""
    x = torch.arange(1, n + 1, device=device) * -7046029254386353131 + seed  # int64 arithmetic wraps
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _unsigned_shift(x, shift)) * factor
    return (x ^ _unsigned_shift(x, 31)).double()


def _unsigned_shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & (2 ** (64 - by) - 1)
