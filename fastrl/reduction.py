"""Aggregation as one weight per token, so that loss = Σₜ wₜ·ℓₜ. Nothing else in the library knows these modes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.flat import Flat, segment_sum
from fastrl.spec import Aggregation, LossSpec

TOKENS, SEQUENCES = 0, 1  # places within `Flat.counts`


class Weighting(NamedTuple):
    """An aggregation in three numbers: wₜ = mₜ · (1/lengthᵢ if per_sequence_mean) · scale / D."""

    per_sequence_mean: bool
    denominator: int | None  # which local count D is when no normaliser is given; None = 1
    scale: float


def weighting(spec: LossSpec) -> Weighting:
    """How the spec's aggregation weighs a token."""
    return _weighting(spec.aggregation, spec.max_length)


def _weighting(aggregation: str, max_length: int | None) -> Weighting:
    match aggregation:
        case Aggregation.TOKEN_MEAN:
            return Weighting(False, TOKENS, 1.0)
        case Aggregation.TOKEN_SUM:
            return Weighting(False, None, 1.0)
        case Aggregation.SEQ_MEAN_TOKEN_MEAN:
            return Weighting(True, SEQUENCES, 1.0)
        case Aggregation.SEQ_MEAN_TOKEN_SUM:
            return Weighting(False, SEQUENCES, 1.0)
        case Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
            return Weighting(False, SEQUENCES, 1.0 / (max_length or 1))
    raise AssertionError(aggregation)


def denominator(counts: Tensor, normalizer: Tensor | None, spec: LossSpec) -> Tensor | None:
    """D as a 0-d tensor: the caller's normaliser, or the local count, at least 1; None for 1."""
    if normalizer is not None:
        return normalizer
    place = weighting(spec).denominator
    return None if place is None else counts[place].clamp_min(1)


def token_weights(flat: Flat, normalizer: Tensor | None, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """(N,) weights, 0 under the mask.

    token-mean Σ(m·l)/D, D = valid tokens; token-sum Σ(m·l); seq-mean-token-mean Σᵢ(meanₜ l)/D and seq-mean-token-sum
    Σᵢ(Σₜ l)/D, D = sequences with a valid token; seq-mean-token-sum-norm Σᵢ(Σₜ l)/(D·max_length).
    """
    how = weighting(spec)
    weights = flat.per_token(_weights(flat.lengths, denominator(flat.counts, normalizer, spec), how, dtype))
    return weights if flat.mask is None else torch.where(flat.mask, weights, 0.0)


def entropy_weights(flat: Flat, spec: LossSpec, dtype: torch.dtype) -> Tensor | None:
    """(N,) weights of the entropy bonus by `entropy_aggregation`, over the tokens that the entropy quantile keeps and
    by their own count; None = those of the loss."""
    if spec.entropy_aggregation is None:
        return None
    how = _weighting(spec.entropy_aggregation, None)
    keep = flat.valid()
    if spec.top_entropy_quantile < 1 and flat.selected is not None:
        keep = keep & (flat.selected != 0)
    lengths = segment_sum(keep.to(dtype), flat.sequence_of_token(), flat.num_sequences)
    counts = torch.stack([lengths.sum(), (lengths > 0).sum().to(dtype)])
    count = None if how.denominator is None else counts[how.denominator].clamp_min(1)
    return torch.where(keep, flat.per_token(_weights(lengths, count, how, dtype)), 0.0)


def padded_weights(keep: Tensor, normalizer: Tensor | None, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """(B, T) weights as `token_weights`, from a (B, T) bool mask alone."""
    lengths = keep.sum(-1, keepdim=True)
    counts = torch.stack([lengths.sum(), (lengths > 0).sum()])
    return torch.where(keep, _weights(lengths, denominator(counts, normalizer, spec), weighting(spec), dtype), 0.0)


def _weights(lengths: Tensor, count: Tensor | None, how: Weighting, dtype: torch.dtype) -> Tensor:
    """The weight of a valid token of each sequence, in the shape of the lengths."""
    weights = torch.full_like(lengths, how.scale, dtype=dtype)
    if how.per_sequence_mean:
        weights = weights / lengths.to(dtype).clamp_min(1)
    return weights if count is None else weights / count.to(dtype)
