"""NeMo-RL's `ClippedPGLossConfig` as two `LossSpec`s: the policy term, and the KL penalty, which NeMo-RL averages over
other tokens."""

from __future__ import annotations

from typing import Any

from fastrl.adapters._batch import k1_bounds
from fastrl.adapters._config import Options
from fastrl.kl import kl_objective
from fastrl.rollout_correction import RolloutCorrection
from fastrl.spec import Aggregation, LossSpec

_CONFIG = Options(
    framework="NeMo-RL's ClippedPGLossConfig",
    honoured={
        "disable_ppo_ratio": False, "token_level_loss": True, "sequence_level_importance_ratios": False,
        "ratio_clip_min": 0.2, "ratio_clip_max": 0.2, "ratio_clip_c": None, "reference_policy_kl_penalty": 0.01,
        "reference_policy_kl_type": "k3", "kl_input_clamp_value": 20.0, "kl_output_clamp_value": 10.0,
        "use_kl_in_reward": False, "use_importance_sampling_correction": False,
        "truncated_importance_sampling_type": None, "truncated_importance_sampling_ratio": None,
        "truncated_importance_sampling_ratio_min": None, "force_on_policy_ratio": False, "use_cispo": False,
        "use_on_policy_kl_approximation": False,
    },
    refused={"positive_example_nll_weight": (0.0, "set it to 0.0")},
    own_loss="use nemo_rl.algorithms.loss.loss_functions.ClippedPGLossFn",
)  # fmt: skip


def read(cfg: Any) -> dict[str, Any]:
    """The fields, with what contradicts each other in NeMo-RL too refused by name."""
    f = _CONFIG.read(cfg)
    if f["sequence_level_importance_ratios"] and f["token_level_loss"]:
        _CONFIG.refuse("sequence_level_importance_ratios", True, "set token_level_loss=False with it")
    if f["ratio_clip_c"] is not None and f["disable_ppo_ratio"]:
        _CONFIG.refuse("ratio_clip_c", f["ratio_clip_c"], "leave it None with disable_ppo_ratio")
    for name in ("disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios", "ratio_clip_c"):
        if f["use_cispo"] and f[name]:
            _CONFIG.refuse(name, f[name], "leave it off with use_cispo")
    if f["use_cispo"] and not f["token_level_loss"]:
        _CONFIG.refuse("token_level_loss", False, "set it to True with use_cispo")
    return f


def _aggregation(f: dict[str, Any]) -> str:
    return Aggregation.TOKEN_MEAN if f["token_level_loss"] else Aggregation.SEQ_MEAN_TOKEN_MEAN


def policy_spec(f: dict[str, Any]) -> LossSpec:
    """The policy term. Nothing is clamped before exp, as in NeMo-RL."""
    common: dict[str, Any] = {"aggregation": _aggregation(f), "rollout": _correction(f), "log_ratio_clamp": None}
    if f["disable_ppo_ratio"] and not f["force_on_policy_ratio"]:
        return LossSpec(objective="reinforce", **common)
    clip = {"epsilon_low": f["ratio_clip_min"], "epsilon_high": f["ratio_clip_max"]}
    if f["use_cispo"]:
        return LossSpec(objective="cispo", **clip, **common)
    by_sequence = f["sequence_level_importance_ratios"] and not f["force_on_policy_ratio"]
    level = "sequence" if by_sequence else "token"
    return LossSpec(ratio_level=level, dual_clip=f["ratio_clip_c"], **clip, **common)


def penalty_spec(f: dict[str, Any]) -> LossSpec | None:
    """The KL penalty without its coefficient, or None."""
    if f["use_kl_in_reward"] or not f["reference_policy_kl_penalty"]:
        return None
    estimators = {"k1": "k1", "k2": "k2", "k3": "k3"}
    estimator = _CONFIG.choose("reference_policy_kl_type", f["reference_policy_kl_type"], estimators)
    return LossSpec(
        objective=kl_objective(estimator, f["kl_output_clamp_value"], weighted=f["use_on_policy_kl_approximation"]),
        log_ratio_clamp=f["kl_input_clamp_value"],
        aggregation=_aggregation(f),
    )


def _correction(f: dict[str, Any]) -> RolloutCorrection | None:
    """The weights prev/generation: of a token, or the product over the sequence with sequence-level ratios."""
    kind, name = f["truncated_importance_sampling_type"], "truncated_importance_sampling_type"
    if not f["use_importance_sampling_correction"]:
        if kind is not None:
            _CONFIG.refuse(name, kind, "set use_importance_sampling_correction=True with it")
        return None
    by_sequence = f["sequence_level_importance_ratios"]
    level = "sequence" if by_sequence else "token"
    low, high = f["truncated_importance_sampling_ratio_min"], f["truncated_importance_sampling_ratio"]
    if kind is not None and high is None:
        _CONFIG.refuse("truncated_importance_sampling_ratio", high, f"set a number with {kind!r}")
    if kind is None and (low is not None or high is not None):
        _CONFIG.refuse("truncated_importance_sampling_ratio", high, "set truncated_importance_sampling_type with it")
    if kind in ("icepop", "seq-mask-tis") and low is None:
        _CONFIG.refuse("truncated_importance_sampling_ratio_min", low, f"set a number with {kind!r}")
    if kind == "seq-mask-tis" and by_sequence:
        _CONFIG.refuse(name, kind, "use 'icepop' with sequence_level_importance_ratios")
    kinds = {
        None: lambda: RolloutCorrection(level=level),
        "tis": lambda: RolloutCorrection(level=level, lower=low, upper=high),
        "icepop": lambda: RolloutCorrection(level=level, mode="mask", lower=low, upper=high),
        "seq-mask-tis": lambda: RolloutCorrection(reject="k1", reject_level="sequence-mean", **k1_bounds(low, high)),
    }
    return _CONFIG.choose(name, kind, kinds)()
