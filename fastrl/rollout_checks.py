"""What `Rollouts` refuse: tensors of another shape, type or device, and arguments that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastrl import _checks
from fastrl.grouping import check_groups

if TYPE_CHECKING:
    from fastrl.rollouts import Rollouts

FLAGS = ("mask", "selected")
PER_TOKEN = ("old_logps", "ref_logps", "rollout_logps", "rollout_weights")


def check(rollouts: Rollouts) -> None:
    """Raise ValueError or TypeError, naming the argument, what was expected, what came, and what to do."""
    _layout(rollouts)
    _per_token(rollouts)
    _advantages(rollouts)


def _layout(rollouts: Rollouts) -> None:
    _checks.integer("token_ids", rollouts.token_ids)
    if rollouts.cu_seqlens is None:
        if rollouts.token_ids.ndim != 2:
            remedy = "add a batch dimension, or pass cu_seqlens for packed sequences"
            _checks.refuse("token_ids", "shape (B, T)", rollouts.token_ids, remedy)
        return
    if rollouts.token_ids.ndim != 1:
        _checks.refuse("token_ids", "shape (N,) with cu_seqlens", rollouts.token_ids, "flatten it")
    _checks.integer("cu_seqlens", rollouts.cu_seqlens)
    if rollouts.cu_seqlens.ndim != 1 or rollouts.cu_seqlens.shape[0] < 1:
        _checks.refuse("cu_seqlens", "shape (S + 1,)", rollouts.cu_seqlens, "start it with 0 and end it with N")
    _checks.same_device("cu_seqlens", rollouts.cu_seqlens, rollouts.token_ids.device, "token_ids")
    if _free_to_read(rollouts):
        ends, total = rollouts.cu_seqlens, rollouts.token_ids.shape[0]
        if ends[0] != 0 or ends[-1] != total or bool((ends[1:] < ends[:-1]).any()):
            _checks.refuse("cu_seqlens", f"offsets that rise from 0 to N = {total}", str(ends.tolist()))


def _free_to_read(rollouts: Rollouts) -> bool:
    """Whether looking at values costs no synchronisation."""
    return rollouts.token_ids.device.type == "cpu" and not torch.compiler.is_compiling()


def _per_token(rollouts: Rollouts) -> None:
    shape, device = tuple(rollouts.token_ids.shape), rollouts.token_ids.device
    for name in (*FLAGS, *PER_TOKEN):
        value = getattr(rollouts, name)
        if value is None:
            continue
        _checks.tensor(name, value)
        remedy = "align it with token_ids: position t scores token t (see shift_for_next_token)"
        _checks.shape(name, value, shape, "the shape of token_ids", remedy)
        _checks.same_device(name, value, device, "token_ids")
        if name not in FLAGS:
            _checks.floating(name, value)
            _checks.no_grad_needed(name, value)
    for name in FLAGS:
        flags = getattr(rollouts, name)
        readable = flags is not None and flags.dtype != torch.bool and _free_to_read(rollouts)
        if readable and not bool(((flags == 0) | (flags == 1)).all()):
            _checks.refuse(name, "bool or only 0 and 1", "other values", "use advantages to weigh tokens")
    if rollouts.row_counts is not None:
        counts = rollouts.row_counts
        if len(counts) != 2 or not 0 <= counts[1] <= counts[0] <= rollouts.token_ids.numel():
            expected = "(tokens that count, of them those that can carry a gradient)"
            _checks.refuse("row_counts", expected, repr(counts))


def _advantages(rollouts: Rollouts) -> None:
    if (rollouts.advantages is None) == (rollouts.rewards is None):
        came = "neither" if rollouts.advantages is None else "both"
        _checks.refuse("advantages", "either advantages or rewards", came)
    if rollouts.rewards is None:
        for name in ("group_size", "group_ids"):
            if getattr(rollouts, name) is not None:
                _checks.refuse(name, "None with given advantages", getattr(rollouts, name), "pass rewards instead")
        _given_advantages(rollouts)
        return
    _checks.floating("rewards", rollouts.rewards)
    _checks.no_grad_needed("rewards", rollouts.rewards)
    _checks.same_device("rewards", rollouts.rewards, rollouts.token_ids.device, "token_ids")
    if rollouts._place.rows is None:
        _checks.shape(
            "rewards", rollouts.rewards, (rollouts.num_sequences,), "one per sequence", "sum token rewards first"
        )
    check_groups(rollouts.rewards, rollouts.group_size, rollouts.group_ids)


def _given_advantages(rollouts: Rollouts) -> None:
    _checks.floating("advantages", rollouts.advantages)
    _checks.no_grad_needed("advantages", rollouts.advantages)
    _checks.same_device("advantages", rollouts.advantages, rollouts.token_ids.device, "token_ids")
    s = rollouts.num_sequences
    allowed = [(s,), tuple(rollouts.token_ids.shape)] + ([(s, 1)] if rollouts.cu_seqlens is None else [])
    if tuple(rollouts.advantages.shape) not in allowed:
        names = "(B,), (B, 1) or (B, T)" if rollouts.cu_seqlens is None else "(S,) or (N,)"
        shapes = " or ".join(map(str, dict.fromkeys(allowed)))
        _checks.refuse("advantages", f"shape {names}: {shapes}", rollouts.advantages)
