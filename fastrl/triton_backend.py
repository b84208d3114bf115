"""Steps A, B and C by the Triton kernels: turns a spec into kernel arguments and calls the launchers."""

from __future__ import annotations

from typing import Any

import fastrl_kernels as kernels
import torch
from torch import Tensor

from fastrl import torch_backend
from fastrl.flat import Flat
from fastrl.plan import PlanKind
from fastrl.reduction import denominator, entropy_weights, weighting
from fastrl.registry import bounds
from fastrl.rollout_correction import RolloutCorrection
from fastrl.rows import RowScores, Scoring
from fastrl.spec import AdvantageScale, LossSpec
from fastrl.token_inputs import TokenInputs, with_selection

name = "triton"
fuses_objectives = True
one_pass = frozenset({PlanKind.FUSED})


def _transform(scoring: Scoring) -> dict[str, float | None]:
    return {"factor": scoring.factor, "softcap": scoring.softcap, "inner": scoring.inner}


def _numbers(spec: LossSpec) -> dict[str, float | None]:
    """The spec's numbers as runtime scalars; a None removes its branch from the kernel."""
    definition: Any = spec.definition  # not None: a custom objective never comes here
    low, high = bounds(spec)
    taken = kernels.OBJECTIVES[str(spec.objective)].numbers
    own = [getattr(spec, name) for name in definition.numbers[:taken]] + 4 * [None]
    how = _correction(spec)
    values = {
        "low": low if "epsilon_low" in definition.reads else None,
        "high": high if "epsilon_high" in definition.reads else None,
        "delta": spec.delta,
        "dual_clip": spec.dual_clip,
        "bound": spec.log_ratio_clamp,
        "kl_coef": spec.kl_coef or None,
        "kl_clamp": spec.kl_clamp,
        "entropy_coef": spec.entropy_coef or None,
        **{f"p{i}": own[i] for i in range(4)},
        "lower": None if how is None else how.lower,
        "upper": None if how is None else how.upper,
        "reject_lower": None if how is None else how.reject_lower,
        "reject_upper": None if how is None else how.reject_upper,
    }
    # As floats: an int would compile another kernel.
    return {name: None if value is None else float(value) for name, value in values.items()}


def _correction(spec: LossSpec) -> RolloutCorrection | None:
    """The correction that is left to the kernels; what depends on the batch is in `Flat.policy_weights` already."""
    return None if spec.rollout is None or spec.rollout.by_batch else spec.rollout


def _structure(spec: LossSpec) -> dict[str, Any]:
    how = _correction(spec)
    return {
        "OBJECTIVE": spec.objective,
        "KL": str(spec.kl_estimator),
        "KL_GRADIENT": str(spec.kl_gradient),
        "CORRECTION": "off" if how is None else str(how.level or "none"),
        "MODE": "truncate" if how is None else str(how.mode),
        "REJECT": "off" if how is None or how.reject is None else str(how.reject),
    }


def score(logits: Tensor, scoring: Scoring, out: RowScores) -> None:
    """Step A."""
    kernels.logprob_fwd(
        logits, scoring.ids, scoring.mask, scoring.rows, scoring.temperature, *out, **_transform(scoring)
    )


def differentiate(
    logits: Tensor, scoring: Scoring, scores: RowScores, dlogp: Tensor | None, dentropy: Tensor | None, out: Tensor
) -> None:
    """Step C."""
    kernels.logprob_bwd(
        logits, out, scoring.ids, scoring.mask, scoring.rows, scoring.temperature, *scores, dlogp, dentropy,
        **_transform(scoring),
    )  # fmt: skip


def score_and_differentiate(
    logits: Tensor,
    scoring: Scoring,
    inputs: TokenInputs,
    spec: LossSpec,
    scores: RowScores,
    dlogp: Tensor,
    dentropy: Tensor | None,
    out: Tensor,
) -> None:
    """Steps A and C and B's derivative in one kernel, for losses of a token's own row."""
    kernels.fused_loss_grad(
        logits, out, scoring.ids, scoring.mask, scoring.rows, scoring.temperature,
        inputs.advantages, inputs.weights, inputs.entropy_weights, inputs.old_logps, inputs.ref_logps,
        inputs.rollout_logps, inputs.policy_weights, *scores, dlogp, dentropy,
        transform=_transform(scoring), numbers=_numbers(spec), structure=_structure(spec),
    )  # fmt: skip


