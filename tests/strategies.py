"""Hypothesis strategies over the whole of `LossSpec`; every combination that it refuses is left out by construction."""

from __future__ import annotations

from hypothesis import strategies as st

import fastrl
from fastrl import LossSpec, RolloutCorrection
from fastrl.objectives import OBJECTIVES

maybe = st.booleans()

# Values that the numbers of an objective may take, besides their defaults. No data of the tests lie on a bound.
NUMBERS = {
    "epsilon_low": [None, 0.0, 0.2, 1.0],
    "epsilon_high": [None, 0.0, 0.3],
    "delta": [None, 1.5],
    "dual_clip": [None, 1.3],
    "sapo_temperature_positive": [1.0, 0.5],
    "sapo_temperature_negative": [1.05, 3.0],
    "vespo_k_positive": [2.0, 1.0],
    "vespo_lambda_positive": [3.0, 0.7],
    "vespo_k_negative": [3.0, 1.5],
    "vespo_lambda_negative": [2.0, 0.4],
    "dppo_ratio_cap": [20.0, 1.1],
    "topr_ratio_cap": [1.0, 0.8],
    "dro_beta": [0.1, 2.0],
    "clip_cov_fraction": [2e-4, 0.3],
    "clip_cov_low": [1.0, 1e-3],
    "clip_cov_high": [5.0, 1.7],
    "kl_cov_fraction": [2e-4, 0.3],
    "kl_cov_coef": [1.0, 0.2],
}


def custom(log_ratio, advantages):
    return -advantages * (log_ratio + log_ratio**3)


def bound(draw, low, high):
    """(lower, upper), not both absent."""
    return draw(st.sampled_from([(low, None), (None, high), (low, high)]))


@st.composite
def corrections(draw, objective, ratio_level):
    """A RolloutCorrection that fits; log ρ of the data is about ±0.1."""
    whole = objective == "gmpo" or ratio_level == "sequence_sum"
    vespo = objective == "vespo"
    levels = ["sequence"] + ["geometric"] * (not vespo) + ["token"] * (not whole)
    rejects = draw(maybe)
    moment = not (whole or vespo) and draw(st.integers(0, 3)) == 0
    given = {"level": draw(st.sampled_from(levels + [None] * (rejects or moment)))}
    if given["level"] is not None:
        given["mode"] = draw(st.sampled_from(["truncate", "mask"]))
        if given["mode"] == "mask" or draw(maybe):
            given["lower"], given["upper"] = bound(draw, 0.93, 1.08)
        given["normalize"] = not vespo and draw(st.integers(0, 3)) == 0
    if rejects:
        kind = draw(st.sampled_from(["k1", "k2", "k3", "tv", "binary_kl"]))
        low, high = {"k1": (-0.09, 0.11), "tv": (1e-4, 0.02)}.get(kind, (1e-5, 0.0061))
        given["reject"] = kind
        given["reject_level"] = draw(
            st.sampled_from(["sequence-mean", "sequence-sum", "sequence-max"] + ["token"] * (not whole))
        )
        given["reject_lower"], given["reject_upper"] = bound(draw, low, high)
    if moment:
        given["second_moment"] = draw(st.sampled_from([0.004, 0.02]))
    if rejects or moment or given.get("mode") == "mask":
        given["rejected_in_denominator"] = vespo or draw(st.integers(0, 2)) > 0
    return RolloutCorrection(**given)


@st.composite
def specs(draw, *, with_custom=False):
    """Any LossSpec."""
    names = list(OBJECTIVES) + [custom] * with_custom
    objective = draw(st.sampled_from(names))
    definition = None if objective is custom else OBJECTIVES[objective]
    reads = () if definition is None else (*definition.reads, *definition.numbers)
    given = {name: draw(st.sampled_from(NUMBERS[name])) for name in reads}
    level = draw(st.sampled_from(("token", "sequence") if definition is None else definition.levels))
    picks = objective in ("clip_cov", "kl_cov")
    if objective == "clip_cov":
        given["seed"] = draw(st.integers(0, 5))
    if given.get("epsilon_high") is not None and objective.startswith("dppo"):
        given["epsilon_high"] = draw(st.sampled_from([0.003, 0.05]))
    if given.get("epsilon_low") is not None and objective.startswith("dppo"):
        given["epsilon_low"] = draw(st.sampled_from([0.002, 0.04]))
    aggregation = draw(st.sampled_from([str(a) for a in fastrl.options.Aggregation]))
    if draw(maybe):
        gradients = ["plain", "straight_through"] + ["importance_weighted"] * (objective != "gmpo")
        given["kl_coef"] = 0.2
        given["kl_estimator"] = draw(st.sampled_from(["k1", "abs", "k2", "k3"]))
        given["kl_gradient"] = draw(st.sampled_from(gradients))
        given["kl_clamp"] = draw(st.sampled_from([None, 0.1]))
    if draw(maybe):
        given["rollout"] = draw(corrections(objective, level))
    if not (picks or objective == "gmpo") and draw(st.integers(0, 3)) == 0:
        given["top_entropy_quantile"] = draw(st.sampled_from([0.0, 0.2, 0.51, 0.8]))
    given["entropy_coef"] = draw(st.sampled_from([0.0, 0.1, -0.05]))
    if given["entropy_coef"] and draw(maybe):
        own = [str(a) for a in fastrl.options.Aggregation if not a.endswith("norm")]
        given["entropy_aggregation"] = draw(st.sampled_from(own))
    return LossSpec(
        objective=objective,
        ratio_level=level,
        log_ratio_clamp=draw(st.sampled_from([None, 0.5, 20.0])),
        off_policy_threshold=draw(st.sampled_from([None, None, 0.013, -0.017])),
        aggregation=aggregation,
        max_length=7 if aggregation.endswith("norm") else None,
        advantage_baseline=draw(st.sampled_from(["mean", "leave-one-out", "none"])),
        advantage_scale=draw(st.sampled_from(["group", "batch", "none"])),
        **given,
    )
