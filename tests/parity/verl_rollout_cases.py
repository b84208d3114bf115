"""verl 0.9.1: its rollout correction, decoupled and in bypass mode, before its policy losses."""

from __future__ import annotations

import math
from typing import Any

from parity.batches import B, Case
from parity.verl_cases import EPS, VANILLA, verl_loss

CASES: dict[str, Case] = {}
# Rollout correction, decoupled: name, verl's options, ours.
CORRECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token-truncate": ({"rollout_is": "token", "rollout_is_threshold": 1.2}, {"level": "token", "upper": 1.2}),
    "token-icepop": (
        {"rollout_is": "token", "rollout_is_threshold": "0.7_1.5"},
        {"level": "token", "mode": "mask", "lower": 0.7, "upper": 1.5},
    ),
    "sequence-truncate": ({"rollout_is": "sequence", "rollout_is_threshold": 1.5}, {"level": "sequence", "upper": 1.5}),
    "sequence-icepop": (
        {"rollout_is": "sequence", "rollout_is_threshold": "0.7_3.5"},
        {"level": "sequence", "mode": "mask", "lower": 0.7, "upper": 3.5},
    ),
    "token-normalized": (
        {"rollout_is": "token", "rollout_is_threshold": 1.2, "rollout_is_batch_normalize": True},
        {"level": "token", "upper": 1.2, "normalize": True},
    ),
    "sequence-normalized": (
        {"rollout_is": "sequence", "rollout_is_threshold": 1.5, "rollout_is_batch_normalize": True},
        {"level": "sequence", "upper": 1.5, "normalize": True},
    ),
}
_LEVELS = {"token": "token", "seq_sum": "sequence-sum", "seq_mean": "sequence-mean", "seq_max": "sequence-max"}
_BOUNDS = {
    "token": {"k1": "0.6_1.4", "k2": 0.05, "k3": 0.06},
    "seq_sum": {"k1": "0.4_1.5", "k2": 0.3, "k3": 0.3},
    "seq_mean": {"k1": "0.85_1.2", "k2": 0.08, "k3": 0.1},
    "seq_max": {"k2": 0.2, "k3": 0.2},
}
for level, bounds in _BOUNDS.items():
    for statistic, bound in bounds.items():
        # verl gives the bounds of k1 as ratios
        low, high = (math.log(float(x)) for x in bound.split("_")) if statistic == "k1" else (None, bound)
        CORRECTIONS[f"reject-{level}_{statistic}"] = (
            {"rollout_rs": f"{level}_{statistic}", "rollout_rs_threshold": bound},
            {
                "level": None,
                "reject": statistic,
                "reject_level": _LEVELS[level],
                "reject_lower": low,
                "reject_upper": high,
                "rejected_in_denominator": False,
            },
        )
CORRECTIONS["truncate-normalize-reject"] = (
    {
        "rollout_is": "token",
        "rollout_is_threshold": 1.2,
        "rollout_is_batch_normalize": True,
        "rollout_rs": "token_k2",
        "rollout_rs_threshold": 0.05,
    },
    {
        "level": "token",
        "upper": 1.2,
        "normalize": True,
        "reject": "k2",
        "reject_upper": 0.05,
        "rejected_in_denominator": False,
    },
)
for name, (theirs, ours) in CORRECTIONS.items():
    noisy = "normal" in name
    CASES[f"rollout-{name}"] = Case(
        verl_loss("vanilla", correction=theirs),
        {**VANILLA, "rollout": ours},
        sampler=True,
        rtol=EPS if noisy else 1e-10,
    )
