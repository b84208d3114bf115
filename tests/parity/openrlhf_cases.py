"""OpenRLHF 0.11.2: its `PolicyLoss` over types, gates and aggregations, with its KL, and the `LossSpec` of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from parity import peers
from parity.batches import Batch, Case, Result

EPS = 3e-8
"""It adds 1e-8 to the length of a sequence before dividing by it."""
SINGLE = 5e-7
"""Its KL is computed in float32 whatever comes in."""


def openrlhf_loss(
    *, counts: dict[str, Any] | None = None, kl: dict[str, Any] | None = None, **options: Any
) -> Callable[[Batch], Result]:
    """`PolicyLoss`, plus 0.2 of the aggregated `compute_approx_kl` as its actor adds it."""

    def run(batch: Batch) -> Result:
        openrlhf = peers.openrlhf()
        logps, entropy = batch.leaves()
        policy_loss = openrlhf.loss.PolicyLoss(**options)
        old = logps.detach() if batch.old is None else batch.old
        if policy_loss.policy_loss_type == "gspo" and policy_loss.is_correction_level != "off":
            old = torch.full_like(logps, -3.0)  # is not read
        loss, *_ = policy_loss(logps, old, batch.token_advantages, batch.mask, batch.rollout, **(counts or {}))
        if kl is not None:
            estimate = openrlhf.utils.compute_approx_kl(logps, batch.ref, **kl)
            loss = loss + 0.2 * openrlhf.loss.aggregate_loss(
                estimate, batch.mask, token_level_loss=policy_loss.token_level_loss, **(counts or {})
            )
        return Result.of(loss, logps, entropy)

    return run


_SEQ = {"token_level_loss": False}, {"aggregation": "seq-mean-token-mean"}
_COUNTS = {"dp_size": 2, "batch_num_tokens": 61.0, "global_batch_size": 11.0}


def _gate(level: str, gating: str, low: float, high: float, mode: str = "mask") -> dict[str, Any]:
    return {
        "is_correction_level": level,
        "is_correction_gating": gating,
        "is_correction_mode": mode,
        "is_correction_threshold": (low, high),
    }


CASES: dict[str, Case] = {
    "ppo": Case(openrlhf_loss(), {}),
    "ppo-on-policy": Case(openrlhf_loss(), {}, batch={"old": False}),
    "ppo-token-advantages": Case(openrlhf_loss(), {}, batch={"token_advantages": True}),
    "ppo-extreme": Case(openrlhf_loss(), {}, batch={"extreme": "ratio"}),
    "ppo-clip-higher": Case(openrlhf_loss(clip_eps_high=0.28), {"epsilon_high": 0.28}),
    "ppo-dual-clip": Case(openrlhf_loss(dual_clip=1.4), {"dual_clip": 1.4}),
    "ppo-sequence-mean": Case(openrlhf_loss(**_SEQ[0]), _SEQ[1], rtol=EPS),
    "ppo-two-ranks": Case(openrlhf_loss(counts=_COUNTS), {}, normalizer=lambda _: 61 / 2),
    "ppo-sequence-mean-two-ranks": Case(
        openrlhf_loss(counts=_COUNTS, **_SEQ[0]), _SEQ[1], normalizer=lambda _: 11 / 2, rtol=EPS
    ),
    "gspo": Case(
        openrlhf_loss(policy_loss_type="gspo", clip_eps_low=0.05, clip_eps_high=0.1),
        {
            "ratio_level": "sequence",
            "log_ratio_clamp": None,
            "aggregation": "seq-mean-token-mean",  # whatever token_level_loss says
            "epsilon_low": 0.05,
            "epsilon_high": 0.1,
        },
        rtol=EPS,
    ),
    "gspo-dual-clip": Case(
        openrlhf_loss(policy_loss_type="gspo", dual_clip=1.1),
        {"ratio_level": "sequence", "log_ratio_clamp": None, "dual_clip": 1.1, **_SEQ[1]},
        rtol=EPS,
    ),
    "gspo-rollout": Case(  # with a correction, its ratio is against the sampler
        openrlhf_loss(policy_loss_type="gspo", **_gate("token", "ratio", 0.5, 5.0)),
        {"ratio_level": "sequence", "log_ratio_clamp": None, **_SEQ[1]},
        batch={"old": "rollout"},
        rtol=EPS,
    ),
    "rollout-token-clip": Case(
        openrlhf_loss(**_gate("token", "ratio", 0.8, 1.3, "clip")),
        {"rollout": {"level": "token", "lower": 0.8, "upper": 1.3}},
        sampler=True,
    ),
    "rollout-token-ratio": Case(
        openrlhf_loss(**_gate("token", "ratio", 0.8, 1.3)),
        {"rollout": {"level": "token", "mode": "mask", "lower": 0.8, "upper": 1.3}},
        sampler=True,
    ),
}
# A gate by another statistic than the weight: survivors keep their own weight, and the dropped stay in the denominator.
for name, gate, reject in (
    (
        "seq-ratio",
        _gate("seq", "ratio", 0.9, 1.2),
        {"reject": "k1", "reject_lower": -math.log(1.2), "reject_upper": -math.log(0.9)},
    ),
    ("token-tv", _gate("token", "tv", 0.0, 0.1), {"reject": "tv", "reject_upper": 0.1}),
    ("seq-tv", _gate("seq", "tv", 0.0, 0.12), {"reject": "tv", "reject_upper": 0.12}),
    ("token-binary-kl", _gate("token", "binary_kl", 0.0, 0.05), {"reject": "binary_kl", "reject_upper": 0.05}),
    ("seq-binary-kl", _gate("seq", "binary_kl", 0.0, 0.05), {"reject": "binary_kl", "reject_upper": 0.05}),
):
    level = "token" if name.startswith("token") else "sequence-mean"
    CASES[f"rollout-{name}"] = Case(
        openrlhf_loss(**gate), {"rollout": {"level": "token", "reject_level": level, **reject}}, sampler=True
    )
for name in ("k1", "k2", "k3"):
    estimator = {"kl_coef": 0.2, "kl_estimator": name, "kl_clamp": 10.0}
    CASES[f"kl-{name}"] = Case(
        openrlhf_loss(kl={"kl_estimator": name}), estimator, batch={"extreme": "kl"}, rtol=SINGLE
    )
    CASES[f"kl-{name}-unbiased-gradient"] = Case(
        openrlhf_loss(kl={"kl_estimator": name, "unbiased_gradient": True}),
        {**estimator, "kl_gradient": "straight_through"},
        batch={"extreme": "kl"},
        rtol=SINGLE,
    )
