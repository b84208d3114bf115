"""verl 0.9.1: its `ppo_loss` over every registered policy loss, with its KL, entropy, aggregation and rollout
correction, and the `LossSpec` of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from parity import peers
from parity.batches import B, Batch, Case, Result, T

EPS = 3e-8
"""verl adds 1e-8 to the length of a sequence before dividing by it."""


class _Data(dict):
    """As much of a TensorDict as `ppo_loss` asks for, already padded."""

    def select(self, *names: str) -> _Data:
        return _Data({name: self[name] for name in names})

    def to_padded_tensor(self) -> _Data:
        return self


def config(**options: Any):
    """An ActorConfig; names of PolicyLossConfig go there."""
    verl = peers.verl().config
    of_policy = {
        name: options.pop(name) for name in list(options) if name in verl.PolicyLossConfig.__dataclass_fields__
    }
    policy = verl.PolicyLossConfig(**of_policy)
    return verl.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy,
        global_batch_info={},
        **options,
    )


def verl_loss(
    mode: str,
    *,
    correction: dict[str, Any] | None = None,
    counts: Callable[[Batch], dict] | None = None,
    **options: Any,
) -> Callable[[Batch], Result]:
    """`ppo_loss` of this mode; `correction` runs verl's rollout correction on the batch first (decoupled mode)."""

    def run(batch: Batch) -> Result:
        verl = peers.verl()
        logps, entropy = batch.leaves()
        mask, weights = batch.mask, {}
        old = logps.detach() if batch.old is None else batch.old
        if correction is not None:
            proto, mask, _ = verl.rollout.compute_rollout_correction_and_rejection_mask(
                old, batch.rollout, mask, **correction
            )
            weights = {} if proto is None else {"rollout_is_weights": proto.batch["rollout_is_weights"]}
        if mode == "bypass_mode":
            old = batch.rollout
        data = _Data(
            dp_size=1,
            batch_num_tokens=None,
            global_batch_size=None,
            response_mask=mask,
            old_log_probs=old,
            advantages=batch.token_advantages,
            ref_log_prob=batch.ref,
            **weights,
        )
        data.update({} if counts is None else counts(batch))
        actor = config(loss_mode=mode, **options)
        original, verl.losses.no_padding_2_padding = verl.losses.no_padding_2_padding, lambda values, data: values
        try:
            loss, _ = verl.losses.ppo_loss(actor, {"log_probs": logps, "entropy": entropy}, data)
        finally:
            verl.losses.no_padding_2_padding = original
        return Result.of(loss, logps, entropy)

    return run


def global_counts(batch: Batch) -> dict[str, int]:
    """Two ranks, of whose tokens and sequences this batch holds a part."""
    return {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 11}


VANILLA = {"dual_clip": 3.0}  # verl's dual clip is always on
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")

CASES: dict[str, Case] = {}
for how in AGGREGATIONS:
    length = {"max_length": T} if how.endswith("norm") else {}
    CASES[f"vanilla-{how}"] = Case(
        verl_loss("vanilla", loss_agg_mode=how),
        {**VANILLA, "aggregation": how, **length},
        rtol=EPS if how == "seq-mean-token-mean" else 1e-10,
    )
    if how != "token-sum":  # two ranks: the mean of their gradients is the global batch's
        CASES[f"vanilla-{how}-two-ranks"] = Case(
            verl_loss("vanilla", loss_agg_mode=how, counts=global_counts),
            {**VANILLA, "aggregation": how, **length},
            normalizer=lambda _, tokens=how == "token-mean": (61 if tokens else 11) / 2,
            rtol=EPS if how == "seq-mean-token-mean" else 1e-10,
        )
