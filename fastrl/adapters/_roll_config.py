"""ROLL's pipeline and actor_train configs as a `LossSpec`, and its denominators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrl.adapters._batch import k1_bounds
from fastrl.adapters._config import Options, fields_of
from fastrl.adapters._versions import warn_outside
from fastrl.adapters._words import LOSS_WORDS, named_with
from fastrl.rollout_correction import RolloutCorrection
from fastrl.spec import LossSpec

_WAY_OUT = "use ROLL's own ActorWorker"
# its configs hold a whole trainer: of the fields that are not listed here, those with such a word are the loss's
_SCOPE = named_with((*LOSS_WORDS, "kimi15", "importance", "mask", "ratio", "train_infer"))
PIPELINE = Options(
    framework="ROLL",
    honoured={
        "pg_clip": 0.2, "use_pg_clip_range": False, "pg_clip_low": 0.2, "pg_clip_high": 0.2, "dual_clip_loss": False,
        "use_kl_loss": False, "kl_loss_coef": 0.0, "entropy_loss_coef": 0.0, "loss_agg_mode": "seq-mean-token-mean",
        "importance_sampling": "token", "train_infer_correction": None, "enable_old_logprobs_recompute": False,
    },
    elsewhere={  # rewards, advantages, critic, masks and the schedule; or of a refused option
        "ppo_epochs", "value_clip", "kl_penalty", "target_kl", "init_kl_coef", "kl_horizon", "add_token_level_kl",
        "reward_clip", "advantage_clip", "max_len_mask", "mask_type", "difficulty_mask", "error_max_len_clip",
        "async_generation_ratio", "opd_kl_coef", "rollout_importance_sampling_ratio_upper_bound",
    },
    refused={
        "ratio_type": ("token", "leave it 'token'"),
        "rl_loss_coef": (1.0, "leave it 1.0"),
        "postive_loss_coef": (0, "leave it 0"),
        "use_topr_neg_loss_coef": (0.0, "leave it 0"),
        "use_topr_loss": (False, "leave it False"),
        "use_policy_loss_type": ("PPO", "set actor_train.pg_variant"),
        "difficulty_loss_weight": (False, "leave it False"),
        "length_loss_weight": (False, "leave it False"),
        "use_rollout_importance_sampling_ratio": (False, "set train_infer_correction.is_weight"),
    },
    own_loss=_WAY_OUT,
    scope=_SCOPE,
)  # fmt: skip
_WORKER = Options(
    framework="ROLL",
    honoured={
        "pg_variant": "ppo", "tis_lower_bound": 0.0, "tis_upper_bound": 1.0, "cispo_epsilon_low": 0.1,
        "cispo_epsilon_high": 0.1, "kimi15_tau": 0.1,
    },
    # of pg_variant "topr" alone; what ROLL's strategy multiplies the loss by
    elsewhere={"topr_positive_weight", "topr_negative_weight", "apply_loss_scale"},
    refused={"cispo_use_unified_mask": (False, "use pg_variant 'ppo'")},
    own_loss=_WAY_OUT,
    scope=_SCOPE,
)  # fmt: skip
_CORRECTION = Options(framework="ROLL", honoured={"is_weight": None, "filters": ()}, own_loss=_WAY_OUT)
_WEIGHT = Options(
    framework="ROLL",
    honoured={"enabled": False, "weight_type": "token", "upper_bound": 1.2},
    elsewhere={"detach"},  # neither side of the ratio carries a gradient
    own_loss=_WAY_OUT,
)
_FILTER = Options(
    framework="ROLL",
    honoured={
        "enabled": False, "agg_type": "token", "ratio_enabled": True, "ratio_low": 0.8, "ratio_high": 1.2,
        "diff_enabled": False, "diff_low": -0.2, "diff_high": 0.2,
    },
    own_loss=_WAY_OUT,
)  # fmt: skip
_AGGREGATIONS = {
    "token-mean": "token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",  # ROLL divides by the width of the mask alone: see count_of
}


def spec_from_config(pipeline_config: Any, worker_config: Any = None) -> LossSpec:
    """The `LossSpec` of ROLL's pipeline and actor_train configs; ValueError names what is not honoured."""
    warn_outside("roll", "0.1", "0.2", "written for")
    f, w = PIPELINE.read(pipeline_config), _WORKER.read(worker_config)
    low, high = (f["pg_clip_low"], f["pg_clip_high"]) if f["use_pg_clip_range"] else (f["pg_clip"], f["pg_clip"])
    dual = 1 + 2 * f["pg_clip"] if f["dual_clip_loss"] else None
    variants: dict[str, dict[str, Any]] = {
        "ppo": {"epsilon_low": low, "epsilon_high": high, "dual_clip": dual},
        "vanilla": {"objective": "reinforce"},
        "tis": _cispo(1 - w["tis_lower_bound"], w["tis_upper_bound"] - 1),
        "cispo": _cispo(w["cispo_epsilon_low"], w["cispo_epsilon_high"]),
        "kimi15": {"objective": "dro", "dro_beta": w["kimi15_tau"]},
    }
    levels = {"token": "token", "seq": "sequence"}
    kl = {"kl_coef": f["kl_loss_coef"], "kl_clamp": 10.0} if f["use_kl_loss"] and f["kl_loss_coef"] else {}
    correction = _correction(f["train_infer_correction"])
    return LossSpec(
        ratio_level=PIPELINE.choose("importance_sampling", f["importance_sampling"], levels),
        aggregation=PIPELINE.choose("loss_agg_mode", f["loss_agg_mode"], _AGGREGATIONS),
        entropy_coef=f["entropy_loss_coef"],
        log_ratio_clamp=None,
        rollout=None if f["enable_old_logprobs_recompute"] else correction,  # ROLL's pipeline has applied it then
        **kl,
        **_WORKER.choose("pg_variant", w["pg_variant"], variants),
    )


