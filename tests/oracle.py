"""The whole policy loss and its metrics once more: Python floats and loops, written from the documented formulas alone.

It shares no code with the library: a spec is read for its fields, nothing else. Stop-gradients are explicit. Every
quantity without a gradient is computed from `sg`, the one with a gradient from `lp`; both hold the same numbers, and a
finite difference in `lp` alone is the gradient that autograd must give, also where the loss is no antiderivative of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from oracle_data import Case, Floats, advantages, case, clip, hold, inf, mean, sign
from oracle_sampler import Correction, correction, strays

from fastrl import LossSpec

__all__ = ["advantages", "case", "clipped", "covariances", "evaluate", "metrics", "number_picked"]

# ---------------------------------------------------------------------------- tokens by rank


def quantile(values: Sequence[float], q: float) -> float:
    """With linear interpolation between order statistics."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def covariances(tokens: Collection[int], sg: Floats, A: Floats) -> dict[int, float]:
    """(A − Ā)·(log π − its mean) over these tokens."""
    if not tokens:
        return {}
    a, b = mean([A[k] for k in tokens]), mean([sg[k] for k in tokens])
    return {k: (A[k] - a) * (sg[k] - b) for k in tokens}


def number_picked(fraction: float, tokens: Collection[int]) -> int:
    return max(int(fraction * len(tokens)), 1)


# ---------------------------------------------------------------------------- objectives


@dataclass
class View:
    """What an objective sees of one token."""

    raw: float  # log-ratio at the spec's level
    d: float  # the same, held
    own: float  # log-ratio of the token itself
    r: float
    r_sg: float
    lp: float
    sg: float
    old: float
    A: float
    log_w: float  # log of the probability ratio of the sequence, rollout weights inside, without gradient
    picked: bool


def bounds(spec: LossSpec) -> tuple[float, float]:
    low = -inf if spec.epsilon_low is None else 1 - spec.epsilon_low
    return low, inf if spec.epsilon_high is None else 1 + spec.epsilon_high


def clipped_log_ratio(d: float, A: float, spec: LossSpec) -> float:
    low = -inf if spec.epsilon_low is None else -spec.epsilon_low
    high = inf if spec.epsilon_high is None else spec.epsilon_high
    return sign(A) * min(sign(A) * d, sign(A) * clip(d, low, high))


def ppo_clip(v: View, spec: LossSpec) -> float:
    low, high = bounds(spec)
    free = v.r if spec.delta is None else min(v.r, spec.delta)
    loss = -min(free * v.A, clip(v.r, low, high) * v.A)
    return min(loss, -spec.dual_clip * v.A) if spec.dual_clip is not None and v.A < 0 else loss


def cispo(v: View, spec: LossSpec) -> float:
    return -clip(v.r_sg, *bounds(spec)) * v.A * v.lp


def sapo(v: View, spec: LossSpec) -> float:
    tau = spec.sapo_temperature_positive if v.A > 0 else spec.sapo_temperature_negative
    return -v.A * 4 / tau / (1 + math.exp(-tau * (v.r - 1)))


def gmpo(v: View, spec: LossSpec) -> float:
    return -v.A * v.r


def vespo(v: View, spec: LossSpec) -> float:
    positive = v.A >= 0
    k = spec.vespo_k_positive if positive else spec.vespo_k_negative
    lam = spec.vespo_lambda_positive if positive else spec.vespo_lambda_negative
    return -math.exp(lam + k * v.log_w - lam * math.exp(v.log_w)) * v.A * v.lp


def dppo_drops(v: View, spec: LossSpec) -> tuple[bool, bool]:
    """Beyond the lower, beyond the upper bound."""
    p, q = math.exp(v.sg), math.exp(v.old)
    low = inf if spec.epsilon_low is None else spec.epsilon_low
    high = inf if spec.epsilon_high is None else spec.epsilon_high
    if spec.objective == "dppo_tv":
        return v.A <= 0 and p - q < -low, v.A > 0 and p - q > high
    shift = q * (v.old - v.sg) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return v.A <= 0 and p < q and shift > low, v.A > 0 and p > q and shift > high


def dppo(v: View, spec: LossSpec) -> float:
    return 0.0 if any(dppo_drops(v, spec)) else -min(v.r_sg, spec.dppo_ratio_cap) * v.A * v.lp


def topr(v: View, spec: LossSpec) -> float:
    return -v.A * v.lp * (1.0 if v.A > 0 else min(v.r_sg, spec.topr_ratio_cap))


