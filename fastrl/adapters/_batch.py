"""Foreign batches: what several frameworks' formats have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastrl.flat import segment_sum
from fastrl.metrics import Metrics


def no_ids(like: Tensor) -> Tensor:
    """Token ids of a batch that comes with log-probs alone, where nothing reads them."""
    return torch.zeros(like.shape, dtype=torch.long, device=like.device)


def offsets(lengths: Iterable[int], device: torch.device) -> Tensor:
    """(S + 1,) offsets of sequences laid end to end, from their lengths on the host."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + int(length))
    return torch.tensor(ends, device=device)


def flat_offsets(like: Tensor) -> Tensor | None:
    """`cu_seqlens` of a 1-D batch whose sequences do not matter to the loss: one; None for a 2-D batch."""
    return offsets([like.shape[0]], like.device) if like.ndim == 1 else None


def sequence_means(values: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(S,) mean of each sequence's values over the tokens that count; 0 without any."""
    if cu_seqlens is None:
        return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    places = torch.arange(values.shape[0], device=values.device)
    sequence = torch.searchsorted(cu_seqlens.long(), places, right=True) - 1
    count = cu_seqlens.shape[0] - 1
    total, tokens = (segment_sum(x, sequence, count) for x in (torch.where(mask, values, 0.0), mask.to(values.dtype)))
    return total / tokens.clamp(min=1)


def part_of_mean(metrics: Metrics, name: str, denominator: Any) -> Tensor:
    """This micro-batch's part of a mean over tokens, for a trainer that adds the parts: the sum / the global count."""
    return metrics[name] * metrics["tokens"] / denominator


def k1_bounds(low: float | None, high: float | None) -> dict[str, Any]:
    """Bounds on a ratio old / rollout (or its geometric mean, or product) as bounds on k1 = −log of it."""
    if high is not None and high <= 0:
        raise ValueError(f"upper bound on a ratio: expected a number > 0, got {high!r}; it would reject everything")
    return {
        "reject_lower": None if high is None else -math.log(high),
        "reject_upper": None if low is None or low <= 0 else -math.log(low),
    }
