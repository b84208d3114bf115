"""From TRL's options to a `LossSpec`: by the value of every option, read from a trainer when the loss is taken."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

from fastrl.adapters.trl.fields import check_fields
from fastrl.options import Aggregation, KLGradient, RatioLevel
from fastrl.spec import LossSpec

logger = logging.getLogger("fastrl")

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_AGGREGATIONS = {
    "grpo": Aggregation.SEQ_MEAN_TOKEN_MEAN,
    "bnpo": Aggregation.TOKEN_MEAN,
    "dr_grpo": Aggregation.SEQ_MEAN_TOKEN_SUM_NORM,
    "dapo": Aggregation.TOKEN_MEAN,
    "luspo": Aggregation.SEQ_MEAN_TOKEN_SUM,
    "cispo": Aggregation.TOKEN_MEAN,
    "sapo": Aggregation.SEQ_MEAN_TOKEN_MEAN,
    "vespo": Aggregation.TOKEN_MEAN,
}
_LEVELS = ("token", "sequence")
# Our names in messages of `LossSpec`, and the option of TRL that they come from.
_NAMES = {
    "epsilon_low": "epsilon",
    "kl_coef": "beta",
    "off_policy_threshold": "off_policy_mask_threshold",
    "sapo_temperature_positive": "sapo_temperature_pos",
    "sapo_temperature_negative": "sapo_temperature_neg",
    "vespo_k_positive": "vespo_k_pos",
    "vespo_lambda_positive": "vespo_lambda_pos",
    "vespo_k_negative": "vespo_k_neg",
    "vespo_lambda_negative": "vespo_lambda_neg",
    "max_length": "max_completion_length",
}


def refuse(name: str, value: Any, remedy: str) -> None:
    """Raise the ValueError of an option that this adapter does not honour."""
    raise ValueError(f"{name}: fastrl.adapters.trl does not honour {value!r}; {remedy}")


class Options(NamedTuple):
    """Every option that decides the GRPO loss, under TRL's names; `entropy_coef` as it multiplies the mean entropy."""

    loss_type: str
    importance_sampling_level: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    use_bias_correction_kl: bool
    entropy_coef: float
    top_entropy_quantile: float
    off_policy_mask_threshold: float | None
    max_completion_length: int
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float


_IN_ARGUMENTS = {"delta", "use_bias_correction_kl", *(n for n in Options._fields if n.startswith(("sapo", "vespo")))}


def spec_from_config(args: Any) -> LossSpec:
    """The `LossSpec` of a `GRPOConfig` or `RLOOConfig`, as it is at the first step with one accumulation step.

    loss_type, importance_sampling_level, epsilon, epsilon_high, delta, beta, use_bias_correction_kl, entropy_coef,
    top_entropy_quantile, off_policy_mask_threshold, sapo_*, vespo_* and max_completion_length (dr_grpo) are in it.
    The denominator, the temperature, vLLM's importance ratio and the router loss are arguments of the call. The
    log-ratio is held to ±20 before exp, which TRL does not do; inside the bound the loss is the same.

    Raises:
        ValueError: a field that this adapter does not know or a value that it does not honour, named.
    """
    kind = "GRPO" if hasattr(args, "loss_type") else "RLOO"
    check_fields(args, kind)
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if kind == "RLOO":
        return rloo_spec(args.epsilon, high)
    read = {name: getattr(args, name) for name in Options._fields if name not in ("epsilon_low", "epsilon_high")}
    if args.use_adaptive_entropy:  # no bonus before an entropy was measured
        read["entropy_coef"] = 0.0
    return grpo_spec(Options(epsilon_low=args.epsilon, epsilon_high=high, **read))


def options_of(trainer: Any, accumulation: float) -> Options:
    """The options of a `GRPOTrainer` as they stand, each from where TRL's own loss reads it."""
    read = {
        name: getattr(trainer.args if name in _IN_ARGUMENTS else trainer, name)
        for name in Options._fields
        if name != "entropy_coef"
    }
    return Options(entropy_coef=entropy_coef(trainer) / accumulation, **read)