def _launch_policy(
    logps: Tensor, entropy: Tensor | None, flat: Flat, normalizer: Tensor | None, spec: LossSpec, **rest: Any
) -> tuple[Tensor, Tensor]:
    how = weighting(spec)
    advantages, rewards, per_token = flat.advantages, flat.rewards, bool(flat.per_token_advantages)
    if rewards is not None and (flat.group_ids is not None or spec.advantage_scale == AdvantageScale.BATCH):
        every = kernels.group_advantages(
            rewards,
            flat.group_ids,
            flat.group_size,
            eps=float(spec.advantage_eps),
            baseline=str(spec.advantage_baseline),
            scale=str(spec.advantage_scale),
        )
        advantages, rewards = every[flat.first_sequence : flat.first_sequence + flat.num_sequences], None
    off_policy = None if spec.off_policy_threshold is None else float(spec.off_policy_threshold)
    numbers = _numbers(spec) | {
        "weight_scale": how.scale,
        "advantage_eps": float(spec.advantage_eps),
        "off_policy": off_policy,
    }
    correction = _correction(spec)
    definition: Any = spec.definition
    structure = _structure(spec) | {
        "LEVEL": str(spec.ratio_level),
        "BY_SEQUENCE": spec.by_sequence,
        "FOLDS": definition.weighs_sequences,
        "READS_SELECTED": definition.reads_selected,
        "REJECT_LEVEL": "token" if correction is None else str(correction.reject_level),
        "PER_SEQUENCE_MEAN": how.per_sequence_mean,
        "BASELINE": str(spec.advantage_baseline),
        "SCALE": str(spec.advantage_scale),
    }
    return kernels.policy_loss_fwd(
        logps.contiguous(),
        None if entropy is None else entropy.contiguous(),
        mask=flat.mask,
        advantages=advantages,
        rewards=rewards,
        old=flat.old_logps,
        ref=flat.ref_logps,
        rollout=flat.rollout_logps,
        policy_weights=flat.policy_weights,
        selected=flat.selected,
        entropy_weights=entropy_weights(flat, spec, torch.float32),
        sequence_ids=flat.sequence_ids,
        cu_seqlens=flat.cu_seqlens,
        lengths=flat.lengths,
        denominator=denominator(flat.counts, normalizer, spec),
        width=max(flat.width, 1),
        group_size=max(flat.group_size, 1),
        first_sequence=flat.first_sequence,
        per_token_advantages=per_token,
        numbers=numbers,
        structure=structure,
        **rest,
    )


def token_loss(
    logps: Tensor, entropy: Tensor | None, flat: Flat, normalizer: Tensor | None, spec: LossSpec, *, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Step B. A custom objective is the user's torch code: there it runs the specification."""
    if spec.is_custom:
        return torch_backend.token_loss(logps, entropy, flat, normalizer, spec, grad=grad)
    flat = with_selection(logps, entropy, flat, spec)
    dlogp = torch.empty_like(logps, dtype=torch.float32) if grad else None
    dentropy = torch.empty_like(dlogp) if grad and spec.entropy_coef else None
    loss, statistics = _launch_policy(logps, entropy, flat, normalizer, spec, dlogp=dlogp, dentropy=dentropy)
    return loss, statistics, dlogp, dentropy


coefficients = torch_backend.coefficients  # [n]-sized work between two GEMMs; the specification is enough


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x ← factor·x in place, the factor read on the device; nothing moves when it is 1."""
    if x.is_contiguous():
        kernels.scale_(x, factor)
    else:  # logits with strides of their own, given up by inplace=True
        x.mul_(factor)
    return x
