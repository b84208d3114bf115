"""What a `LossSpec` refuses: values out of range, and combinations without a meaning. Checked once, at construction."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from fastrl.objectives import OBJECTIVES, OwnNumbers
from fastrl.options import (
    AdvantageBaseline,
    Aggregation,
    CorrectionLevel,
    DivergenceLevel,
    KLEstimator,
    KLGradient,
    RatioLevel,
    check_number,
)
from fastrl.registry import Definition
from fastrl.rollout_correction import RolloutCorrection

if TYPE_CHECKING:
    from fastrl.spec import LossSpec


def check(spec: LossSpec) -> None:
    """Raise ValueError or TypeError, naming the field, for any value or combination without a meaning."""
    _numbers(spec)
    _combinations(spec)


def _numbers(spec: LossSpec) -> None:
    check_number("epsilon_low", spec.epsilon_low, 0.0, optional=True)
    caps = spec.objective == "cispo"  # its upper bound caps a weight, at any positive number; a clip range holds 1
    check_number("epsilon_high", spec.epsilon_high, -1.0 if caps else 0.0, inclusive=not caps, optional=True)
    for name in ("delta", "dual_clip"):
        check_number(name, getattr(spec, name), 1.0, inclusive=False, optional=True)
    for name in ("log_ratio_clamp", "kl_clamp"):
        check_number(name, getattr(spec, name), 0.0, inclusive=False, optional=True)
    for name in ("kl_coef", "advantage_eps"):
        check_number(name, getattr(spec, name), 0.0)
    check_number("entropy_coef", spec.entropy_coef, -math.inf)
    check_number("off_policy_threshold", spec.off_policy_threshold, -math.inf, optional=True)
    check_number("top_entropy_quantile", spec.top_entropy_quantile, 0.0)
    for field in dataclasses.fields(OwnNumbers):
        lowest = -math.inf if field.name in ("clip_cov_low", "clip_cov_high") else 0.0
        check_number(field.name, getattr(spec, field.name), lowest, inclusive=False)
    if spec.top_entropy_quantile > 1:
        raise ValueError(f"top_entropy_quantile: expected a fraction from 0 to 1, got {spec.top_entropy_quantile!r}")
    if spec.log_ratio_clamp is not None and spec.log_ratio_clamp > 80:
        raise ValueError(
            f"log_ratio_clamp: expected at most 80 (exp overflows float32 above 88), got {spec.log_ratio_clamp!r};"
            " use None to leave the ratio unbounded"
        )
    if spec.seed is not None and (isinstance(spec.seed, bool) or not isinstance(spec.seed, int)):
        raise TypeError(f"seed: expected an int or None, got {spec.seed!r}")


def _combinations(spec: LossSpec) -> None:
    _aggregation(spec)
    if spec.definition is None:
        _reads(spec, "a custom objective does its own clipping", (), "clip inside the function")
        if spec.ratio_level not in (RatioLevel.TOKEN, RatioLevel.SEQUENCE):
            raise ValueError(
                f"ratio_level: a custom objective takes 'token' or 'sequence', got {str(spec.ratio_level)!r}"
            )
    else:
        _objective(spec, spec.definition)
    if spec.delta is not None and spec.epsilon_high is not None and spec.delta <= 1 + spec.epsilon_high:
        raise ValueError(
            f"delta: expected more than 1 + epsilon_high = {1 + spec.epsilon_high:g} (it is a raw bound on the "
            f"ratio, beyond the clip range), got {spec.delta!r}"
        )
    if spec.objective != "clip_cov" and spec.seed is not None:
        raise ValueError(f"seed: only objective 'clip_cov' draws at random, got {spec.seed!r}; leave it None")
    _kl(spec)
    _rollout(spec)


def _aggregation(spec: LossSpec) -> None:
    if spec.entropy_aggregation == Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
        raise ValueError(
            "entropy_aggregation: 'seq-mean-token-sum-norm' has no length of its own to divide by; use "
            "'seq-mean-token-sum' and divide entropy_coef"
        )
    if spec.entropy_aggregation is not None and not spec.entropy_coef:
        raise ValueError(
            f"entropy_aggregation: {str(spec.entropy_aggregation)!r} has no effect while entropy_coef is 0; set "
            "entropy_coef or leave it None"
        )
    if spec.aggregation == Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
        if isinstance(spec.max_length, bool) or not isinstance(spec.max_length, int) or spec.max_length < 1:
            raise ValueError(
                "max_length: aggregation 'seq-mean-token-sum-norm' needs a positive int (the longest completion, "
                f"in tokens), got {spec.max_length!r}; e.g. LossSpec.preset('dr_grpo', max_length=1024)"
            )
    elif spec.max_length is not None:
        raise ValueError(
            f"max_length: only aggregation 'seq-mean-token-sum-norm' divides by it, got {spec.max_length!r} with "
            f"aggregation {str(spec.aggregation)!r}; leave it None"
        )
    if spec.advantage_baseline == AdvantageBaseline.LENGTH_WEIGHTED:
        raise ValueError(
            "advantage_baseline: 'length-weighted' needs the lengths of the whole group, which a loss on a "
            "micro-batch does not have; use group_advantages(rewards, ..., baseline='length-weighted', "
            "lengths=...) and pass Rollouts(advantages=...)"
        )


def _objective(spec: LossSpec, definition: Definition) -> None:
    name = str(spec.objective)
    _reads(spec, f"objective {name!r} does not read it", (*definition.reads, *definition.numbers))
    if str(spec.ratio_level) not in definition.levels:
        levels = " or ".join(map(repr, definition.levels))
        raise ValueError(
            f"ratio_level: objective {name!r} is defined at {levels}, got {str(spec.ratio_level)!r}; use that, or "
            "another objective"
        )
    if spec.epsilon_low is not None and spec.epsilon_low > 1 and definition.centre == 1:
        raise ValueError(
            f"epsilon_low: expected an offset from 1 of at most 1, got {spec.epsilon_low!r};"
            " use None for no lower bound"
        )
    if None not in (spec.epsilon_low, spec.epsilon_high) and spec.epsilon_high < -spec.epsilon_low:
        raise ValueError(
            f"epsilon_high: expected an upper bound of at least the lower one, 1 - epsilon_low = "
            f"{1 - spec.epsilon_low:g}, got 1 + {spec.epsilon_high!r}; set epsilon_low=None"
        )
    if name == "clip_cov" and spec.seed is None:
        raise ValueError(
            "seed: objective 'clip_cov' draws tokens at random and needs an int, got None; change it every step: "
            "spec.replace(seed=step)"
        )
    if definition.selects and spec.top_entropy_quantile < 1:
        raise ValueError(
            f"top_entropy_quantile: objective {name!r} picks tokens by itself, got {spec.top_entropy_quantile!r}; "
            "use objective 'ppo_clip' with it"
        )
    if name == "gmpo" and spec.top_entropy_quantile < 1:
        raise ValueError(
            f"top_entropy_quantile: undefined with objective 'gmpo', whose loss is one number per sequence, got "
            f"{spec.top_entropy_quantile!r}; leave it 1"
        )
    if name == "clip_cov" and spec.clip_cov_low >= spec.clip_cov_high:
        raise ValueError(
            f"clip_cov_low: expected less than clip_cov_high = {spec.clip_cov_high!r}, got {spec.clip_cov_low!r}"
        )


def _reads(spec: LossSpec, why: str, reads: tuple[str, ...], remedy: str = "") -> None:
    """A number that the objective does not read must stay at its default."""
    clipping = ("epsilon_low", "epsilon_high", "delta", "dual_clip")
    own = tuple(field.name for field in dataclasses.fields(OwnNumbers))
    defaults = {field.name: field.default for field in dataclasses.fields(spec)}
    for name in (*clipping, *own):
        if name not in reads and getattr(spec, name) != defaults[name]:
            readers = [key for key, other in OBJECTIVES.items() if name in (*other.reads, *other.numbers)]
            raise ValueError(
                f"{name}: {why}, got {getattr(spec, name)!r}; leave it at its default {defaults[name]!r}, "
                f"{remedy or 'or use objective ' + ' or '.join(map(repr, readers))}"
            )


def _kl(spec: LossSpec) -> None:
    if spec.kl_coef == 0:
        for name, default in (
            ("kl_estimator", KLEstimator.K3),
            ("kl_gradient", KLGradient.PLAIN),
            ("kl_clamp", None),
        ):
            if getattr(spec, name) != default:
                value = getattr(spec, name)
                shown = repr(str(value)) if isinstance(value, str) else repr(value)
                raise ValueError(f"{name}: {shown} has no effect while kl_coef is 0; set kl_coef or leave it")
    if spec.kl_gradient == KLGradient.IMPORTANCE_WEIGHTED and spec.objective == "gmpo":
        raise ValueError(
            "kl_gradient: 'importance_weighted' is undefined with objective 'gmpo', whose ratio is clipped token "
            "by token; use 'plain' or 'straight_through'"
        )


def _rollout(spec: LossSpec) -> None:
    if spec.rollout is None:
        return
    if not isinstance(spec.rollout, RolloutCorrection):
        raise TypeError(f"rollout: expected a fastrl.RolloutCorrection or None, got {spec.rollout!r}")
    by_token = spec.rollout.level == CorrectionLevel.TOKEN or (
        spec.rollout.reject is not None and spec.rollout.reject_level == DivergenceLevel.TOKEN
    )
    whole = spec.objective == "gmpo" or spec.ratio_level == RatioLevel.SEQUENCE_SUM
    if whole and (by_token or spec.rollout.second_moment is not None):
        what = "objective 'gmpo'" if spec.objective == "gmpo" else "ratio_level 'sequence_sum'"
        raise ValueError(
            f"rollout: a weight per token is undefined with {what}, whose loss is one number per sequence; use "
            "level='sequence' or 'geometric', and a reject_level of sequences"
        )
    if spec.objective == "vespo" and spec.rollout.level == CorrectionLevel.GEOMETRIC:
        raise ValueError(
            "rollout.level: objective 'vespo' folds the weight into its product of ratios, got 'geometric'; "
            "use 'token' or 'sequence'"
        )
    if spec.objective == "vespo" and spec.rollout.by_batch:
        raise ValueError(
            "rollout: objective 'vespo' folds each sequence's weights in; leave normalize, second_moment and "
            "rejected_in_denominator at their defaults"
        )