def objective(v: View, spec: LossSpec) -> float:
    if not isinstance(spec.objective, str):
        return -v.A * (v.d + v.d**3)  # tests.common.cubic
    return {
        "ppo_clip": ppo_clip,
        "cispo": cispo,
        "sapo": sapo,
        "gmpo": gmpo,
        "vespo": vespo,
        "dppo_tv": dppo,
        "dppo_kl": dppo,
        "reinforce": lambda v, spec: -v.A * v.lp,
        "importance_sampling": lambda v, spec: -v.r * v.A,
        "topr": topr,
        "dro": lambda v, spec: -(v.A * v.lp - spec.dro_beta / 2 * v.d**2),
        "clip_cov": lambda v, spec: 0.0 if v.picked else ppo_clip(v, spec),
        "kl_cov": lambda v, spec: -v.r * v.A + (spec.kl_cov_coef * abs(v.d) if v.picked else 0.0),
    }[spec.objective](v, spec)


def kl(x: float, x_sg: float, r: float, spec: LossSpec) -> float:
    def estimate(x: float) -> float:
        held = hold(x, spec.log_ratio_clamp)
        of = {"k1": x, "abs": abs(x), "k2": x * x / 2, "k3": math.exp(-held) - 1 + held}
        return hold(of[str(spec.kl_estimator)], spec.kl_clamp)

    if spec.kl_gradient == "importance_weighted":
        return r * estimate(x)
    if spec.kl_gradient == "straight_through":
        return estimate(x_sg) + x * x / 2 - x_sg * x_sg / 2
    return estimate(x)


# ---------------------------------------------------------------------------- the loss


@dataclass
class Result:
    """Of one evaluation: the loss, and per token that counts what the metrics are made of."""

    loss: float
    kept: list[int]
    views: dict[int, View]
    kls: dict[int, float]
    correction: Correction
    dropped: set[int]
    excluded: int


def own_aggregation(name: str, sequences: list[Floats]) -> float:
    """Of values by their own count."""
    sums = [sum(values) for values in sequences]
    over = {"token-mean": sum(map(len, sequences)), "token-sum": 1}.get(name, len(sequences))
    if name == "seq-mean-token-mean":
        sums = [mean(values) for values in sequences]
    return sum(sums) / max(over, 1)


def evaluate(
    c: Case,
    spec: LossSpec,
    lp: Floats,
    sg: Floats,
    entropy: Floats | None = None,
    normalizer: float | None = None,
    picked: Collection[int] = (),
) -> Result:
    """`picked`: the tokens that clip_cov drew."""
    old = sg if c.old is None else c.old
    A = advantages(c, spec)
    fix = correction(c, spec, old)
    excluded = fix.rejected if spec.rollout is not None and not spec.rollout.rejected_in_denominator else set()
    sequences = [[k for k in tokens if k not in excluded] for tokens in c.sequences]
    kept = [k for tokens in sequences for k in tokens]
    dropped = strays(c, sequences, spec, old, sg, A)
    if spec.objective == "kl_cov":
        cov = covariances(kept, sg, A)
        picked = sorted(cov, key=cov.__getitem__)[-number_picked(spec.kl_cov_fraction, kept) :]
    silent: set[int] = set()
    if spec.top_entropy_quantile < 1 and kept:
        threshold = quantile([entropy[k] for k in kept], 1 - spec.top_entropy_quantile)
        silent = {k for k in kept if entropy[k] < threshold}

    live = sum(1 for tokens in sequences if tokens)
    count = len(kept) if spec.aggregation == "token-mean" else live
    D = normalizer if normalizer is not None else max(count, 1)
    total, views, kls = 0.0, {}, {}
    for s, tokens in enumerate(sequences):
        own, own_sg = {k: lp[k] - old[k] for k in tokens}, {k: sg[k] - old[k] for k in tokens}
        for k in tokens:
            level, sums = str(spec.ratio_level), (sum(own.values()), sum(own_sg.values()))
            d, d_sg = {
                "token": (own[k], own_sg[k]),
                "sequence": (sums[0] / len(tokens), sums[1] / len(tokens)),
                "sequence_token": (lp[k] - sg[k] + sums[1] / len(tokens), sums[1] / len(tokens)),
                "sequence_sum": sums,
            }[level]
            if spec.objective == "gmpo":  # its ratio is that of the clipped log-ratios
                d = mean([clipped_log_ratio(own[j], A[j], spec) for j in tokens])
                d_sg = mean([clipped_log_ratio(own_sg[j], A[j], spec) for j in tokens])
            raw, d, d_sg = d_sg, hold(d, spec.log_ratio_clamp), hold(d_sg, spec.log_ratio_clamp)
            product = sum(hold(own_sg[j], spec.log_ratio_clamp) for j in tokens) + fix.log_weights[s]
            v = View(
                raw=raw,
                d=d,
                own=own_sg[k],
                r=math.exp(d),
                r_sg=math.exp(d_sg),
                lp=lp[k],
                sg=sg[k],
                old=old[k],
                A=A[k],
                log_w=clip(product, math.log(1e-8), 20.0),
                picked=k in picked,
            )
            views[k] = v
            factor = 1.0 if spec.objective == "vespo" else fix.weights[k]
            loss = 0.0 if k in fix.rejected | dropped | silent else factor * objective(v, spec)
            if c.ref is not None:
                kls[k] = kl(lp[k] - c.ref[k], sg[k] - c.ref[k], v.r, spec)
                loss += spec.kl_coef * kls[k] if spec.kl_coef else 0.0
            if spec.entropy_coef and spec.entropy_aggregation is None:
                loss -= spec.entropy_coef * entropy[k]
            weight = {
                "token-mean": 1 / D,
                "token-sum": 1.0,
                "seq-mean-token-mean": 1 / (len(tokens) * D),
                "seq-mean-token-sum": 1 / D,
                "seq-mean-token-sum-norm": 1 / (D * (spec.max_length or 1)),
            }[str(spec.aggregation)]
            total += weight * loss
    if spec.entropy_aggregation is not None:
        loud = [[entropy[k] for k in tokens if k not in silent] for tokens in sequences]
        total -= spec.entropy_coef * own_aggregation(str(spec.entropy_aggregation), [h for h in loud if h])
    return Result(total, kept, views, kls, fix, dropped, len(excluded))


