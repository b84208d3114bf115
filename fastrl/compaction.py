"""Which rows of a batch are worth projecting, and in which order: masked ones never, those without a gradient last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.chunking import pieces
from fastrl.flat import Flat, segment_sum
from fastrl.spec import LossSpec


class LiveRows(NamedTuple):
    """The rows worth projecting, those that can carry a gradient first."""

    order: Tensor  # (n,) int64
    total: int  # how many there are
    grad_count: int  # how many of them, from the front, can carry a gradient
    tokens: int  # how many rows the batch has
    ends: list[int]  # sequence boundaries within `order`, when the plan needs them
    found: Tensor | None = None  # (2,) the counts as the device knows them, to hold the caller's against

    @classmethod
    def select(
        cls, flat: Flat, spec: LossSpec, advantages: Tensor, by_sequence: bool, row_counts: list[int]
    ) -> LiveRows:
        """Drop masked rows; put rows whose gradient is known to be zero (zero advantage, no penalty) last.

        One host synchronisation, to learn the counts (and for whole sequences their lengths); none when the counts are
        given, or when every row counts and can carry a gradient.
        """
        valid = flat.valid()
        live = valid & (advantages != 0) if spec.vanishes else valid
        sequence = flat.sequence_of_token()
        if by_sequence:
            live_sequences = segment_sum(live.float(), sequence, flat.num_sequences) > 0
            live = valid & live_sequences[sequence]
        elif flat.mask is None and not spec.vanishes and not row_counts:
            rows = torch.arange(flat.num_tokens, device=valid.device)
            return cls(rows, flat.num_tokens, flat.num_tokens, flat.num_tokens, [])
        key = 2 - valid.int() - live.int()
        if not by_sequence:
            found = torch.stack([valid.sum(), live.sum()])
            counts = row_counts or found.tolist()
            if counts[0] == counts[1] == flat.num_tokens:  # also if the caller is wrong: rows stay with their tokens
                order = torch.arange(flat.num_tokens, device=valid.device)
            else:
                order = torch.argsort(key, stable=True)
            return cls(order[: counts[0]], counts[0], counts[1], flat.num_tokens, [], found)
        order = torch.argsort(key, stable=True)
        lengths, alive = torch.stack([flat.lengths, live_sequences.float()]).tolist()
        ends = [0]
        for wanted in (1.0, 0.0):
            for length, is_live in zip(lengths, alive, strict=True):
                if is_live == wanted and length:
                    ends.append(ends[-1] + int(length))
        grad_count = int(sum(length for length, is_live in zip(lengths, alive, strict=True) if is_live))
        if row_counts and row_counts[0] != ends[-1]:
            raise ValueError(
                f"row_counts: expected ({ends[-1]}, ...), the tokens that count, got {tuple(row_counts)}; leave it None"
            )
        # The second count is of whole sequences here, as read above: the caller's is not needed.
        found = torch.stack([valid.sum(), torch.full_like(valid.sum(), row_counts[1])]) if row_counts else None
        return cls(order[: ends[-1]], ends[-1], grad_count, flat.num_tokens, ends, found)

    @property
    def in_order(self) -> bool:
        """Whether the order is that of the batch: every row counts and can carry a gradient."""
        return self.grad_count == self.total == self.tokens

    def chunks(self, start: int, stop: int, limit: int) -> Iterator[Tensor]:
        """Rows start:stop in pieces of at most `limit`, on sequence boundaries if there are any."""
        if not self.ends:
            yield from pieces(self.order[start:stop], limit)
            return
        while start < stop:
            end = min(start + limit, stop)
            if end < stop:
                end = max(at for at in self.ends if at <= end)
            yield self.order[start:end]
            start = end
