"""For `oracle.py`: a batch as plain Python lists, the arithmetic that its formulas share, and the advantages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrl import LossSpec, Rollouts

inf = math.inf
Floats = list[float]


@dataclass(frozen=True)
class Case:
    """The tokens that count, one after the other; what stands under the mask is not here at all."""

    places: list[int]  # of each token among the flat rows of the rollouts
    sequences: list[list[int]]  # tokens of each sequence, the empty ones included
    rewards: tuple[Floats, list[int]] | None  # of each sequence, and its group
    advantages: Floats | None  # of each token, unless there are rewards
    old: Floats | None
    ref: Floats | None
    sampler: Floats | None  # NaN = not scored
    factors: Floats | None  # `rollout_weights`


def case(rollouts: Rollouts) -> Case:
    """Padded or packed rollouts, from their public fields."""
    B, T = rollouts.shape if len(rollouts.shape) == 2 else (0, 0)
    n = rollouts.token_ids.numel()
    ends = [T * b for b in range(B + 1)] if rollouts.cu_seqlens is None else rollouts.cu_seqlens.tolist()
    keep = [True] * n if rollouts.mask is None else [bool(m) for m in rollouts.mask.flatten().tolist()]
    places = [i for i in range(n) if keep[i]]
    sequences = [[k for k, i in enumerate(places) if a <= i < b] for a, b in itertools.pairwise(ends)]
    S = len(sequences)

    def of_tokens(values: Any) -> Floats | None:
        return None if values is None else [values.flatten().tolist()[i] for i in places]

    given, rewards = None, None
    if rollouts.advantages is not None:
        per_sequence = rollouts.advantages.numel() == S
        flat = rollouts.advantages.flatten().tolist()
        of_token = {k: s for s, tokens in enumerate(sequences) for k in tokens}
        given = [flat[of_token[k] if per_sequence else i] for k, i in enumerate(places)]
    else:
        groups = rollouts.group_ids.tolist() if rollouts.group_size is None else None
        rewards = (
            [float(r) for r in rollouts.rewards.tolist()],
            groups or [s // rollouts.group_size for s in range(S)],
        )
    return Case(
        places,
        sequences,
        rewards,
        given,
        of_tokens(rollouts.old_logps),
        of_tokens(rollouts.ref_logps),
        of_tokens(rollouts.rollout_logps),
        of_tokens(rollouts.rollout_weights),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Unbiased standard deviation; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))


def hold(x: float, bound: float | None) -> float:
    return x if bound is None else max(-bound, min(bound, x))


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def sign(x: float) -> float:
    return math.copysign(1.0, x) if x else 0.0


def advantages(c: Case, spec: LossSpec) -> Floats:
    """Of each token: given, or (reward − baseline) / (std + eps) of its group."""
    if c.advantages is not None:
        return c.advantages
    rewards, groups = c.rewards
    out = [0.0] * len(c.places)
    for s, tokens in enumerate(c.sequences):
        group = [r for r, g in zip(rewards, groups, strict=True) if g == groups[s]]
        others = (sum(group) - rewards[s]) / (len(group) - 1) if len(group) > 1 else 0.0
        centred = rewards[s] - {"mean": mean(group), "leave-one-out": others, "none": 0.0}[spec.advantage_baseline]
        scale = {"group": deviation(group), "batch": deviation(rewards), "none": None}[spec.advantage_scale]
        flat = len(set(group)) == 1 and (spec.advantage_baseline != "none" or spec.advantage_scale == "group")
        for k in tokens:
            out[k] = 0.0 if flat else centred if scale is None else centred / (scale + spec.advantage_eps)
    return out
