"""What an objective did to each token of a call: for metrics that a trainer counts by sequence or by its own rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import inputs, reference
from fastrl.advantages import token_advantages
from fastrl.functional import LossOutput
from fastrl.objectives import vespo_weight
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec
from fastrl.token_inputs import expand


class TokenMetrics(NamedTuple):
    """Tensors in the shape of `rollouts.token_ids`; under the mask the flags are False. A None does not apply."""

    clip_low: Tensor | None
    """bool: clipped at the lower bound, as `clip_fraction_low` counts it; None where the objective does not clip."""
    clip_high: Tensor | None
    """bool: clipped at the upper bound, as `clip_fraction_high` counts it."""
    sequence_weight: Tensor | None
    """vespo's φ(w) of the token's sequence, also under the mask; 1 for a sequence without a token that counts."""
    high_entropy: Tensor | None
    """bool: the tokens that `top_entropy_quantile` keeps; None while it is 1."""


@torch.no_grad()
def token_metrics(out: LossOutput, rollouts: Rollouts, spec: LossSpec) -> TokenMetrics:
    """The flags and weights of each token, from the log-probs and entropies that a loss returned.

    They are computed once more in plain torch, by the formulas of `objectives.py`, in O(tokens). Nothing waits for the
    device. With `rollout` corrections that mask tokens of the whole batch, those tokens count as masked.
    """
    flat = inputs.flat(rollouts, spec, out.logps.dtype)
    entropy = None if out.entropy is None else out.entropy.reshape(-1)
    logps, _, batch = expand(out.logps.reshape(-1), entropy, flat, None, spec)
    terms, definition = reference.measure(logps, batch, spec).terms, spec.definition
    low = high = weight = kept = None

    def shaped(values: Tensor) -> Tensor:
        return values.view(rollouts.shape)

    if definition is not None and definition.flags is not None:
        flags = definition.flags(terms, spec)
        low, high = shaped(flags.low & batch.valid), shaped(flags.high & batch.valid)
    if spec.objective == "vespo":
        every = token_advantages(flat, spec, logps.dtype)  # those of masked tokens too, which `terms` has at 0
        weight = shaped(vespo_weight(terms._replace(advantages=every), spec))
    if spec.top_entropy_quantile < 1:
        kept = shaped((batch.selected != 0) & batch.valid)
    return TokenMetrics(low, high, weight, kept)
