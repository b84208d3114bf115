"""For `oracle.py`: the weights and rejections of a rollout correction, and the off-policy mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oracle_data import Case, Floats, clip, hold, inf, mean

from fastrl import LossSpec


@dataclass
class Correction:
    """What the rollout correction does to each token."""

    weights: Floats  # factor of the policy term, 0 where rejected
    log_weights: Floats  # of each sequence, for the objective that folds them in
    rejected: set[int]
    gaps: Floats  # log ρ, 0 where not scored


def gap(old: float, sampler: float) -> float:
    """log ρ."""
    return 0.0 if math.isnan(sampler) else old - sampler


def divergence(kind: str, gap: float, old: float, sampler: float) -> float:
    if kind == "k1":
        return -gap
    if kind == "k2":
        return gap * gap / 2
    if kind == "k3":
        return math.exp(gap) - 1 - gap
    if math.isnan(sampler):
        return 0.0
    p, q = (clip(math.exp(x), 1e-6, 1 - 1e-6) for x in (old, sampler))
    return abs(p - q) if kind == "tv" else q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def log_weight(w: float) -> float:
    """log w held to [log 1e-8, 20]."""
    return clip(math.log(w) if w > 0 else -inf, math.log(1e-8), 20.0)


def given(c: Case, spec: LossSpec, gaps: Floats) -> Correction:
    """Without a correction by the spec: the trainer's own weights, or 1."""
    factors = [1.0] * len(c.places) if c.factors is None else c.factors
    logs = [sum(log_weight(factors[k]) for k in tokens) for tokens in c.sequences]
    zero = {k for k, w in enumerate(factors) if w == 0 and spec.objective != "vespo"}  # there a factor of w: 1e-8
    return Correction(factors, logs, zero, gaps)


def correction(c: Case, spec: LossSpec, old: Floats) -> Correction:
    how, n, bound = spec.rollout, len(c.places), spec.log_ratio_clamp
    gaps = [0.0] * n if c.sampler is None else [gap(o, q) for o, q in zip(old, c.sampler, strict=True)]
    if how is None:
        return given(c, spec, gaps)
    low, high = 0.0 if how.lower is None else how.lower, inf if how.upper is None else how.upper
    weights, logs, rejected = [1.0] * n, [0.0] * len(c.sequences), set()
    for s, tokens in enumerate(c.sequences):
        total = sum(gaps[k] for k in tokens)
        for k in tokens:
            of_level = {"token": gaps[k], "sequence": total, "geometric": total / len(tokens)}
            w = math.exp(hold(of_level.get(str(how.level), 0.0), bound))
            weights[k] = clip(w, low, high) if how.mode == "truncate" else w if low <= w <= high else 0.0
        each = tokens[:1] if how.level == "sequence" else tokens
        logs[s] = sum(log_weight(weights[k]) for k in each)
    if how.mode == "mask":
        rejected |= {k for k in range(n) if weights[k] == 0}
    if how.normalize and n:
        of_sequences = [mean([weights[k] for k in tokens]) for tokens in c.sequences if tokens]
        average = mean(weights if how.level == "token" else of_sequences)
        weights = [w / average if average > 1e-8 else w for w in weights]
    gated = far(c, spec, old, gaps)
    if how.second_moment is not None:
        left = sorted(range(n), key=lambda k: gaps[k] ** 2)
        while len(left) > 1 and mean([gaps[k] ** 2 for k in left]) >= how.second_moment:
            gated.add(left.pop())
    weights = [0.0 if k in gated else w for k, w in enumerate(weights)]
    return Correction(weights, logs, gated if spec.objective == "vespo" else rejected | gated, gaps)


def far(c: Case, spec: LossSpec, old: Floats, gaps: Floats) -> set[int]:
    """Tokens whose divergence leaves its bounds."""
    how = spec.rollout
    if how.reject is None:
        return set()
    own = [
        divergence(how.reject, hold(g, spec.log_ratio_clamp), o, q)
        for g, o, q in zip(gaps, old, c.sampler, strict=True)
    ]
    low = -inf if how.reject_lower is None else how.reject_lower
    high = inf if how.reject_upper is None else how.reject_upper
    out: set[int] = set()
    for tokens in filter(None, c.sequences):
        all_of_it = [own[k] for k in tokens]
        whole = {
            "sequence-mean": mean(all_of_it),
            "sequence-sum": sum(all_of_it),
            "sequence-max": max(all_of_it),
        }
        out |= {k for k in tokens if not low <= whole.get(str(how.reject_level), own[k]) <= high}
    return out


def strays(c: Case, sequences: list[list[int]], spec: LossSpec, old: Floats, sg: Floats, A: Floats) -> set[int]:
    """Tokens with A < 0 in sequences whose policy has left the sampler."""
    out: set[int] = set()
    if spec.off_policy_threshold is None:
        return out
    sampler = old if c.sampler is None else [p if math.isnan(q) else q for p, q in zip(sg, c.sampler, strict=True)]
    for tokens in filter(None, sequences):
        if mean([sampler[k] - sg[k] for k in tokens]) > spec.off_policy_threshold:
            out |= {k for k in tokens if A[k] < 0}
    return out
