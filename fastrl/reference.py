"""The whole loss in plain torch: the oracle of every test, and step B of the "torch" backend.

Forward only; autograd (or `torch.func`) differentiates it, so it owes nothing to the hand-written derivatives of the
kernels. float64 stays float64, everything else is computed in float32. No triton import.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import correction, kl
from fastrl.clamping import beyond, clamp_log_ratio, hold
from fastrl.correction import Behaviour
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.metrics import STATISTICS
from fastrl.objectives import objective
from fastrl.options import CorrectionLevel
from fastrl.ratio import log_ratio
from fastrl.registry import Terms
from fastrl.spec import KLEstimator, LossSpec, RatioLevel
from fastrl.token_inputs import TokenInputs, expand


class Measured(NamedTuple):
    """What the loss and its statistics share of n tokens, (n,) each.

    Nothing that stood under the mask is left: there a difference is 0, a ratio 1, an advantage 0, so that neither a
    value nor a gradient of a masked token reaches anything.
    """

    terms: Terms
    delta: Tensor  # logp − old
    unheld: Tensor  # the log-ratio at the spec's level before it is held to ±log_ratio_clamp
    ratio: Tensor  # at the spec's level, held
    ref_delta: Tensor | None  # logp − ref
    ref_kl: Tensor | None  # the spec's estimate, of a loss that has it as a term
    rollout_weights: Tensor | None  # detached, 0 where rejected, arbitrary under the mask; None = all 1
    kept: Tensor | None  # bool: what neither the rollout correction nor the off-policy mask rejects; None = all


def _masked(values: Tensor, inputs: TokenInputs) -> Tensor:
    """0 where the token does not count."""
    return torch.where(inputs.valid, values, 0.0)


def measure(logps: Tensor, inputs: TokenInputs, spec: LossSpec) -> Measured:
    """Log-probs against the other policies of the batch. Without old log-probs the ratio is against the stop-gradient
    of these."""
    logps = _masked(logps, inputs)
    old = logps.detach() if inputs.old_logps is None else _masked(inputs.old_logps, inputs)
    delta = logps - old
    unheld = _log_ratio(delta, inputs, spec)
    held = clamp_log_ratio(unheld, spec)
    terms = Terms(
        logps=logps,
        log_ratio=held,
        advantages=inputs.advantages,
        old_logps=old,
        selected=inputs.selected,
        sequence_log_weight=_sequence_log_weight(delta, old, inputs, spec) if _folds(spec) else None,
    )
    ratio = held.exp()
    ref_delta = None if inputs.ref_logps is None else logps - _masked(inputs.ref_logps, inputs)
    ref_kl = kl.kl_penalty(ref_delta, ratio, spec) if spec.kl_coef else None
    weights = _rollout_weights(old, inputs, spec)
    return Measured(terms, delta, unheld, ratio, ref_delta, ref_kl, weights, _kept(terms, weights, inputs, spec))


def _log_ratio(delta: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """The unheld log-ratio at the spec's level."""
    if spec.definition is not None and spec.definition.prepare is not None:
        delta = spec.definition.prepare(delta, inputs.advantages, spec)
    if spec.ratio_level == RatioLevel.TOKEN:
        return delta
    return _masked(log_ratio(delta, inputs.sequence, inputs.lengths, spec), inputs)


def _behaviour(old: Tensor, inputs: TokenInputs) -> Behaviour:
    sampled = old if inputs.rollout_logps is None else inputs.rollout_logps
    return Behaviour(old, sampled, inputs.valid, inputs.sequence, inputs.lengths)


