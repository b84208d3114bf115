"""The whole loss in plain torch: the oracle of every test, and step B of the "torch" backend.

Forward only; autograd (or `torch.func`) differentiates it, so it owes nothing to the hand-written derivatives of the
kernels. float64 stays float64, everything else is computed in float32. No triton import.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import objectives
from fastrl.advantages import token_advantages
from fastrl.flat import Flat
from fastrl.metrics import STATISTICS
from fastrl.ratio import log_ratio
from fastrl.reduction import token_weights
from fastrl.spec import KLEstimator, LossSpec


class TokenInputs(NamedTuple):
    """Everything of a batch that the loss needs besides log-probs and entropies, one row per token."""

    valid: Tensor  # (n,) bool
    advantages: Tensor  # (n,) 0 under the mask
    weights: Tensor  # (n,) 0 under the mask
    old_logps: Tensor | None  # (n,)
    ref_logps: Tensor | None  # (n,)
    rollout_logps: Tensor | None  # (n,)
    sequence: Tensor  # (n,) int64
    lengths: Tensor  # (S,)

    def take(self, rows: Tensor) -> TokenInputs:
        """The inputs of some rows; for a sequence-level ratio they must be whole sequences."""
        per_token: list[Any] = [None if field is None else field[rows] for field in self[:-1]]
        return TokenInputs._make([*per_token, self.lengths])


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a loss on inputs of `dtype` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_inputs(flat: Flat, normalizer: Tensor | None, spec: LossSpec, dtype: torch.dtype) -> TokenInputs:
    """Expand a batch to one row per token."""
    valid = flat.valid()

    def cast(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(dtype)

    return TokenInputs(
        valid=valid,
        advantages=token_advantages(flat, spec, dtype).masked_fill(~valid, 0),
        weights=token_weights(flat, normalizer, spec, dtype),
        old_logps=cast(flat.old_logps),
        ref_logps=cast(flat.ref_logps),
        rollout_logps=cast(flat.rollout_logps),
        sequence=flat.sequence_of_token(),
        lengths=flat.lengths,
    )


def _masked(values: Tensor, inputs: TokenInputs) -> Tensor:
    """0 where the token does not count, so that garbage there reaches neither the value nor the gradient."""
    return torch.where(inputs.valid, values, 0.0)


def raw_log_ratio(logps: Tensor, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """The unclamped log-ratio at the spec's level; old = stop-gradient(logp) when none was given."""
    old = logps.detach() if inputs.old_logps is None else inputs.old_logps
    return log_ratio(_masked(logps - old, inputs), inputs.sequence, inputs.lengths, spec)


def per_token_loss(logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(n,) losses: ℓ(ratio, A) + kl_coef·KL − entropy_coef·H."""
    ratio = objectives.clamp_log_ratio(raw_log_ratio(logps, inputs, spec), spec)
    loss = objectives.objective(ratio, inputs.advantages, spec)
    if spec.kl_coef:
        loss = loss + spec.kl_coef * objectives.kl_penalty(_masked(logps - inputs.ref_logps, inputs), spec)
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * _masked(entropy, inputs)
    return loss


def aggregate(loss: Tensor, inputs: TokenInputs) -> Tensor:
    """Σₜ wₜ·ℓₜ over the tokens that count."""
    return _masked(inputs.weights * loss, inputs).sum()


@torch.no_grad()
def statistics(logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """(len(STATISTICS),) sums over the valid tokens, and the two extremes of the ratio."""
    old = logps if inputs.old_logps is None else inputs.old_logps
    delta = _masked(logps - old, inputs)
    raw = raw_log_ratio(logps, inputs, spec)
    held = objectives.clamp_log_ratio(raw, spec)
    ratio, advantages = held.exp(), inputs.advantages
    clamped = _beyond(raw, spec)
    columns = {"ratio": ratio, "ratio_square": ratio * ratio, "approx_kl": -delta}
    columns["approx_kl_k3"] = objectives.k3(objectives.clamp_log_ratio(-delta, spec))
    if not spec.is_custom:
        columns |= _clip_columns(held, ratio, advantages, spec)
    if inputs.ref_logps is not None:
        x = _masked(logps - inputs.ref_logps, inputs)
        columns["ref_kl"] = objectives.kl_penalty(x, spec)
        if spec.kl_coef and spec.kl_estimator == KLEstimator.K3:
            clamped = clamped | _beyond(x, spec)
    columns["clamped"] = clamped
    if entropy is not None:
        columns["entropy"] = entropy
    if inputs.rollout_logps is not None:
        gap = objectives.clamp_log_ratio(old - inputs.rollout_logps, spec)
        columns["rollout_weight"] = torch.where(inputs.rollout_logps.isnan(), 1.0, gap.exp())
    sums = {name: _masked(values.to(logps.dtype), inputs).sum() for name, values in columns.items()}
    bound = logps.new_full((), torch.inf)
    sums["ratio_min"] = torch.where(inputs.valid, ratio, torch.inf).amin() if len(ratio) else bound
    sums["ratio_max"] = torch.where(inputs.valid, ratio, -torch.inf).amax() if len(ratio) else -bound
    return torch.stack([sums.get(name, logps.new_zeros(())) for name in STATISTICS]).float()


def _beyond(log_ratio: Tensor, spec: LossSpec) -> Tensor:
    """Where the clamp changes a log-ratio."""
    if spec.log_ratio_clamp is None:
        return torch.zeros_like(log_ratio, dtype=torch.bool)
    return log_ratio.abs() > spec.log_ratio_clamp


def _clip_columns(held: Tensor, ratio: Tensor, advantages: Tensor, spec: LossSpec) -> dict[str, Tensor]:
    """Which tokens were clipped, by the sign of their advantage."""
    columns = {}
    if spec.epsilon_low is not None:
        columns["clip_low"] = (ratio < 1 - spec.epsilon_low) & (advantages < 0)
    if spec.epsilon_high is not None:
        columns["clip_high"] = (ratio > 1 + spec.epsilon_high) & (advantages > 0)
    if spec.dual_clip is not None:
        loss = objectives.objective(held, advantages, spec.replace(dual_clip=None))
        columns["dual_clip"] = objectives.dual_clipped(loss, advantages, spec)
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
    """Flat log-probs and entropies (N,) -> the scalar loss, differentiable, and the statistics."""
    dtype = wide(logps.dtype)
    logps = logps.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    inputs = token_inputs(flat, normalizer, spec, dtype)
    loss = aggregate(per_token_loss(logps, entropy, inputs, spec), inputs)
    return loss, statistics(logps, entropy, inputs, spec)
