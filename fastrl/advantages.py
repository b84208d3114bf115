"""Group-normalised advantages: one number per sampled sequence from the rewards of its group.

Rewards are data: nothing here has a gradient. The Triton twin of `normalise` is `kernels/fastrl_kernels/groups.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks
from fastrl import backend as backends
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.grouping import Grouping, check_groups
from fastrl.operators import fake, operator
from fastrl.spec import AdvantageBaseline, AdvantageScale, LossSpec, option

_BEST_OF_OTHERS = "best-of-others"  # the baseline of pass@k, which is no field of a loss


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Advantages of sampled answers against their group: Aᵢ = (rᵢ − baseline) / scale.

    baseline: "mean" of the group (GRPO), "leave-one-out" mean of the others (RLOO), "length-weighted" Σ len·r / Σ len
    (OPO), or "none".
    scale: std + eps of the "group" or the "batch" (unbiased), "leave-one-out" std of the others + eps where they vary
    (NeMo-RL), "mean" of the group + eps, with 0 where it is not positive (MaxRL), or "none" (Dr. GRPO).
    A group of one, or whose rewards are all equal, gives exactly 0, unless the baseline is "none" and the scale "none"
    or "batch". The variance is taken in two passes, and a std counts as 0 only where the rewards are equal.

    Args:
        rewards: (S,) floats, one per sequence.
        group_size: G consecutive sequences share a prompt; S must be a multiple of G.
        group_ids: (S,) ints instead: equal ids share a prompt, in any order and number.
        eps: added to the scale: 1e-4 in TRL, 1e-6 in verl and NeMo-RL.
        lengths: (S,) tokens of each sequence, for "length-weighted" only; a group without tokens gives 0.
        backend: "auto", "triton" (fp32, one launch; S² comparisons with ids, S·G without) or "torch" (float64 inside).

    Returns:
        (S,) float32 (float64 for float64 rewards).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or name, or not exactly one of group_size and group_ids.

    Source: arXiv:2402.03300 (GRPO), 2402.14740 (RLOO), 2505.23585 (OPO), 2503.20783 (Dr. GRPO). For a group of one,
    verl's grpo, rloo and opo give A = r where this gives 0; "batch" takes the mean per group, as TRL does.
    """
    baseline, scale = option(AdvantageBaseline, baseline, "baseline"), option(AdvantageScale, scale, "scale")
    if (lengths is not None) != (baseline == AdvantageBaseline.LENGTH_WEIGHTED):
        expected = "the tokens of each sequence with, and only with, baseline 'length-weighted'"
        _checks.refuse("lengths", expected, f"{'None' if lengths is None else 'a tensor'} with {str(baseline)!r}")
    return _advantages(Groups.of(rewards, group_size, group_ids, lengths, eps), str(baseline), str(scale), backend)