def _cispo(low: float, high: float) -> dict[str, Any]:
    return {"objective": "cispo", "epsilon_low": low, "epsilon_high": high}


def _correction(config: Any) -> RolloutCorrection | None:
    """`train_infer_correction`: the weight, and at most one filter; filtered tokens leave every mean."""
    c = _CORRECTION.read(config)
    weight = _WEIGHT.read(c["is_weight"])
    levels = {"token": "token", "geometric": "geometric", "sequence": "sequence"}
    level = _WEIGHT.choose("is_weight.weight_type", weight["weight_type"], levels) if weight["enabled"] else None
    bound = weight["upper_bound"] if weight["enabled"] else None
    rejections = [how for each in c["filters"] for how in _rejections(_FILTER.read(each))]
    if len(rejections) > 1:
        _CORRECTION.refuse("filters", "more than one rule", "keep one: one filter with ratio_enabled or diff_enabled")
    if level is None and not rejections:
        return None
    rejection = {**rejections[0], "rejected_in_denominator": False} if rejections else {}
    return RolloutCorrection(level=level, upper=bound, **rejection)


def _rejections(f: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    levels = {"token": "token", "geometric": "sequence-mean", "sequence": "sequence-sum"}
    if f["enabled"] and f["ratio_enabled"]:
        level = _FILTER.choose("filters.agg_type", f["agg_type"], levels)
        found.append({"reject": "k1", "reject_level": level, **k1_bounds(f["ratio_low"], f["ratio_high"])})
    if f["enabled"] and f["diff_enabled"]:
        if f["agg_type"] != "token" or f["diff_low"] != -f["diff_high"]:
            _FILTER.refuse("filters.diff_low", f["diff_low"], "use agg_type 'token' and diff_low = -diff_high")
        found.append({"reject": "tv", "reject_upper": f["diff_high"]})
    return found


def weighs(pipeline: Any) -> bool:
    """Whether ROLL's pipeline has put weights into the batch (enable_old_logprobs_recompute)."""
    correction = _CORRECTION.read(PIPELINE.read(pipeline)["train_infer_correction"])
    return bool(_WEIGHT.read(correction["is_weight"])["enabled"])


def count_of(pipeline: Any, meta: dict[str, Any], mask: Tensor, key: str) -> float | Tensor:
    """ROLL's denominator: tokens or samples of the whole step under the mask `key`, or the width of the mask."""
    mode = fields_of(pipeline).get("loss_agg_mode", PIPELINE.honoured["loss_agg_mode"])
    if mode == "seq-mean-token-sum-norm":
        return float(mask.shape[-1])
    counts = meta["batch_num_tokens" if mode == "token-mean" else "global_valid_samples"]
    count = counts.get(key, counts["response_mask"])
    return count.clamp(min=1) if isinstance(count, Tensor) else max(float(count), 1.0)
