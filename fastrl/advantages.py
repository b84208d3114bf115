"""Group-normalised advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.flat import Flat, segment_sum
from fastrl.spec import AdvantageBaseline, AdvantageScale, LossSpec, option


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages of sampled answers against their group: Aᵢ = (rᵢ − baseline) / (std + eps).

    baseline: "mean" of the group (GRPO), "leave-one-out" mean of the others (RLOO), "none".
    scale: "group" or "batch" standard deviation (unbiased), "none" (Dr. GRPO). A group of one, or whose rewards are
    all equal, gives exactly 0.

    Args:
        rewards: (S,) floats, one per sequence; taken in float64 inside.
        group_size: G consecutive sequences share a prompt; S must be a multiple of G.
        group_ids: (S,) ints instead: equal ids share a prompt, in any order and number.

    Returns:
        (S,) float32 (float64 for float64 rewards).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or name, or not exactly one of group_size and group_ids.

    Source: arXiv:2402.03300 (GRPO); TRL's eps 1e-4 and ddof 1.
    """
    _checks.floating("rewards", rewards)
    if rewards.ndim != 1:
        _checks.refuse("rewards", "shape (S,), one reward per sequence", rewards, "sum several rewards first")
    check_groups(rewards, group_size, group_ids)
    baseline = option(AdvantageBaseline, baseline, "baseline")
    scale = option(AdvantageScale, scale, "scale")
    groups = group_index(rewards, group_size or 0, group_ids)
    out = normalise(rewards.detach().double(), groups, baseline, scale, eps)
    return out.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    """Raise unless exactly one grouping is given and fits the rewards."""
    if (group_size is None) == (group_ids is None):
        came = "neither" if group_size is None else "both"
        _checks.refuse("group_size", "exactly one of group_size and group_ids with rewards", came)
    if group_ids is not None:
        _checks.integer("group_ids", group_ids)
        _checks.shape("group_ids", group_ids, tuple(rewards.shape), "one id per reward")
        _checks.same_device("group_ids", group_ids, rewards.device, "rewards")
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        _checks.refuse("group_size", "a positive int", group_size, error=TypeError)
    if group_size < 1 or rewards.shape[0] % group_size:
        _checks.refuse(
            "group_size",
            f"a positive divisor of the {rewards.shape[0]} rewards",
            str(group_size),
            "pass group_ids for groups of unequal size",
        )


def group_index(rewards: Tensor, group_size: int, group_ids: Tensor | None) -> Tensor:
    """(R,) int64 group of each reward, numbered below R, without a host synchronisation (torch.unique has one)."""
    rows = torch.arange(rewards.shape[0], device=rewards.device)
    if group_ids is None:
        return rows // group_size
    ordered, order = torch.sort(group_ids)
    starts = torch.zeros_like(rows)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(rows).scatter_(0, order, starts.cumsum(0))


def normalise(r: Tensor, groups: Tensor, baseline: str, scale: str, eps: float) -> Tensor:
    """Baseline and scale of (R,) float64 rewards; the variance in two passes."""
    size = r.shape[0]
    n = segment_sum(torch.ones_like(r), groups, size)[groups]
    total = segment_sum(r, groups, size)[groups]
    mean = total / n
    if baseline == AdvantageBaseline.LEAVE_ONE_OUT:
        centred = r - (total - r) / (n - 1).clamp_min(1)
    else:
        centred = r - mean if baseline == AdvantageBaseline.MEAN else r
    if scale == AdvantageScale.GROUP:
        squares = segment_sum((r - mean) ** 2, groups, size)[groups]
        centred = centred / ((squares / (n - 1).clamp_min(1)).sqrt() + eps)
    elif scale == AdvantageScale.BATCH:
        std = r.var(correction=min(1, max(size - 1, 0))).sqrt() if size else r.sum()
        centred = centred / (std + eps)
    if baseline == AdvantageBaseline.NONE and scale != AdvantageScale.GROUP:
        return centred
    low = torch.full_like(r, torch.inf).scatter_reduce_(0, groups, r, "amin")[groups]
    high = torch.full_like(r, -torch.inf).scatter_reduce_(0, groups, r, "amax")[groups]
    return centred.masked_fill(low == high, 0)


def sequence_advantages(flat: Flat, spec: LossSpec) -> Tensor:
    """(S,) advantages of a batch that came with rewards, by the spec's baseline and scale."""
    groups = group_index(flat.rewards, flat.group_size, flat.group_ids)
    every = normalise(flat.rewards.double(), groups, spec.advantage_baseline, spec.advantage_scale, spec.advantage_eps)
    return every[flat.first_sequence : flat.first_sequence + flat.num_sequences]


def token_advantages(flat: Flat, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """(N,) advantages, given or computed from the rewards; arbitrary under the mask."""
    if flat.per_token_advantages:
        return flat.advantages.to(dtype)
    given = flat.advantages if flat.advantages is not None else sequence_advantages(flat, spec)
    return flat.per_token(given.to(dtype))
