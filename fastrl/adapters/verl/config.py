"""verl's `ActorConfig` as a `LossSpec`, one mapping per loss mode of verl 0.9.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrl.adapters._config import Options
from fastrl.adapters._spec import lower_bound, named_spec
from fastrl.options import Aggregation
from fastrl.spec import LossSpec

PREFIX = "fastrl_"
_OWN_LOSS = "set policy_loss.loss_mode to verl's own mode, without 'fastrl_'"

ACTOR = Options(
    framework="verl 0.9.1's ActorConfig",
    honoured={
        "clip_ratio": 0.2,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.2,
        "clip_ratio_c": 3.0,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "loss_agg_mode": "token-mean",
        "loss_scale_factor": None,
        "policy_loss": None,
        "global_batch_info": None,
    },
    elsewhere=frozenset({
        # read by verl's `ppo_loss` around the policy loss
        "entropy_coeff", "calculate_entropy", "use_kl_loss", "kl_loss_coef", "kl_loss_type",
        # batches, model, optimiser, engine
        "_target_", "strategy", "ppo_mini_batch_size", "ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu",
        "ppo_infer_micro_batch_size_per_gpu", "use_dynamic_bsz", "ppo_max_token_len_per_gpu",
        "ppo_infer_max_token_len_per_gpu", "freeze_vision_tower", "calculate_sum_pi_squared", "use_prefix_grouper",
        "use_torch_compile", "ppo_epochs", "shuffle", "data_loader_seed", "checkpoint", "optim", "use_fused_kernels",
        "profiler", "profile", "engine", "rollout_n", "model_config", "qat", "grad_clip", "fsdp_config", "megatron",
        "veomni", "torchtitan", "ulysses_sequence_parallel_size", "entropy_from_logits_with_chunking",
        "entropy_from_logits_chunk_size", "entropy_checkpointing", "pad_to_length", "use_remove_padding",
        "use_rollout_log_probs",
        # of DistillationLossConfig, which stands in for the ActorConfig under distillation by policy gradient
        "loss_mode", "topk", "use_task_rewards", "distillation_loss_coef", "loss_max_clamp", "log_prob_min_clamp",
        "use_chunked_topk", "chunked_topk_chunk_size", "use_policy_gradient", "policy_loss_mode", "loss_settings",
    }),
    own_loss=_OWN_LOSS,
)  # fmt: skip

POLICY = Options(
    framework="verl 0.9.1's PolicyLossConfig",
    honoured={
        "loss_mode": "vanilla",
        "clip_cov_ratio": 0.0002,
        "clip_cov_lb": 1.0,
        "clip_cov_ub": 5.0,
        "kl_cov_ratio": 0.0002,
        "ppo_kl_coef": 0.1,
        "dro_beta": None,
        "rollout_correction": None,
    },
    elsewhere=frozenset({"_target_"}),
    own_loss=_OWN_LOSS,
)

ROLLOUT_CORRECTION = Options(
    framework="verl 0.9.1's RolloutCorrectionConfig",
    honoured={
        "rollout_is": None,
        "rollout_is_threshold": 2.0,
        "rollout_is_batch_normalize": False,
        "rollout_rs": None,
        "rollout_rs_threshold": None,
        "loss_type": "ppo_clip",
    },
    elsewhere=frozenset({"_target_", "bypass_mode"}),
    own_loss=_OWN_LOSS,
)

_NAMES = {
    "epsilon_low": "clip_ratio_low",
    "epsilon_high": "clip_ratio_high",
    "dual_clip": "clip_ratio_c",
    "dppo_ratio_cap": "clip_ratio_c",
    "sapo_temperature_positive": "tau_pos",
    "sapo_temperature_negative": "tau_neg",
    "dro_beta": "policy_loss.dro_beta",
    "clip_cov_fraction": "policy_loss.clip_cov_ratio",
    "clip_cov_low": "policy_loss.clip_cov_lb",
    "clip_cov_high": "policy_loss.clip_cov_ub",
    "kl_cov_fraction": "policy_loss.kl_cov_ratio",
    "kl_cov_coef": "policy_loss.ppo_kl_coef",
    "aggregation": "loss_agg_mode",
    "max_length": "loss_scale_factor",
}

_Values = dict[str, Any]


def _bounds(o: _Values) -> _Values:
    """Bounds of a divergence or of a log-ratio, as they are."""
    low, high = (o["clip_ratio"] if o[name] is None else o[name] for name in ("clip_ratio_low", "clip_ratio_high"))
    return {"epsilon_low": low, "epsilon_high": high}


def _clip(o: _Values) -> _Values:
    """Bounds of a ratio, as offsets from 1."""
    bounds = _bounds(o)
    return {**bounds, "epsilon_low": lower_bound(bounds["epsilon_low"])}


def _dro(o: _Values) -> _Values:
    if o["dro_beta"] is None:
        POLICY.refuse("dro_beta", None, "set policy_loss.dro_beta to a positive number, as loss_mode 'dro' needs it")
    return {"objective": "dro", "dro_beta": o["dro_beta"], "log_ratio_clamp": None}


def _clip_cov(o: _Values) -> _Values:
    numbers = {"fraction": "clip_cov_ratio", "low": "clip_cov_lb", "high": "clip_cov_ub"}
    filled = {f"clip_cov_{k}": POLICY.honoured[v] if o[v] is None else o[v] for k, v in numbers.items()}
    return {"objective": "clip_cov", "seed": o["seed"], "log_ratio_clamp": None, **filled, **_clip(o)}


def _kl_cov(o: _Values) -> _Values:
    coef = 1.0 if o["ppo_kl_coef"] is None else o["ppo_kl_coef"]
    if coef == 0:  # then no token is penalised
        return {"objective": "importance_sampling", "log_ratio_clamp": None}
    fraction = POLICY.honoured["kl_cov_ratio"] if o["kl_cov_ratio"] is None else o["kl_cov_ratio"]
    return {"objective": "kl_cov", "kl_cov_fraction": fraction, "kl_cov_coef": coef, "log_ratio_clamp": None}


MODES: dict[str, Callable[[_Values], _Values]] = {
    "vanilla": lambda o: {"dual_clip": o["clip_ratio_c"], **_clip(o)},
    "dppo_tv": lambda o: {"objective": "dppo_tv", "dppo_ratio_cap": o["clip_ratio_c"], **_bounds(o)},
    "dppo_kl": lambda o: {"objective": "dppo_kl", "dppo_ratio_cap": o["clip_ratio_c"], **_bounds(o)},
    # verl holds the sequence's mean log-ratio below 10 only; ours to ±10
    "gspo": lambda o: {"ratio_level": "sequence_token", "log_ratio_clamp": 10.0, **_clip(o)},
    "sapo": lambda o: {
        "objective": "sapo",
        "sapo_temperature_positive": o["tau_pos"],
        "sapo_temperature_negative": o["tau_neg"],
    },
    "gpg": lambda o: {"objective": "reinforce"},
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    "geo_mean": lambda o: {"objective": "gmpo", "ratio_level": "sequence", "log_ratio_clamp": None, **_bounds(o)},
    "dro": _dro,
    "cispo": lambda o: {"objective": "cispo", **_clip(o)},
}
"""What each of verl's loss modes is, from the fields of its configs; verl's name without `fastrl_`."""

BYPASS = "bypass_mode"
_BYPASS = {"ppo_clip": "vanilla", "reinforce": "gpg"}
_FIXED = {"sapo": Aggregation.SEQ_MEAN_TOKEN_MEAN, "geo_mean": Aggregation.SEQ_MEAN_TOKEN_MEAN}
"""Modes that aggregate in one way, whatever loss_agg_mode says."""


def read(config: Any) -> _Values:
    """The fields that shape a policy loss, of the actor's config and the two inside it, every one checked.

    Raises:
        ValueError: an unknown field, named.
    """
    if config is None:
        ACTOR.refuse("config", None, "pass verl's ActorConfig")
    values = ACTOR.read(config)
    policy = POLICY.read(values.pop("policy_loss"))
    correction = ROLLOUT_CORRECTION.read(policy["rollout_correction"])
    return {**values, **policy, **correction}


def inner_mode(mode: str, values: _Values) -> str:
    """The mode whose loss `mode` is: itself, or what bypass mode dispatches to."""
    if mode == BYPASS:
        if values["rollout_correction"] is None:
            POLICY.refuse("rollout_correction", None, "set it, as loss_mode 'bypass_mode' needs it")
        return ROLLOUT_CORRECTION.choose("loss_type", values["loss_type"], _BYPASS)
    return POLICY.choose("loss_mode", mode, {name: name for name in MODES})


def aggregation_of(mode: str, loss_agg_mode: str) -> str:
    """How this mode adds up its tokens."""
    return _FIXED.get(mode, loss_agg_mode)


def build(mode: str, values: _Values, aggregation: str, length: int, seed: int | None) -> LossSpec:
    """The spec of an inner mode. `length`: the constant of seq-mean-token-sum-norm, read by no other aggregation."""
    if aggregation == Aggregation.TOKEN_SUM:  # times dp_size, which the normaliser of a mean can say
        aggregation = Aggregation.TOKEN_MEAN
    fields = MODES[mode]({**values, "seed": seed})
    if aggregation == Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
        fields["max_length"] = length
    return named_spec(_NAMES, aggregation=aggregation, **fields)


def spec_from_config(config: Any, mode: str | None = None, *, max_length: int | None = None) -> LossSpec:
    """The `LossSpec` of verl's `ActorConfig`; call it in a launch script to have every option checked there.

    Args:
        config: verl's ActorConfig (or a mapping with its fields).
        mode: a loss mode of verl, with or without "fastrl_"; None = `config.policy_loss.loss_mode`.
        max_length: what "seq-mean-token-sum-norm" divides by; None = `config.loss_scale_factor`. verl then takes the
            width of each batch, so one of the two is needed here.

    KL and entropy terms are not part of it: verl adds them itself, after the policy loss. A seed of clip_cov is drawn
    anew at every step; here it is 0.

    Raises:
        ValueError, TypeError: an unknown field, or a value that is not honoured, named as verl names it.
    """
    values = read(config)
    mode = values["loss_mode"] if mode is None else mode
    inner = inner_mode(mode.removeprefix(PREFIX), values)
    aggregation = aggregation_of(inner, values["loss_agg_mode"])
    length = values["loss_scale_factor"] if max_length is None else max_length
    return build(inner, values, aggregation, length, 0)
