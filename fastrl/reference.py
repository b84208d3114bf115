"""The whole loss in plain torch: the oracle of every test, and step B of the "torch" backend.

Forward only; autograd (or `torch.func`) differentiates it, so it owes nothing to the hand-written derivatives of the
kernels. float64 stays float64, everything else is computed in float32. No triton import.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import correction, kl
from fastrl.advantages import token_advantages
from fastrl.clamping import beyond, clamp_log_ratio, hold
from fastrl.correction import Behaviour
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.metrics import STATISTICS
from fastrl.objectives import objective
from fastrl.options import CorrectionLevel
from fastrl.ratio import log_ratio
from fastrl.reduction import entropy_weights, token_weights
from fastrl.registry import Terms
from fastrl.selection import select
from fastrl.spec import KLEstimator, LossSpec


class TokenInputs(NamedTuple):
    """Everything of a batch that the loss needs besides log-probs and entropies, one row per token."""

    valid: Tensor  # (n,) bool
    advantages: Tensor  # (n,) 0 under the mask
    weights: Tensor  # (n,) 0 under the mask
    entropy_weights: Tensor | None  # (n,) 0 under the mask; None = weights
    old_logps: Tensor | None  # (n,)
    ref_logps: Tensor | None  # (n,)
    rollout_logps: Tensor | None  # (n,)
    policy_weights: Tensor | None  # (n,)
    selected: Tensor | None  # (n,)
    sequence: Tensor  # (n,) int64
    lengths: Tensor  # (S,)

    def take(self, rows: Tensor | slice) -> TokenInputs:
        """The inputs of some rows; for a sequence-level ratio they must be whole sequences."""
        per_token: list[Any] = [None if field is None else field[rows] for field in self[:-1]]
        return TokenInputs._make([*per_token, self.lengths])


def token_inputs(flat: Flat, normalizer: Tensor | None, spec: LossSpec, dtype: torch.dtype) -> TokenInputs:
    """Expand a batch to one row per token."""
    valid = flat.valid()

    def cast(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(dtype)

    return TokenInputs(
        valid=valid,
        advantages=token_advantages(flat, spec, dtype).masked_fill(~valid, 0),
        weights=token_weights(flat, normalizer, spec, dtype),
        entropy_weights=entropy_weights(flat, spec, dtype),
        old_logps=cast(flat.old_logps),
        ref_logps=cast(flat.ref_logps),
        rollout_logps=cast(flat.rollout_logps),
        policy_weights=None if flat.policy_weights is None else cast(flat.policy_weights).masked_fill(~valid, 0),
        selected=cast(flat.selected),
        sequence=flat.sequence_of_token(),
        lengths=flat.lengths,
    )


def _masked(values: Tensor, inputs: TokenInputs) -> Tensor:
    """0 where the token does not count, so that garbage there reaches neither the value nor the gradient."""
    return torch.where(inputs.valid, values, 0.0)


def _old(logps: Tensor, inputs: TokenInputs) -> Tensor:
    """The policy that the ratio is against; the stop-gradient of this one when none was given."""
    return logps.detach() if inputs.old_logps is None else inputs.old_logps


def _behaviour(old: Tensor, inputs: TokenInputs) -> Behaviour:
    sampled = old if inputs.rollout_logps is None else inputs.rollout_logps
    return Behaviour(old, sampled, inputs.valid, inputs.sequence, inputs.lengths)


def raw_log_ratio(logps: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """The unclamped log-ratio at the spec's level."""
    delta = _masked(logps - _old(logps, inputs), inputs)
    if spec.definition is not None and spec.definition.prepare is not None:
        delta = _masked(spec.definition.prepare(delta, inputs.advantages, spec), inputs)
    return log_ratio(delta, inputs.sequence, inputs.lengths, spec)


def terms(logps: Tensor, inputs: TokenInputs, spec: LossSpec) -> Terms:
    """What the objective sees."""
    old = _old(logps, inputs)
    log_weight = _sequence_log_weight(logps, old, inputs, spec) if _folds(spec) else None
    return Terms(
        logps=_masked(logps, inputs),
        log_ratio=_masked(clamp_log_ratio(raw_log_ratio(logps, inputs, spec), spec), inputs),
        advantages=inputs.advantages,
        old_logps=_masked(old, inputs),
        selected=inputs.selected,
        sequence_log_weight=log_weight,
    )