CASES["vanilla-norm-constant"] = Case(
    verl_loss("vanilla", loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=20),
    {**VANILLA, "aggregation": "seq-mean-token-sum-norm", "max_length": 20},
)
CASES |= {
    "vanilla-on-policy": Case(verl_loss("vanilla"), VANILLA, batch={"old": False}),
    "vanilla-asymmetric": Case(
        verl_loss("vanilla", clip_ratio_low=0.1, clip_ratio_high=0.4),
        {**VANILLA, "epsilon_low": 0.1, "epsilon_high": 0.4},
    ),
    "vanilla-dual-clip": Case(verl_loss("vanilla", clip_ratio_c=1.4), {"dual_clip": 1.4}),
    "vanilla-extreme": Case(verl_loss("vanilla", clip_ratio_c=1e12), {"dual_clip": 1e12}, batch={"extreme": "ratio"}),
    "vanilla-token-advantages": Case(verl_loss("vanilla"), VANILLA, batch={"token_advantages": True}),
    "entropy": Case(verl_loss("vanilla", entropy_coeff=0.3), {**VANILLA, "entropy_coef": 0.3}),
    "entropy-seq-mean": Case(
        verl_loss("vanilla", entropy_coeff=0.3, loss_agg_mode="seq-mean-token-sum"),
        {**VANILLA, "entropy_coef": 0.3, "aggregation": "seq-mean-token-sum"},
    ),
    "gspo": Case(
        verl_loss("gspo", loss_agg_mode="seq-mean-token-mean", clip_ratio_low=0.05, clip_ratio_high=0.1),
        {
            "ratio_level": "sequence_token",
            "aggregation": "seq-mean-token-mean",
            "epsilon_low": 0.05,
            "epsilon_high": 0.1,
        },
        rtol=EPS,
    ),
    "gspo-token-mean-token-advantages": Case(
        verl_loss("gspo"), {"ratio_level": "sequence_token"}, batch={"token_advantages": True}
    ),
    "sapo": Case(
        verl_loss("sapo", tau_pos=1.3, tau_neg=1.8),
        {
            "objective": "sapo",
            "aggregation": "seq-mean-token-mean",  # whatever loss_agg_mode says
            "sapo_temperature_positive": 1.3,
            "sapo_temperature_negative": 1.8,
        },
        rtol=EPS,
    ),
    "sapo-extreme": Case(
        verl_loss("sapo"),
        {"objective": "sapo", "aggregation": "seq-mean-token-mean"},
        batch={"extreme": "ratio"},
        rtol=EPS,
    ),
    "gpg": Case(verl_loss("gpg"), {"objective": "reinforce"}),
    "dro": Case(verl_loss("dro", dro_beta=0.7), {"objective": "dro", "dro_beta": 0.7, "log_ratio_clamp": None}),
    "cispo": Case(
        verl_loss("cispo", clip_ratio_low=0.3, clip_ratio_high=0.6),
        {"objective": "cispo", "epsilon_low": 0.3, "epsilon_high": 0.6},
    ),
    "cispo-extreme": Case(
        verl_loss("cispo", clip_ratio_low=1.0, clip_ratio_high=1e9),
        {"objective": "cispo", "epsilon_low": 1.0, "epsilon_high": 1e9},
        batch={"extreme": "ratio"},
    ),
    "dppo_tv": Case(
        verl_loss("dppo_tv", clip_ratio_low=0.05, clip_ratio_high=0.1, clip_ratio_c=1.5),
        {"objective": "dppo_tv", "epsilon_low": 0.05, "epsilon_high": 0.1, "dppo_ratio_cap": 1.5},
    ),
    "dppo_kl": Case(
        verl_loss("dppo_kl", clip_ratio_low=0.02, clip_ratio_high=0.04, clip_ratio_c=1.5),
        {"objective": "dppo_kl", "epsilon_low": 0.02, "epsilon_high": 0.04, "dppo_ratio_cap": 1.5},
    ),
    "geo_mean": Case(
        verl_loss("geo_mean", clip_ratio_low=0.15, clip_ratio_high=0.25),
        {
            "objective": "gmpo",
            "ratio_level": "sequence",
            "epsilon_low": 0.15,
            "epsilon_high": 0.25,
            "aggregation": "seq-mean-token-mean",
            "log_ratio_clamp": None,
        },
        normalizer=lambda _: B,
        rtol=EPS,
    ),
    "clip_cov": Case(
        verl_loss("clip_cov", clip_cov_lb=0.1, clip_cov_ub=3.0, clip_cov_ratio=0.9),
        {
            "objective": "clip_cov",
            "seed": 0,
            "clip_cov_fraction": 0.9,
            "clip_cov_low": 0.1,
            "clip_cov_high": 3.0,
            "log_ratio_clamp": None,
        },
    ),
    "kl_cov": Case(
        verl_loss("kl_cov", kl_cov_ratio=0.2, ppo_kl_coef=0.6),
        {"objective": "kl_cov", "kl_cov_fraction": 0.2, "kl_cov_coef": 0.6, "log_ratio_clamp": None},
    ),
}

# kl_penalty: name, estimator, gradient, what verl clamps.
for name, spec in {
    "k1": {"kl_estimator": "k1"},
    "abs": {"kl_estimator": "abs"},
    "k2": {"kl_estimator": "k2"},
    "k3": {"kl_estimator": "k3", "kl_clamp": 10.0},
    "low_var_kl": {"kl_estimator": "k3", "kl_clamp": 10.0},
    "k1+": {"kl_estimator": "k1", "kl_gradient": "straight_through"},
    "abs+": {"kl_estimator": "abs", "kl_gradient": "straight_through"},
    "k2+": {"kl_estimator": "k2", "kl_gradient": "straight_through"},
    "k3+": {"kl_estimator": "k3", "kl_gradient": "straight_through", "kl_clamp": 10.0},
}.items():
    CASES[f"kl-{name}"] = Case(
        verl_loss("vanilla", use_kl_loss=True, kl_loss_coef=0.2, kl_loss_type=name),
        {**VANILLA, "kl_coef": 0.2, **spec},
        batch={"extreme": "kl"},
    )

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