# The correction with everything else that reads the mask: penalties, lengths, other objectives.
_token, _reject = CORRECTIONS["token-icepop"], CORRECTIONS["reject-token_k1"]
_whole = CORRECTIONS["reject-seq_mean_k3"]
CASES |= {
    "rollout-extreme": Case(
        verl_loss("vanilla", correction={"rollout_is": "token", "rollout_is_threshold": 1e12}),
        {**VANILLA, "rollout": {"level": "token", "upper": 1e12}},
        batch={"extreme": "rollout"},
        sampler=True,
    ),
    "rollout-penalties": Case(
        verl_loss("vanilla", correction=_token[0], entropy_coeff=0.2, use_kl_loss=True, kl_loss_coef=0.1),
        {**VANILLA, "rollout": _token[1], "entropy_coef": 0.2, "kl_coef": 0.1, "kl_clamp": 10.0},
        sampler=True,
    ),
    "rollout-reject-penalties": Case(
        verl_loss("vanilla", correction=_reject[0], entropy_coeff=0.2, use_kl_loss=True, kl_loss_coef=0.1),
        {**VANILLA, "rollout": _reject[1], "entropy_coef": 0.2, "kl_coef": 0.1, "kl_clamp": 10.0},
        sampler=True,
    ),
    "rollout-reject-lengths": Case(
        verl_loss("vanilla", correction=_reject[0], loss_agg_mode="seq-mean-token-mean"),
        {**VANILLA, "rollout": _reject[1], "aggregation": "seq-mean-token-mean"},
        sampler=True,
        rtol=EPS,
    ),
    "rollout-reject-sequences": Case(
        verl_loss("vanilla", correction=_whole[0], loss_agg_mode="seq-mean-token-sum"),
        {**VANILLA, "rollout": _whole[1], "aggregation": "seq-mean-token-sum"},
        sampler=True,
    ),
    "rollout-reject-gspo": Case(
        verl_loss("gspo", correction=_reject[0]),
        {"ratio_level": "sequence_token", "rollout": _reject[1]},
        sampler=True,
    ),
    "rollout-gspo": Case(
        verl_loss("gspo", correction=_token[0]), {"ratio_level": "sequence_token", "rollout": _token[1]}, sampler=True
    ),
    "rollout-sapo": Case(
        verl_loss("sapo", correction=_token[0]),
        {"objective": "sapo", "aggregation": "seq-mean-token-mean", "rollout": _token[1]},
        sampler=True,
        rtol=EPS,
    ),
    "rollout-cispo": Case(
        verl_loss("cispo", correction=_token[0]), {"objective": "cispo", "rollout": _token[1]}, sampler=True
    ),
    "rollout-gpg": Case(
        verl_loss("gpg", correction=_token[0]), {"objective": "reinforce", "rollout": _token[1]}, sampler=True
    ),
    "rollout-dro": Case(
        verl_loss("dro", correction=_token[0], dro_beta=0.7),
        {"objective": "dro", "dro_beta": 0.7, "log_ratio_clamp": None, "rollout": _token[1]},
        sampler=True,
    ),
    "rollout-geo_mean": Case(
        verl_loss("geo_mean", correction={"rollout_is": "token", "rollout_is_threshold": 1e6}),
        {
            "objective": "gmpo",
            "ratio_level": "sequence",
            "aggregation": "seq-mean-token-mean",
            "log_ratio_clamp": None,
            "rollout": {"level": "geometric"},
        },
        normalizer=lambda _: B,
        sampler=True,
        rtol=EPS,
    ),
    "bypass-ppo-clip": Case(  # ratio against the sampler, its weights not applied again
        verl_loss("bypass_mode", rollout_correction={"loss_type": "ppo_clip", **_token[0]}),
        VANILLA,
        batch={"old": "rollout"},
    ),
    "bypass-reinforce": Case(
        verl_loss("bypass_mode", rollout_correction={"loss_type": "reinforce", **_token[0]}),
        {"objective": "reinforce", "rollout": _token[1]},
        batch={"old": False},
        sampler=True,
    ),
    "bypass-reinforce-reject": Case(
        verl_loss("bypass_mode", rollout_correction={"loss_type": "reinforce", **_reject[0]}),
        {"objective": "reinforce", "rollout": _reject[1]},
        batch={"old": "policy"},
        sampler=True,
    ),
}
