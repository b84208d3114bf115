"""SkyRL 0.4's `AlgorithmConfig` as a `LossSpec`, for each of its loss types."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from fastrl.adapters._batch import k1_bounds
from fastrl.adapters._config import Options
from fastrl.rollout_correction import RolloutCorrection
from fastrl.spec import Aggregation, LossSpec

_OWN: dict[str, dict[str, Any]] = {
    "cispo": {"cispo_eps_clip_low": 1.0, "cispo_eps_clip_high": 4.0, "cispo_anchor": "old"},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "dppo": {"dppo_type": "binary_tv", "delta_low": 0.2, "delta_high": 0.2},
    "clip_cov": {"clip_ratio": 0.0002, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0},
    "kl_cov": {"kl_cov_frac": 0.2, "ppo_kl_coef": 1.0},
}
"""Loss types with a config of their own, and its defaults."""

ALGORITHM = Options(
    framework="SkyRL 0.4",
    honoured={
        "eps_clip_low": 0.2, "eps_clip_high": 0.2, "clip_ratio_c": 3.0, "off_policy_correction": None,
        **dict.fromkeys(_OWN),
    },
    elsewhere={
        "policy_loss_type", "advantage_estimator", "kl_ctrl", "kl_estimator_type", "use_kl_in_reward", "use_kl_loss",
        "kl_loss_coef", "use_entropy_loss", "entropy_loss_coef", "temperature", "advantage_batch_normalize",
        "value_head_prefix", "loss_reduction", "grpo_norm_by_std", "zero_variance_filter", "zero_variance_filter_tol",
        "lambd", "gamma", "enable_sample_support_replay", "value_clip", "dynamic_sampling", "max_seq_len",
    },
    refused={
        "use_tis": (False, "set off_policy_correction.tis_ratio_type='token'"),
        "tis_imp_ratio_cap": (-1.0, "set off_policy_correction.token_tis_ratio_clip_high"),
    },
    own_loss="use SkyRL's own policy_loss_type",
)  # fmt: skip
_CORRECTION = dataclasses.replace(
    ALGORITHM,
    honoured={
        "tis_ratio_type": None, "token_tis_ratio_clip_high": 2.0, "sequence_tis_ratio_clip_high": 5.0,
        "sequence_mask_metric": None, "geo_mask_high": 1.01, "geo_mask_low": 0.99, "product_mask_high": 2.0,
        "product_mask_low": 0.5, "outlier_token_is_threshold_low": None, "token_mask_is_threshold_low": None,
        "token_mask_is_threshold_high": None,
    },
    elsewhere=(),
    refused={"outlier_token_is_threshold_high": (None, "use outlier_token_is_threshold_low or sequence_mask_metric")},
)  # fmt: skip


class Mapped(NamedTuple):
    """A loss, and which log-probs its ratio is against: "old", "rollout", or None for the policy's own."""

    spec: LossSpec
    anchor: str | None


def mapped(loss_type: str, config: Any) -> Mapped:
    """SkyRL's `loss_type` under its `AlgorithmConfig`; ValueError names what is not honoured."""
    fields = ALGORITHM.read(config)
    own: dict[str, Any] = {}
    if loss_type in _OWN:
        options = dataclasses.replace(ALGORITHM, honoured=_OWN[loss_type], elsewhere=(), refused={})
        own = options.read(fields[loss_type])
    anchor: str | None = "old"
    if loss_type in ("rollout_is", "dppo"):
        anchor = None if loss_type == "rollout_is" else "rollout"
    elif loss_type == "cispo":
        anchor = ALGORITHM.choose("cispo.cispo_anchor", own["cispo_anchor"], {"old": "old", "rollout": "rollout"})
    rollout = _correction(fields["off_policy_correction"])
    if rollout is not None and (anchor != "old" or loss_type in ("clip_cov", "kl_cov", "importance_sampling")):
        ALGORITHM.refuse("off_policy_correction", rollout, f"leave it off with policy_loss_type {loss_type!r}")
    if loss_type == "rollout_is":
        band = {"lower": 1 - fields["eps_clip_low"], "upper": 1 + fields["eps_clip_high"]}
        rollout = RolloutCorrection(mode="mask", **band)
    chosen = ALGORITHM.choose("policy_loss_type", loss_type, _CHANGES)(fields, own)
    return Mapped(LossSpec(aggregation=Aggregation.TOKEN_SUM, rollout=rollout, **chosen), anchor)


def _clip(f: dict[str, Any]) -> dict[str, Any]:
    return {"epsilon_low": f["eps_clip_low"], "epsilon_high": f["eps_clip_high"]}


def _numbers(objective: str, own: dict[str, Any], low: str, high: str) -> dict[str, Any]:
    return {"objective": objective, "epsilon_low": own[low], "epsilon_high": own[high]}