def pass_at_k_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Only the best answer of a group is rewarded, by its lead: A = (r₁ − r₂) / (std + eps), 0 for all others.

    Args:
        scale: "group" (unbiased std) or "none".
        rewards, group_size, group_ids, eps, backend: as for `group_advantages`.

    Returns:
        (S,) float32 (float64 for float64 rewards); exactly 0 where the best two are equal, and in a group of one, which
        verl refuses.

    Source: arXiv:2503.19595; verl's grpo_passk.
    """
    if scale not in ("group", "none"):
        _checks.refuse("scale", "'group' or 'none'", repr(scale))
    return _advantages(Groups.of(rewards, group_size, group_ids, None, eps), _BEST_OF_OTHERS, scale, backend)


class Groups(NamedTuple):
    """Checked rewards and their grouping."""

    rewards: Tensor  # (S,) or (S, K)
    group_size: int  # 0 with ids
    group_ids: Tensor | None  # (S,) int64
    lengths: Tensor | None  # (S,)
    eps: float

    @classmethod
    def of(
        cls,
        rewards: Tensor,
        group_size: int | None,
        group_ids: Tensor | None,
        lengths: Tensor | None,
        eps: float,
        ndim: int = 1,
    ) -> Groups:
        _checks.floating("rewards", rewards)
        if rewards.ndim != ndim:
            remedy = "sum several rewards first, or see gdpo_advantages"
            expected = "shape (S,), one reward per sequence"
            if ndim == 2:
                expected, remedy = "shape (S, K), K rewards per sequence", "one reward needs group_advantages only"
            _checks.refuse("rewards", expected, rewards, remedy)
        check_groups(rewards, group_size, group_ids)
        _checks.number_from_zero("eps", eps)
        if lengths is not None:
            _checks.tensor("lengths", lengths)
            _checks.shape("lengths", lengths, tuple(rewards.shape[:1]), "one per sequence")
            _checks.same_device("lengths", lengths, rewards.device, "rewards")
            lengths = lengths.detach().float().contiguous()
        ids = None if group_ids is None else group_ids.long().contiguous()
        return cls(rewards.detach().contiguous(), group_size or 0, ids, lengths, float(eps))

    @property
    def grouping(self) -> Grouping:
        return Grouping.of(self.group_size, self.group_ids)

    def cast(self, advantages: Tensor) -> Tensor:
        """float32, or float64 for float64 rewards."""
        return advantages.to(wide(self.rewards.dtype))


def _advantages(given: Groups, baseline: str, scale: str, backend: str) -> Tensor:
    return _group_advantages(*given, baseline, scale, backends.of(given.rewards, backend))


@operator("group_advantages")
def _group_advantages(
    rewards: Tensor,
    group_size: int,
    group_ids: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    baseline: str,
    scale: str,
    backend: str,
) -> Tensor:
    """(S,) float32, or float64 for float64 rewards; group_size 0 with ids."""
    if backend == "triton":
        import fastrl_kernels as kernels

        options = {"eps": eps, "baseline": baseline, "scale": scale, "lengths": lengths}
        return kernels.group_advantages(rewards, group_ids, group_size, **options)
    given = Groups(rewards, group_size, group_ids, lengths, eps)
    advantages = given.cast(normalise(rewards.double(), given.grouping, baseline, scale, eps, lengths))
    return advantages.clone() if advantages is rewards else advantages  # neither baseline nor scale, in float64


@fake("group_advantages")
def _(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rewards, dtype=wide(rewards.dtype))


def _greatest_of_others(r: Tensor, groups: Grouping) -> Tensor:
    """(R,) the greatest of the group without the row itself; −inf in a group of one."""
    greatest = groups.greatest(r)
    holds = r == greatest
    alone = holds & (groups.sum(holds.to(r.dtype)) == 1)
    return torch.where(alone, groups.greatest(r.masked_fill(holds, -torch.inf)), greatest)


def _std_of_others(r: Tensor, groups: Grouping, n: Tensor, mean: Tensor) -> Tensor:
    """(R,) unbiased std of the group without the row itself, exactly 0 where those rewards are equal.

    Σ_{j≠i} (rⱼ − mean_{j≠i})² = Σⱼ dⱼ² − dᵢ²·n/(n−1) with d = r − mean. That difference keeps its digits for every row
    but the farthest from the mean, whose sum is taken by itself.
    """
    size, rows = r.shape[0], torch.arange(r.shape[0], device=r.device)
    d = r - mean
    squares = groups.sum(d * d) - d * d * n / (n - 1).clamp_min(1)
    far = d.abs() == groups.greatest(d.abs())
    far = rows == groups.least(torch.where(far, rows, size).to(r.dtype))
    centre = groups.sum(torch.where(far, mean - d / (n - 1).clamp_min(1), 0))
    alone = groups.sum(torch.where(far, 0, (r - centre) ** 2))
    std = (torch.where(far, alone, squares).clamp_min(0) / (n - 2).clamp_min(1)).sqrt()
    vary = -_greatest_of_others(-r, groups) < _greatest_of_others(r, groups)
    return torch.where(vary, std, 0)


def _centred(r: Tensor, groups: Grouping, n: Tensor, mean: Tensor, baseline: str, lengths: Tensor | None) -> Tensor:
    """r − baseline."""
    if baseline == AdvantageBaseline.NONE:
        return r
    gap = r - mean
    if baseline == AdvantageBaseline.LEAVE_ONE_OUT:
        return gap * n / (n - 1).clamp_min(1)
    if baseline == AdvantageBaseline.LENGTH_WEIGHTED:
        weight = groups.sum(lengths.to(r.dtype))
        shift = groups.sum(lengths * gap)
        return torch.where(weight > 0, gap - shift / weight.clamp_min(1e-300), 0)
    if baseline == _BEST_OF_OTHERS:
        return (r - _greatest_of_others(r, groups)).clamp_min(0)
    return gap


def normalise(
    r: Tensor, groups: Grouping, baseline: str, scale: str, eps: float, lengths: Tensor | None = None
) -> Tensor:
    """Baseline and scale of (R,) float64 rewards; the variance in two passes."""
    size = r.shape[0]
    n = groups.sum(torch.ones_like(r))
    mean = groups.sum(r) / n
    a = _centred(r, groups, n, mean, baseline, lengths)
    if scale == AdvantageScale.GROUP:
        squares = groups.sum((r - mean) ** 2)
        a = a / ((squares / (n - 1).clamp_min(1)).sqrt() + eps)
    elif scale == AdvantageScale.BATCH:
        std = r.var(correction=min(1, max(size - 1, 0))).sqrt() if size else r.sum()
        a = a / (std + eps)
    elif scale == AdvantageScale.LEAVE_ONE_OUT:
        std = _std_of_others(r, groups, n, mean)
        a = torch.where(std > 0, a / (std + eps), a)
    elif scale == AdvantageScale.MEAN:
        a = torch.where(mean <= 0, 0, a / (mean + eps))
    if baseline == AdvantageBaseline.NONE and scale in (AdvantageScale.NONE, AdvantageScale.BATCH):
        return a
    return torch.where(mean.isnan(), mean, torch.where(groups.varies(r), a, 0))


def sequence_advantages(flat: Flat, spec: LossSpec) -> Tensor:
    """(S,) advantages of a batch that came with rewards, by the spec's baseline and scale."""
    groups = Grouping.of(flat.group_size, flat.group_ids)
    every = normalise(flat.rewards.double(), groups, spec.advantage_baseline, spec.advantage_scale, spec.advantage_eps)
    return every[flat.first_sequence : flat.first_sequence + flat.num_sequences]


def token_advantages(flat: Flat, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """(N,) advantages, given or computed from the rewards; arbitrary under the mask."""
    if flat.per_token_advantages:
        return flat.advantages.to(dtype)
    given = flat.advantages if flat.advantages is not None else sequence_advantages(flat, spec)
    return flat.per_token(given.to(dtype))
