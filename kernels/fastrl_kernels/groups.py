"""Group-normalised advantages: the device function that the token kernel inlines, and one launch by itself for groups
given by ids or a batch-wide scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tune import on_device


@triton.jit
def normalised(own, n, total, low, high, std, eps, BASELINE: tl.constexpr, SCALE: tl.constexpr):
    """A = (r − baseline) / (std + eps) from the sums of a reward's group; exactly 0 for a group of one or of equals."""
    if BASELINE == "mean":
        advantage = own - total / n
    elif BASELINE == "leave-one-out":
        advantage = own - (total - own) / tl.maximum(n - 1, 1)
    elif BASELINE == "none":
        advantage = own
    else:
        tl.static_assert(False, "unknown BASELINE")
    if SCALE == "group" or SCALE == "batch":
        advantage = advantage / (std + eps)
    elif SCALE != "none":
        tl.static_assert(False, "unknown SCALE")
    if BASELINE != "none" or SCALE == "group":
        advantage = tl.where((low == high) & (total == total), 0.0, advantage)
    return advantage


@triton.jit
def group_advantage(rewards_ptr, sequence, valid, G, eps, BASELINE: tl.constexpr, SCALE: tl.constexpr):
    """Advantages within groups of G consecutive rewards, std unbiased in two passes. G loads per token and pass, served
    by the cache."""
    own = tl.load(rewards_ptr + sequence, mask=valid, other=0.0).to(tl.float32)
    first = sequence // G * G
    total, low, high, squares = own * 0.0, own, own, own * 0.0
    for g in range(0, G):
        r = tl.load(rewards_ptr + first + g, mask=valid, other=0.0).to(tl.float32)
        total += r
        low, high = tl.minimum(low, r), tl.maximum(high, r)
    if SCALE == "group":
        for g in range(0, G):
            r = tl.load(rewards_ptr + first + g, mask=valid, other=0.0).to(tl.float32)
            squares += (r - total / G) * (r - total / G)
    std = tl.sqrt(squares / tl.maximum(G - 1, 1))
    return normalised(own, G, total, low, high, std, eps, BASELINE, SCALE)


@triton.jit(do_not_specialize=["R", "G"], do_not_specialize_on_alignment=["rewards_ptr", "ids_ptr", "advantages_ptr"])
def _group_advantage_kernel(
    rewards_ptr, ids_ptr, advantages_ptr,

    R, G,

    eps,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_S rewards per program, each against all R by their group ids (or by G consecutive ones), in any order: 12
    bytes per reward read twice by every program, from the cache; 4 written."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = row < R
    own = tl.load(rewards_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if ids_ptr is not None:
        own_id = tl.load(ids_ptr + row, mask=inside, other=0)
    else:
        own_id = row // G
    n, total, squares, low, high = own * 0.0, own * 0.0, own * 0.0, own, own
    batch_total, batch_squares = 0.0, 0.0
    for step in tl.static_range(0, 2):
        for at in range(0, R, BLOCK_R):
            other = at + tl.arange(0, BLOCK_R).to(tl.int64)
            seen = other < R
            r = tl.load(rewards_ptr + other, mask=seen, other=0.0).to(tl.float32)
            if ids_ptr is not None:
                other_id = tl.load(ids_ptr + other, mask=seen, other=0)
            else:
                other_id = other // G
            same = (own_id[:, None] == other_id[None, :]) & seen[None, :]  # (BLOCK_S, BLOCK_R)
            if step == 0:
                n += tl.sum(same.to(tl.float32), 1)
                total += tl.sum(tl.where(same, r[None, :], 0.0), 1)
                low = tl.minimum(low, tl.min(tl.where(same, r[None, :], float("inf")), 1))
                high = tl.maximum(high, tl.max(tl.where(same, r[None, :], -float("inf")), 1))
                batch_total += tl.sum(tl.where(seen, r, 0.0), 0)
            else:
                gap = r[None, :] - (total / n)[:, None]
                squares += tl.sum(tl.where(same, gap * gap, 0.0), 1)
                off = r - batch_total / R
                batch_squares += tl.sum(tl.where(seen, off * off, 0.0), 0)
    std = tl.sqrt(squares / tl.maximum(n - 1, 1.0))
    if SCALE == "batch":
        std = tl.sqrt(batch_squares / tl.maximum(R - 1, 1)) + own * 0.0
    advantage = normalised(own, n, total, low, high, std, eps, BASELINE, SCALE)
    tl.store(advantages_ptr + row, advantage, mask=inside)


_GROUP_BLOCKS = {"BLOCK_S": 16, "BLOCK_R": 128}


def group_advantages(
    rewards: Tensor,  # (R,)
    group_ids: Tensor | None,  # (R,) int64; None = group_size consecutive rewards
    group_size: int,
    *,
    eps: float,
    baseline: str,
    scale: str,
) -> Tensor:
    """(R,) fp32 advantages in one launch, for groups given by ids and for a batch-wide scale."""
    R = rewards.shape[0]
    advantages = torch.empty(R, dtype=torch.float32, device=rewards.device)
    if R:
        with on_device(rewards):
            _group_advantage_kernel[(triton.cdiv(R, _GROUP_BLOCKS["BLOCK_S"]),)](
                rewards, group_ids, advantages, R, max(group_size, 1), eps,
                BASELINE=baseline, SCALE=scale, **_GROUP_BLOCKS, num_warps=4,
            )  # fmt: skip
    return advantages