def entropy_coef(trainer: Any) -> float:
    """The coefficient that multiplies the mean entropy in this step: 0 while the adaptive bonus is switched off."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if trainer.use_adaptive_entropy and not trainer._last_world_entropy <= trainer.args.entropy_target:
        return 0.0
    return trainer.entropy_coef


def _named_as_in_trl(build: Any) -> Any:
    """`LossSpec`'s refusals under the names of TRL's options; the specs of past options are kept."""

    @functools.lru_cache(maxsize=64)
    @functools.wraps(build)
    def wrapped(*options: Any) -> LossSpec:
        try:
            return build(*options)
        except (ValueError, TypeError) as error:
            name, colon, rest = str(error).partition(":")
            raise type(error)(f"{_NAMES.get(name, name)}{colon}{rest}") from None

    return wrapped


def _lower(epsilon: float) -> float | None:
    """A bound below 0 is none: no ratio is negative."""
    return None if isinstance(epsilon, float | int) and epsilon > 1 else epsilon


def _upper(bound: float | None) -> float | None:
    """Infinity is no bound."""
    return None if bound == math.inf else bound


@_named_as_in_trl
def grpo_spec(options: Options) -> LossSpec:
    """The spec of these options."""
    o = options
    if o.loss_type not in _AGGREGATIONS:
        refuse("loss_type", o.loss_type, f"use one of {', '.join(map(repr, _AGGREGATIONS))}")
    if o.importance_sampling_level not in _LEVELS:
        refuse("importance_sampling_level", o.importance_sampling_level, "use 'token' or 'sequence'")
    spec: dict[str, Any] = {"aggregation": _AGGREGATIONS[o.loss_type], "kl_coef": o.beta}
    spec |= {"ratio_level": o.importance_sampling_level, "top_entropy_quantile": o.top_entropy_quantile}
    spec |= {"off_policy_threshold": o.off_policy_mask_threshold, **_objective(o)}
    if o.loss_type == "dr_grpo":
        spec["max_length"] = o.max_completion_length
    if o.beta and o.use_bias_correction_kl:
        spec["kl_gradient"] = KLGradient.IMPORTANCE_WEIGHTED
    if o.entropy_coef:
        spec |= {"entropy_coef": o.entropy_coef, "entropy_aggregation": Aggregation.TOKEN_MEAN}
    return LossSpec(**spec)


def _objective(o: Options) -> dict[str, Any]:
    """The objective and its own numbers. TRL reads delta and epsilon only where its loss clips."""
    high = _upper(o.epsilon_high)
    if o.loss_type in _CLIPPED:
        return {"epsilon_low": _lower(o.epsilon_low), "epsilon_high": high, "delta": _upper(o.delta)}
    if o.delta is not None:
        _say_delta_is_not_read(o.loss_type)
    if o.loss_type == "cispo":  # its epsilon_high is the bound itself
        return {"objective": "cispo", "epsilon_low": None, "epsilon_high": None if high is None else high - 1}
    if o.loss_type == "sapo":
        return {
            "objective": "sapo",
            "sapo_temperature_positive": o.sapo_temperature_pos,
            "sapo_temperature_negative": o.sapo_temperature_neg,
        }
    return {
        "objective": "vespo",
        "vespo_k_positive": o.vespo_k_pos,
        "vespo_lambda_positive": max(o.vespo_lambda_pos, 1e-4),  # as TRL
        "vespo_k_negative": o.vespo_k_neg,
        "vespo_lambda_negative": max(o.vespo_lambda_neg, 1e-4),
    }


@functools.cache
def _say_delta_is_not_read(loss_type: str) -> None:
    logger.warning("delta has no effect with loss_type %r, in TRL's loss and in this one", loss_type)


@_named_as_in_trl
def rloo_spec(epsilon_low: float, epsilon_high: float) -> LossSpec:
    """One ratio for a whole completion, its KL in the reward, the mean over sequences."""
    return LossSpec(
        ratio_level=RatioLevel.SEQUENCE_SUM,
        epsilon_low=_lower(epsilon_low),
        epsilon_high=_upper(epsilon_high),
        aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
    )
