"""Rollouts as flat rows: the one form that everything below the public functions sees.

Padded (B, T) and packed (N,) batches differ only in how a token finds its sequence; that difference lives in the three
methods here and in `kernels/fastrl_kernels/policy.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Flat(NamedTuple):
    """N token rows of S sequences. Tensors are contiguous; a None is an input that was not given."""

    token_ids: Tensor  # (N,) int64
    mask: Tensor | None  # (N,) bool
    advantages: Tensor | None  # (N,) or (S,)
    rewards: Tensor | None  # (R,), R >= S when this is a micro-batch of a larger batch
    group_ids: Tensor | None  # (R,) int64
    old_logps: Tensor | None  # (N,)
    ref_logps: Tensor | None  # (N,)
    rollout_logps: Tensor | None  # (N,)
    policy_weights: Tensor | None  # (N,) detached factors of the policy term: given, or from `correction.py`
    selected: Tensor | None  # (N,) 0 or 1: given, or from `selection.py`
    sequence_ids: Tensor | None  # (N,) int32, packed only
    cu_seqlens: Tensor | None  # (S + 1,) int64, packed only
    lengths: Tensor  # (S,) fp32, valid tokens of each sequence
    counts: Tensor  # (3,) fp32: valid tokens, sequences with a valid token, tokens excluded by a rollout correction
    width: int  # T of a padded batch, 0 when packed
    group_size: int  # 0 when not given
    first_sequence: int  # place of sequence 0 within `rewards`
    per_token_advantages: int  # 1 when `advantages` is (N,), 0 when it is (S,)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.lengths.shape[0]

    def split_fields(self) -> tuple[list[Tensor | None], list[int]]:
        """Tensors and ints apart, the two lists that an operator can carry; in this order they make a `Flat` again."""
        tensors: list[Any] = [field for field in self if not isinstance(field, int)]
        sizes: list[Any] = [field for field in self if isinstance(field, int)]
        return tensors, sizes

    def valid(self) -> Tensor:
        """(N,) bool: the tokens that count."""
        if self.mask is None:
            return torch.ones_like(self.token_ids, dtype=torch.bool)
        return self.mask

    def sequence_of_token(self) -> Tensor:
        """(N,) int64: the sequence of each token."""
        if self.sequence_ids is not None:
            return self.sequence_ids.long()
        rows = torch.arange(self.num_tokens, device=self.token_ids.device)
        return rows // max(self.width, 1)

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """(S,) -> (N,): each token takes its sequence's value."""
        return per_sequence[self.sequence_of_token()]


def segment_total(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """(n,) -> (n,): the sum over its segment at each value, in float64: one after the other, forward here and backward
    in the gather, 65,536 terms would cost fp32 four digits."""
    return segment_sum(values.double(), segment, num_segments)[segment]


def segment_max(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """(n,) -> (n,): the maximum of its segment at each value."""
    most = values.new_full((num_segments,), -torch.inf).scatter_reduce(0, segment, values, "amax")
    return most[segment]


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """(n, ...) -> (num_segments, ...): sums of the rows that share a segment, differentiable."""
    return values.new_zeros((num_segments, *values.shape[1:])).index_add(0, segment, values)
