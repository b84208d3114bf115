"""A batch expanded to one row per token: what the loss needs besides log-probs and entropies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.advantages import token_advantages
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.reduction import entropy_weights, token_weights
from fastrl.selection import select
from fastrl.spec import LossSpec


class TokenInputs(NamedTuple):
    """n tokens of S sequences, maybe a part of the batch."""

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
        advantages=_advantages(flat, spec, dtype),
        weights=token_weights(flat, normalizer, spec, dtype),
        entropy_weights=entropy_weights(flat, spec, dtype),
        old_logps=cast(flat.old_logps),
        ref_logps=cast(flat.ref_logps),
        rollout_logps=cast(flat.rollout_logps),
        policy_weights=None if flat.policy_weights is None else torch.where(valid, cast(flat.policy_weights), 0.0),
        selected=cast(flat.selected),
        sequence=flat.sequence_of_token(),
        lengths=flat.lengths,
    )


def _advantages(flat: Flat, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """(N,) advantages, 0 under the mask."""
    return torch.where(flat.valid(), token_advantages(flat, spec, dtype), 0.0)


def with_selection(logps: Tensor, entropy: Tensor | None, flat: Flat, spec: LossSpec) -> Flat:
    """The batch with the tokens that the spec picks by these log-probs and entropies, if it picks any."""
    if not spec.by_batch:
        return flat
    measured = None if entropy is None else entropy.detach()
    return select(logps.detach(), measured, _advantages(flat, spec, wide(logps.dtype)), flat, spec)


def expand(
    logps: Tensor, entropy: Tensor | None, flat: Flat, normalizer: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor | None, TokenInputs]:
    """Log-probs and entropies in the working dtype, and the batch's token inputs with its picked tokens."""
    dtype = wide(logps.dtype)
    logps = logps.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    return logps, entropy, token_inputs(with_selection(logps, entropy, flat, spec), normalizer, spec, dtype)