def _dppo(own: dict[str, Any]) -> dict[str, Any]:
    objectives = {"binary_tv": "dppo_tv", "binary_kl": "dppo_kl"}
    objective = ALGORITHM.choose("dppo.dppo_type", own["dppo_type"], objectives)
    cap = {"dppo_ratio_cap": math.exp(20)}  # SkyRL has none beyond the clamp of the log-ratio
    return {**_numbers(objective, own, "delta_low", "delta_high"), **cap}


def _clip_cov(own: dict[str, Any]) -> dict[str, Any]:
    return {
        "objective": "clip_cov",
        "clip_cov_fraction": own["clip_ratio"],
        "clip_cov_low": own["clip_cov_lb"],
        "clip_cov_high": own["clip_cov_ub"],
        "log_ratio_clamp": None,
        "seed": 0,
    }


def _sapo(own: dict[str, Any]) -> dict[str, Any]:
    return {
        "objective": "sapo",
        "sapo_temperature_positive": own["tau_pos"],
        "sapo_temperature_negative": own["tau_neg"],
    }


def _kl_cov(own: dict[str, Any]) -> dict[str, Any]:
    numbers = {"kl_cov_fraction": own["kl_cov_frac"], "kl_cov_coef": own["ppo_kl_coef"]}
    return {"objective": "kl_cov", "log_ratio_clamp": None, **numbers}


_CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "regular": lambda f, own: _clip(f),
    "dual_clip": lambda f, own: {**_clip(f), "dual_clip": f["clip_ratio_c"]},
    "gspo": lambda f, own: {**_clip(f), "ratio_level": "sequence_token", "log_ratio_clamp": 10.0},
    "importance_sampling": lambda f, own: {"objective": "importance_sampling", "log_ratio_clamp": None},
    "rollout_is": lambda f, own: {"objective": "reinforce"},
    "cispo": lambda f, own: _numbers("cispo", own, "cispo_eps_clip_low", "cispo_eps_clip_high"),
    "sapo": lambda f, own: _sapo(own),
    "dppo": lambda f, own: _dppo(own),
    "clip_cov": lambda f, own: {**_clip(f), **_clip_cov(own)},
    "kl_cov": lambda f, own: _kl_cov(own),
}
"""Fields of the `LossSpec`, from the fields of the `AlgorithmConfig` and of the loss type's own config."""


def _correction(config: Any) -> RolloutCorrection | None:
    """`OffPolicyCorrectionConfig`: one weight and at most one rejection."""
    f = _CORRECTION.read(config)
    weights: dict[Any, dict[str, Any]] = {
        None: {"level": None},
        "token": {"level": "token", "upper": f["token_tis_ratio_clip_high"]},
        "sequence": {"level": "sequence", "upper": f["sequence_tis_ratio_clip_high"]},
    }
    weight = _CORRECTION.choose("off_policy_correction.tis_ratio_type", f["tis_ratio_type"], weights)
    rejections = _rejections(f)
    if len(rejections) > 1:
        _CORRECTION.refuse(" and ".join(rejections), "more than one rejection", "set only one of them")
    if "token_mask_is_threshold_low" in rejections and f["tis_ratio_type"] == "sequence":
        _CORRECTION.refuse("tis_ratio_type", "sequence", "use 'token' with token_mask_is_threshold_low")
    if weight["level"] is None and not rejections:
        return None
    return RolloutCorrection(**weight, **({"reject": "k1", **next(iter(rejections.values()))} if rejections else {}))


def _rejections(f: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each rejection that is on, by the field that switches it on."""
    found: dict[str, dict[str, Any]] = {}
    low, high = f["token_mask_is_threshold_low"], f["token_mask_is_threshold_high"]
    if (low is None) != (high is None):
        _CORRECTION.refuse("token_mask_is_threshold_low", (low, high), "set both bounds (SkyRL ignores one alone)")
    if low is not None:
        found["token_mask_is_threshold_low"] = {"reject_level": "token", **k1_bounds(low, high)}
    if f["outlier_token_is_threshold_low"] is not None:
        bounds = k1_bounds(f["outlier_token_is_threshold_low"], None)
        found["outlier_token_is_threshold_low"] = {"reject_level": "sequence-max", **bounds}
    masks = {
        None: None,
        "geometric": {"reject_level": "sequence-mean", **k1_bounds(f["geo_mask_low"], f["geo_mask_high"])},
        "product": {"reject_level": "sequence-sum", **k1_bounds(f["product_mask_low"], f["product_mask_high"])},
    }
    mask = _CORRECTION.choose("sequence_mask_metric", f["sequence_mask_metric"], masks)
    return found if mask is None else {**found, "sequence_mask_metric": mask}
