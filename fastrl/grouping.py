"""Which rows of a batch share a prompt, and what each row learns of its group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.flat import segment_sum


class Grouping(NamedTuple):
    """Groups of R rows. The methods take (R, ...) values and give each row its group's number, elementwise."""

    size: int  # that many consecutive rows to a group; 0 with numbers
    numbers: Tensor | None  # (R,) int64 below R

    @classmethod
    def of(cls, group_size: int | None, group_ids: Tensor | None) -> Grouping:
        """From arguments that `check_groups` accepted; no host synchronisation (torch.unique has one)."""
        if group_ids is None:
            return cls(group_size, None)
        ordered, order = torch.sort(group_ids)
        starts = torch.zeros_like(ordered, dtype=torch.int64)
        starts[1:] = ordered[1:] != ordered[:-1]
        return cls(0, torch.empty_like(starts).scatter_(0, order, starts.cumsum(0)))

    def repeated(self, times: int) -> Grouping:
        """The grouping of `times` such batches, one after the other, that have no group in common."""
        if self.numbers is None:
            return self
        batches = torch.arange(times, device=self.numbers.device)[:, None]
        return Grouping(0, (self.numbers + self.numbers.shape[0] * batches).reshape(-1))

    def sum(self, values: Tensor) -> Tensor:
        if self.numbers is None:
            return self._spread(self._together(values).sum(1, keepdim=True), values)
        return segment_sum(values, self.numbers, values.shape[0])[self.numbers]

    def least(self, values: Tensor) -> Tensor:
        return self._extreme(values, "amin", torch.inf)

    def greatest(self, values: Tensor) -> Tensor:
        return self._extreme(values, "amax", -torch.inf)

    def varies(self, values: Tensor) -> Tensor:
        """(R, ...) bool; NaN counts as different."""
        return self.least(values) != self.greatest(values)

    def _extreme(self, values: Tensor, reduce: str, start: float) -> Tensor:
        if self.numbers is None:
            return self._spread(getattr(self._together(values), reduce)(1, keepdim=True), values)
        index = self.numbers.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        return torch.full_like(values, start).scatter_reduce(0, index, values, reduce)[self.numbers]

    def _together(self, values: Tensor) -> Tensor:
        """(R, ...) -> (R / G, G, ...)"""
        return values.unflatten(0, (values.shape[0] // self.size, self.size))

    def _spread(self, per_group: Tensor, like: Tensor) -> Tensor:
        """(R / G, 1, ...) -> (R, ...)"""
        return per_group.expand(-1, self.size, *like.shape[1:]).reshape(like.shape)


def check_groups(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> None:
    """Raise unless exactly one grouping is given and fits the S rewards, (S,) or (S, ...)."""
    if (group_size is None) == (group_ids is None):
        came = "neither" if group_size is None else "both"
        _checks.refuse("group_size", "exactly one of group_size and group_ids with rewards", came)
    if group_ids is not None:
        _checks.integer("group_ids", group_ids)
        _checks.shape("group_ids", group_ids, tuple(rewards.shape[:1]), "one id per sequence")
        _checks.same_device("group_ids", group_ids, rewards.device, "rewards")
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        _checks.refuse("group_size", "a positive int", group_size, error=TypeError)
    if group_size < 1 or rewards.shape[0] % group_size:
        _checks.refuse(
            "group_size",
            f"a positive divisor of the {rewards.shape[0]} rewards",
            str(group_size),
            "pass group_ids for groups of unequal size",
        )