# ---------------------------------------------------------------------------- metrics


def clipped(v: View, spec: LossSpec) -> tuple[bool, bool]:
    """At the lower, at the upper bound, on the side that A pushes the token to."""
    if spec.objective in ("dppo_tv", "dppo_kl"):
        return dppo_drops(v, spec)
    if spec.objective == "gmpo":
        low = -inf if spec.epsilon_low is None else -spec.epsilon_low
        high = inf if spec.epsilon_high is None else spec.epsilon_high
        return v.own < low and v.A < 0, v.own > high and v.A > 0
    low, high = bounds(spec)
    return v.r_sg < low and v.A < 0, v.r_sg > high and v.A > 0


def dual_clipped(v: View, spec: LossSpec) -> bool:
    return v.A < 0 and ppo_clip(v, spec.replace(dual_clip=None)) > -spec.dual_clip * v.A


def sample_size(values: Sequence[float]) -> float:
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / squares if squares else 0.0


def metrics(c: Case, spec: LossSpec, got: Result, entropy: Floats | None = None) -> dict[str, float]:
    """Every metric that has a meaning here, under its public name; 0 without a token that counts."""
    kept, bound = got.kept, spec.log_ratio_clamp
    views = [got.views[k] for k in kept]

    def average(values: Sequence[float]) -> float:
        return mean(values) if values else 0.0

    ratios = [v.r_sg for v in views]
    flags = [clipped(v, spec) for v in views]
    held = [abs(v.raw) > inf_if_none(bound) for v in views]
    if spec.kl_coef and spec.kl_estimator == "k3":
        held = [h or abs(v.sg - c.ref[k]) > inf_if_none(bound) for h, v, k in zip(held, views, kept, strict=True)]
    gone = (got.correction.rejected | got.dropped) & set(kept)
    everything = len(kept) + got.excluded
    out = {
        "clip_fraction_low": average([f[0] for f in flags]),
        "clip_fraction_high": average([f[1] for f in flags]),
        "clip_fraction": average([f[0] or f[1] for f in flags]),
        "clamped_fraction": average(held),
        "ratio_mean": average(ratios),
        "ratio_min": min(ratios, default=0.0),
        "ratio_max": max(ratios, default=0.0),
        "effective_sample_size": sample_size(ratios),
        "approx_kl": average([v.old - v.sg for v in views]),
        "approx_kl_k3": average([math.exp(-x) - 1 + x for x in (hold(v.old - v.sg, bound) for v in views)]),
        "ref_kl": average(list(got.kls.values())),
        "rollout_rejected_fraction": (got.excluded + len(gone)) / everything if everything else 0.0,
        "tokens": len(kept),
        "sequences": sum(1 for tokens in c.sequences if set(tokens) & set(kept)),
    }
    if spec.dual_clip is not None:
        out["dual_clip_fraction"] = average([dual_clipped(v, spec) for v in views])
    if entropy is not None:
        out["entropy"] = average([entropy[k] for k in kept])
    raw = [math.exp(hold(got.correction.gaps[k], bound)) for k in kept]
    weights = [got.correction.weights[k] for k in kept] if spec.rollout is not None or c.factors is not None else raw
    out["rollout_weight_mean"] = average(weights)
    out["rollout_effective_sample_size"] = sample_size(weights)
    out["rollout_chi2"] = average([w * w for w in raw]) - 1 if raw else 0.0
    return out


def inf_if_none(bound: float | None) -> float:
    return inf if bound is None else bound