def _sequence_log_weight(delta: Tensor, old: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(n,) Σ log r + Σ log(rollout weight) of each sequence, every term bounded (TRL 1.16's VESPO)."""
    b = _behaviour(old, inputs)
    total = b.total(hold(delta.detach(), spec.log_ratio_clamp))
    weights, per_token = inputs.policy_weights, True
    if spec.rollout is not None and spec.rollout.level is not None:
        weights, per_token = correction.importance_weights(b, spec), spec.rollout.level == CorrectionLevel.TOKEN
    if weights is not None:
        logs = weights.log().clamp(math.log(1e-8), 20.0)
        total = total + (b.total(_masked(logs, inputs)) if per_token else logs)
    return total.to(delta.dtype)


def _folds(spec: LossSpec) -> bool:
    """Whether the objective takes the rollout weights in itself, so that only rejections multiply its loss."""
    return spec.definition is not None and spec.definition.weighs_sequences


def _rollout_weights(old: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor | None:
    if spec.rollout is None or spec.rollout.by_batch:
        return inputs.policy_weights
    return correction.policy_weights(_behaviour(old, inputs), spec)


def _kept(t: Terms, weights: Tensor | None, inputs: TokenInputs, spec: LossSpec) -> Tensor | None:
    kept = None if weights is None or _folds(spec) else weights != 0
    if _folds(spec) and spec.rollout is not None:
        kept = ~correction.rejected(_behaviour(t.old_logps, inputs), spec)
    if spec.off_policy_threshold is None:
        return kept
    stays = ~correction.off_policy(t.logps, inputs.advantages, _behaviour(t.old_logps, inputs), spec)
    return stays if kept is None else kept & stays


def policy_weights(m: Measured, inputs: TokenInputs, spec: LossSpec) -> Tensor | None:
    """(n,) what multiplies the policy term; None = 1."""
    weights = None if _folds(spec) else m.rollout_weights
    if m.kept is not None:
        weights = torch.where(m.kept, torch.ones_like(m.delta) if weights is None else weights, 0.0)
    if inputs.selected is None or (spec.definition is not None and spec.definition.reads_selected):
        return weights
    return inputs.selected if weights is None else weights * inputs.selected


def per_token_loss(m: Measured, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(n,) losses: v·ℓ(ratio, A) + kl_coef·KL; 0 under the mask."""
    t = m.terms
    weights = policy_weights(m, inputs, spec)
    if weights is None:
        loss = _masked(objective(t, spec), inputs)  # which need not be finite at an advantage of 0
    else:
        # A dropped token may have an infinite ratio or loss: neither its value nor its gradient may meet the 0. A NaN
        # log-prob stays NaN. Under the mask a weight may be infinite, that of a sequence.
        drop = (weights == 0) | ~inputs.valid
        loss = objective(t._replace(log_ratio=torch.where(drop, 0.0, t.log_ratio)), spec)
        loss = torch.where(drop, torch.where(t.logps.isnan(), torch.nan, 0.0), weights * loss)
    if spec.kl_coef:
        loss = loss + spec.kl_coef * m.ref_kl
    return loss


def total_loss(m: Measured, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """Σₜ wₜ·(v·ℓ + kl_coef·KL − entropy_coef·H)ₜ over the tokens that count, 0-d."""
    losses = inputs.weights * per_token_loss(m, inputs, spec)
    if spec.entropy_coef:
        weights = inputs.weights if inputs.entropy_weights is None else inputs.entropy_weights
        losses = losses - weights * spec.entropy_coef * _masked(entropy, inputs)
    return losses.sum()


@torch.no_grad()
def statistics(m: Measured, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(len(STATISTICS),) sums over the valid tokens, and the two extremes of the ratio."""
    t, valid = m.terms, inputs.valid
    ratio = _masked(m.ratio, inputs)
    own = t.log_ratio if m.unheld is m.delta else clamp_log_ratio(m.delta, spec)
    columns = {"ratio": ratio, "ratio_square": ratio * ratio, "approx_kl": -m.delta, "approx_kl_k3": kl.k3(-own)}
    columns |= _clip_columns(t, spec)
    clamped = beyond(m.unheld, spec.log_ratio_clamp)
    if m.ref_delta is not None:
        columns["ref_kl"] = kl.kl_penalty(m.ref_delta, ratio, spec) if m.ref_kl is None else m.ref_kl
        if spec.kl_coef and spec.kl_estimator == KLEstimator.K3:
            clamped = clamped | beyond(m.ref_delta, spec.log_ratio_clamp)
    columns["clamped"] = clamped
    if entropy is not None:
        columns["entropy"] = _masked(entropy, inputs)
    columns |= _rollout_columns(m, inputs, spec)
    sums = {
        name: ((values & valid) if values.dtype == torch.bool else values).sum(dtype=ratio.dtype)
        for name, values in columns.items()
    }
    bound = ratio.new_full((), torch.inf)
    sums["ratio_min"] = torch.where(valid, ratio, torch.inf).amin() if len(ratio) else bound
    sums["ratio_max"] = torch.where(valid, ratio, -torch.inf).amax() if len(ratio) else -bound
    return torch.stack([sums.get(name, ratio.new_zeros(())) for name in STATISTICS]).float()


def _clip_columns(t: Terms, spec: LossSpec) -> dict[str, Tensor]:
    """Which tokens were clipped, by the sign of their advantage."""
    if spec.definition is None or spec.definition.flags is None:
        return {}
    low, high, dual = spec.definition.flags(t, spec)
    return {"clip_low": low, "clip_high": high} | ({} if dual is None else {"dual_clip": dual})


def _rollout_columns(m: Measured, inputs: TokenInputs, spec: LossSpec) -> dict[str, Tensor]:
    """The rollout weights as applied, and the raw ratio squared; the flags are arbitrary under the mask."""
    columns = {}
    weights = m.rollout_weights
    if inputs.rollout_logps is not None:
        rho = _masked(clamp_log_ratio(_behaviour(m.terms.old_logps, inputs).log_rho, spec).exp(), inputs)
        columns["rollout_ratio_square"] = rho * rho
        weights = rho if weights is None else weights
    if weights is not None:
        weights = _masked(weights, inputs)
        columns |= {"rollout_weight": weights, "rollout_weight_square": weights * weights}
    if m.kept is not None:
        columns["rejected"] = ~m.kept
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
    measured = measure(logps, inputs, spec)
    loss = total_loss(measured, entropy, inputs, spec)
    return loss, statistics(measured, entropy, inputs, spec)
