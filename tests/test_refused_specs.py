"""Promise 14 for plain data: every `LossSpec` and `RolloutCorrection` without a meaning is refused at construction, in a
message that begins with the field. One row per combination."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from fastrl import LossSpec
from fastrl import RolloutCorrection as RC
from fastrl.objectives import OBJECTIVES, OwnNumbers
from fastrl.options import RatioLevel

GMPO = {"objective": "gmpo", "ratio_level": "sequence"}
CLIP_COV = {"objective": "clip_cov", "seed": 0}
NORM = "seq-mean-token-sum-norm"


def fn(log_ratio, advantages):
    return log_ratio * advantages


SPECS = [
    # the fields of a LossSpec, the one that its message begins with, words of expectation or remedy
    ({"epsilon_high": -1.0}, "epsilon_high", "≥ 0"),
    ({"epsilon_high": -1.0, "epsilon_low": None, "objective": "cispo"}, "epsilon_high", "> -1"),
    ({"epsilon_high": -0.5, "objective": "cispo"}, "epsilon_high", "epsilon_low=None"),
    ({"epsilon_low": 1.5, "objective": "cispo"}, "epsilon_low", "at most 1"),
    ({"delta": 1.0}, "delta", "> 1"),
    ({"delta": 1.2}, "delta", "more than 1 + epsilon_high = 1.2"),
    ({"dual_clip": 0.5}, "dual_clip", "> 1"),
    ({"log_ratio_clamp": 0.0}, "log_ratio_clamp", "> 0"),
    ({"kl_clamp": 0.0, "kl_coef": 0.1}, "kl_clamp", "> 0"),
    ({"advantage_eps": -1e-4}, "advantage_eps", "≥ 0"),
    ({"entropy_coef": math.inf}, "entropy_coef", "finite"),
    ({"off_policy_threshold": math.nan}, "off_policy_threshold", "finite"),
    ({"top_entropy_quantile": -0.1}, "top_entropy_quantile", "≥ 0"),
    ({"top_entropy_quantile": 1.1}, "top_entropy_quantile", "fraction"),
    ({"max_length": 0, "aggregation": NORM}, "max_length", "positive int"),
    ({"max_length": True, "aggregation": NORM}, "max_length", "positive int"),
    ({"advantage_baseline": "length-weighted"}, "advantage_baseline", "group_advantages"),
    ({"entropy_aggregation": NORM, "entropy_coef": 0.1}, "entropy_aggregation", "'seq-mean-token-sum'"),
    ({"entropy_aggregation": "token-mean"}, "entropy_aggregation", "entropy_coef"),
    ({"entropy_aggregation": "mean", "entropy_coef": 0.1}, "entropy_aggregation", "'token-mean'"),
    ({"advantage_baseline": "median"}, "advantage_baseline", "'mean'"),
    ({"advantage_scale": "std"}, "advantage_scale", "'group'"),
    ({"kl_gradient": "detached", "kl_coef": 0.1}, "kl_gradient", "'plain'"),
    ({"kl_gradient": "straight_through"}, "kl_gradient", "kl_coef"),
    ({"kl_clamp": 1.0}, "kl_clamp", "kl_coef"),
    ({"kl_gradient": "importance_weighted", "kl_coef": 0.1, **GMPO}, "kl_gradient", "'straight_through'"),
    ({"objective": fn, "ratio_level": "sequence_token"}, "ratio_level", "'sequence'"),
    ({"objective": fn, "ratio_level": "sequence_sum"}, "ratio_level", "'sequence'"),
    ({"objective": fn, "dual_clip": 2.0}, "dual_clip", "inside the function"),
    ({"objective": fn, "dro_beta": 2.0}, "dro_beta", "inside the function"),
    ({"objective": fn, "seed": 1}, "seed", "'clip_cov'"),
    ({"objective": "clip_cov"}, "seed", "every step"),
    ({"seed": 1}, "seed", "leave it None"),
    ({**CLIP_COV, "clip_cov_low": -math.inf}, "clip_cov_low", "finite"),
    ({**CLIP_COV, "clip_cov_low": -1.0, "clip_cov_high": -2.0}, "clip_cov_low", "less than clip_cov_high"),
    ({**CLIP_COV, "clip_cov_low": 5.0}, "clip_cov_low", "less than clip_cov_high"),
    ({**CLIP_COV, "top_entropy_quantile": 0.5}, "top_entropy_quantile", "'ppo_clip'"),
    ({"objective": "kl_cov", "top_entropy_quantile": 0.5}, "top_entropy_quantile", "'ppo_clip'"),
    ({**GMPO, "top_entropy_quantile": 0.5}, "top_entropy_quantile", "one number per sequence"),
    ({**GMPO, "rollout": RC()}, "rollout", "level='sequence'"),
    ({**GMPO, "rollout": RC(level="sequence", reject="k1", reject_upper=1.0)}, "rollout", "reject_level"),
    ({**GMPO, "rollout": RC(level="geometric", second_moment=1.0)}, "rollout", "one number per sequence"),
    ({"ratio_level": "sequence_sum", "rollout": RC()}, "rollout", "'sequence_sum'"),
    ({"ratio_level": "sequence_sum", "rollout": RC(level=None, second_moment=1.0)}, "rollout", "'sequence_sum'"),
    ({"objective": "vespo", "rollout": RC(level="geometric")}, "rollout.level", "'token' or 'sequence'"),
    ({"objective": "vespo", "rollout": RC(normalize=True)}, "rollout", "normalize"),
    ({"objective": "vespo", "rollout": RC(second_moment=1.0)}, "rollout", "second_moment"),
    (
        {"objective": "vespo", "rollout": RC(mode="mask", upper=2.0, rejected_in_denominator=False)},
        "rollout",
        "rejected_in_denominator",
    ),
]


def unread():
    """Every number that an objective does not read, and every level at which it is not defined."""
    clipping = {"epsilon_low": 0.1, "epsilon_high": 0.1, "delta": 2.0, "dual_clip": 2.0}
    own = {field.name: 0.77 for field in dataclasses.fields(OwnNumbers)}
    for name, definition in OBJECTIVES.items():
        base = {"objective": name, "ratio_level": definition.levels[0]}
        base |= {"seed": 0} if name == "clip_cov" else {}
        for field, value in {**clipping, **own}.items():
            if field not in (*definition.reads, *definition.numbers):
                yield {**base, field: value}, field, "does not read it"
        for level in RatioLevel:
            if str(level) not in definition.levels:
                yield {**base, "ratio_level": str(level)}, "ratio_level", repr(definition.levels[0])
    for field in own:
        if field in ("clip_cov_low", "clip_cov_high"):  # bounds of a covariance, which has either sign
            continue
        reader = next(name for name, definition in OBJECTIVES.items() if field in definition.numbers)
        base = {"objective": reader, "ratio_level": OBJECTIVES[reader].levels[0], "seed": 0}
        yield {k: v for k, v in base.items() if k != "seed" or reader == "clip_cov"} | {field: 0.0}, field, "> 0"


CORRECTIONS = [
    # the fields of a RolloutCorrection, likewise
    ({"level": "word"}, "level", "'geometric'"),
    ({"mode": "clip"}, "mode", "'truncate'"),
    ({"reject": "k4"}, "reject", "'binary_kl'"),
    ({"reject": "k1", "reject_upper": 1.0, "reject_level": "sequence"}, "reject_level", "'sequence-mean'"),
    ({"lower": -0.1}, "lower", "≥ 0"),
    ({"upper": 0.0}, "upper", "> 0"),
    ({"upper": math.inf}, "upper", "finite"),
    ({"reject": "k1", "reject_lower": math.nan}, "reject_lower", "finite"),
    ({"reject": "k1", "reject_upper": math.inf}, "reject_upper", "finite"),
    ({"second_moment": 0.0}, "second_moment", "> 0"),
    ({"lower": 2.0, "upper": 1.0}, "lower", "upper = 1.0"),
    ({"reject": "k1", "reject_lower": 2.0, "reject_upper": 1.0}, "reject_lower", "reject_upper = 1.0"),
    ({"level": None, "upper": 2.0, "second_moment": 1.0}, "level", "leave mode"),
    ({"level": None, "lower": 0.5, "second_moment": 1.0}, "level", "leave mode"),
    ({"level": None, "normalize": True, "second_moment": 1.0}, "level", "normalise"),
    ({"level": None, "mode": "mask", "second_moment": 1.0}, "level", "mask"),
    ({"level": None}, "level", "rollout=None"),
    ({"mode": "mask"}, "mode", "upper=3.0"),
    ({"reject_upper": 1.0}, "reject", "reject='k3'"),
    ({"reject_lower": 1.0}, "reject", "reject='k3'"),
    ({"reject_level": "sequence-sum"}, "reject", "reject='k3'"),
    ({"reject": "k1"}, "reject", "reject_upper=0.1"),
    ({"rejected_in_denominator": False}, "rejected_in_denominator", "mode='mask'"),
]


@pytest.mark.parametrize(("fields", "name", "words"), [*SPECS, *unread()])
def test_refused_specs(fields, name, words):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: ") as caught:
        LossSpec(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(("fields", "name", "words"), CORRECTIONS)
def test_refused_corrections(fields, name, words):
    with pytest.raises(ValueError, match=rf"^rollout\.{name}: ") as caught:
        RC(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "fields", "name"),
    [
        (LossSpec, {"kl_coef": "0.1"}, "kl_coef"),
        (LossSpec, {"dual_clip": True}, "dual_clip"),
        (LossSpec, {"top_entropy_quantile": None}, "top_entropy_quantile"),
        (LossSpec, {"off_policy_threshold": "0"}, "off_policy_threshold"),
        (LossSpec, {"objective": "clip_cov", "seed": 1.0}, "seed"),
        (LossSpec, {"objective": "clip_cov", "seed": True}, "seed"),
        (LossSpec, {"rollout": "token"}, "rollout"),
        (RC, {"upper": "2"}, "rollout.upper"),
        (RC, {"second_moment": True}, "rollout.second_moment"),
        (RC, {"normalize": 1}, "rollout.normalize"),
        (RC, {"rejected_in_denominator": None}, "rollout.rejected_in_denominator"),
    ],
)
def test_wrong_types_of_fields(make, fields, name):
    with pytest.raises(TypeError, match=rf"^{re.escape(name)}: .*got"):
        make(**fields)