def _sequence_log_weight(logps: Tensor, old: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(n,) Σ log r + Σ log(rollout weight) of each sequence, every term bounded (TRL 1.16's VESPO)."""
    b = _behaviour(old, inputs)
    total = b.total(hold(_masked(logps.detach() - old, inputs), spec.log_ratio_clamp))
    weights, per_token = inputs.policy_weights, True
    if spec.rollout is not None and spec.rollout.level is not None:
        weights, per_token = correction.importance_weights(b, spec), spec.rollout.level == CorrectionLevel.TOKEN
    if weights is not None:
        logs = weights.log().clamp(math.log(1e-8), 20.0)
        total = total + (b.total(_masked(logs, inputs)) if per_token else logs)
    return total.to(logps.dtype)


def _folds(spec: LossSpec) -> bool:
    """Whether the objective takes the rollout weights in itself, so that only rejections multiply its loss."""
    return spec.definition is not None and spec.definition.weighs_sequences


def rollout_weights(old: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor | None:
    """(n,) detached rollout weights, 0 where rejected; None = all 1."""
    if spec.rollout is None or spec.rollout.by_batch:
        return inputs.policy_weights
    return correction.policy_weights(_behaviour(old, inputs), spec)


def _kept(logps: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor | None:
    """(n,) bool: tokens that neither the rollout correction nor the off-policy mask rejects; None = all."""
    old = _old(logps, inputs)
    weights = rollout_weights(old, inputs, spec)
    kept = None if weights is None or _folds(spec) else weights != 0
    if _folds(spec) and spec.rollout is not None:
        kept = ~correction.rejected(_behaviour(old, inputs), spec)
    if spec.off_policy_threshold is None:
        return kept
    stays = ~correction.off_policy(logps, inputs.advantages, _behaviour(old, inputs), spec)
    return stays if kept is None else kept & stays


def policy_weights(logps: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor | None:
    """(n,) what multiplies the policy term; None = 1."""
    kept = _kept(logps, inputs, spec)
    weights = None if _folds(spec) else rollout_weights(_old(logps, inputs), inputs, spec)
    if kept is not None:
        weights = torch.where(kept, torch.ones_like(logps) if weights is None else weights, 0.0)
    if inputs.selected is None or (spec.definition is not None and spec.definition.reads_selected):
        return weights
    return inputs.selected if weights is None else weights * inputs.selected


def per_token_loss(logps: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(n,) losses: v·ℓ(ratio, A) + kl_coef·KL."""
    t = terms(logps, inputs, spec)
    weights = policy_weights(logps, inputs, spec)
    if weights is None:
        loss = objective(t, spec)
    else:
        # A dropped token may have an infinite ratio or loss: neither its value nor its gradient may meet the 0. A NaN
        # log-prob stays NaN.
        drop = weights == 0
        loss = objective(t._replace(log_ratio=torch.where(drop, 0.0, t.log_ratio)), spec)
        loss = torch.where(drop, torch.where(t.logps.isnan(), torch.nan, 0.0), weights * loss)
    if spec.kl_coef:
        x = _masked(logps - inputs.ref_logps, inputs)
        loss = loss + spec.kl_coef * kl.kl_penalty(x, t.log_ratio.exp(), spec)
    return loss


def total_loss(logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """Σₜ wₜ·(v·ℓ + kl_coef·KL − entropy_coef·H)ₜ over the tokens that count, 0-d."""
    terms = inputs.weights * per_token_loss(logps, inputs, spec)
    if spec.entropy_coef:
        weights = inputs.weights if inputs.entropy_weights is None else inputs.entropy_weights
        terms = terms - weights * spec.entropy_coef * _masked(entropy, inputs)
    return _masked(terms, inputs).sum()


@torch.no_grad()
def statistics(logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(len(STATISTICS),) sums over the valid tokens, and the two extremes of the ratio."""
    t = terms(logps, inputs, spec)
    old = _old(logps, inputs)
    delta = _masked(logps - old, inputs)
    ratio = t.log_ratio.exp()
    clamped = beyond(raw_log_ratio(logps, inputs, spec), spec.log_ratio_clamp)
    columns = {"ratio": ratio, "ratio_square": ratio * ratio, "approx_kl": -delta}
    columns["approx_kl_k3"] = kl.k3(clamp_log_ratio(-delta, spec))
    columns |= _clip_columns(t, spec)
    if inputs.ref_logps is not None:
        x = _masked(logps - inputs.ref_logps, inputs)
        columns["ref_kl"] = kl.kl_penalty(x, ratio, spec)
        if spec.kl_coef and spec.kl_estimator == KLEstimator.K3:
            clamped = clamped | beyond(x, spec.log_ratio_clamp)
    columns["clamped"] = clamped
    if entropy is not None:
        columns["entropy"] = entropy
    columns |= _rollout_columns(logps, old, inputs, spec)
    sums = {name: _masked(values.to(logps.dtype), inputs).sum() for name, values in columns.items()}
    bound = logps.new_full((), torch.inf)
    sums["ratio_min"] = torch.where(inputs.valid, ratio, torch.inf).amin() if len(ratio) else bound
    sums["ratio_max"] = torch.where(inputs.valid, ratio, -torch.inf).amax() if len(ratio) else -bound
    return torch.stack([sums.get(name, logps.new_zeros(())) for name in STATISTICS]).float()


def _clip_columns(t: Terms, spec: LossSpec) -> dict[str, Tensor]:
    """Which tokens were clipped, by the sign of their advantage."""
    if spec.definition is None or spec.definition.flags is None:
        return {}
    low, high, dual = spec.definition.flags(t, spec)
    return {"clip_low": low, "clip_high": high} | ({} if dual is None else {"dual_clip": dual})


def _rollout_columns(logps: Tensor, old: Tensor, inputs: TokenInputs, spec: LossSpec) -> dict[str, Tensor]:
    """The rollout weights as applied, and the raw ratio squared."""
    columns = {}
    weights = rollout_weights(old, inputs, spec)
    if inputs.rollout_logps is not None:
        rho = clamp_log_ratio(_behaviour(old, inputs).log_rho, spec).exp()
        columns["rollout_ratio_square"] = rho * rho
        weights = rho if weights is None else weights
    if weights is not None:
        columns |= {"rollout_weight": weights, "rollout_weight_square": weights * weights}
    kept = _kept(logps, inputs, spec)
    if kept is not None:
        columns["rejected"] = ~kept
    return columns


def log_softmax_and_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V), (n,) -> log-prob of each token and entropy of each row, with 0·log 0 = 0 in value and gradient."""
    logps = logits.log_softmax(-1)
    chosen = logps.gather(-1, token_ids[:, None]).squeeze(-1)
    finite = torch.where(logps == -torch.inf, 0.0, logps)
    return chosen, -(logps.exp() * finite).sum(-1)


def logprobs(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None = None, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """The scoring oracle: (..., V), (...) -> log-probs and entropies, 0 under the mask, in at least float32."""
    logits = logits.to(wide(logits.dtype))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype)[..., None]
    valid = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool()
    rows = valid.flatten()
    scaled = (logits / temperature).flatten(0, -2)[rows]
    chosen, entropy = log_softmax_and_entropy(scaled, token_ids.flatten()[rows])
    place = rows.nonzero().squeeze(-1)

    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(rows.shape).index_put((place,), values).view(token_ids.shape)

    return scatter(chosen), scatter(entropy)


def token_loss(
    logps: Tensor, entropy: Tensor | None, flat: Flat, normalizer: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """Flat log-probs and entropies (N,) -> the scalar loss, differentiable, and the statistics.

    `flat` is as `correction.correct_batch` left it.
    """
    logps, entropy, inputs = expand(logps, entropy, flat, normalizer, spec)
    loss = total_loss(logps, entropy, inputs, spec)
    return loss, statistics(logps, entropy, inputs, spec)


def expand(
    logps: Tensor, entropy: Tensor | None, flat: Flat, normalizer: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor | None, TokenInputs]:
    """Log-probs and entropies in the working dtype, and the batch's token inputs with its picked tokens."""
    dtype = wide(logps.dtype)
    logps = logps.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    if spec.by_batch:
        advantages = token_advantages(flat, spec, dtype).masked_fill(~flat.valid(), 0)
        measured = None if entropy is None else entropy.detach()
        flat = select(logps.detach(), measured, advantages, flat, spec)
    return logps, entropy, token_inputs(flat, normalizer, spec, dtype)
