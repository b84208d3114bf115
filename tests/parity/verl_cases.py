"""verl 0.9.1: its `ppo_loss` over every registered policy loss, with its KL, entropy and aggregation, and the `LossSpec`
of each. Its rollout correction is in `verl_rollout_cases.py`."""

from __future__ import annotations

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
