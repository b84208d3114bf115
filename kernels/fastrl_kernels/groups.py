"""Group-normalised advantages: the device function that the token kernel inlines, and one launch by itself for groups
given by ids, a batch-wide scale, or a baseline that needs lengths.

Rewards are compared with the sample's own one before anything is summed: dⱼ = rⱼ − r. A common offset of the rewards
then costs no digits, and a group of equal rewards gives exact zeros by itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tune import on_device


@triton.jit
def normalised(own, n, gap, weighted_gap, best_gap, varies, std, eps, BASELINE: tl.constexpr, SCALE: tl.constexpr):
    """A = (r − baseline)/scale. `gap` is r − mean, `weighted_gap` r − Σ len·r/Σ len, `best_gap` r − the others' best.

    Exactly 0 for a group of one or of equals, unless neither the baseline nor the scale looks at the group. A NaN in
    the group stays visible: it makes `gap` NaN.
    """
    if BASELINE == "mean":
        advantage = gap
    elif BASELINE == "leave-one-out":
        advantage = gap * n / tl.maximum(n - 1, 1)
    elif BASELINE == "length-weighted":
        advantage = weighted_gap
    elif BASELINE == "best-of-others":
        advantage = tl.maximum(best_gap, 0.0)
    elif BASELINE == "none":
        advantage = own
    else:
        tl.static_assert(False, "unknown BASELINE")
    if SCALE == "group" or SCALE == "batch":
        advantage = advantage / (std + eps)
    elif SCALE == "leave-one-out":
        advantage = tl.where(std > 0, advantage / (std + eps), advantage)
    elif SCALE == "mean":
        mean = own - gap
        advantage = tl.where(mean <= 0, 0.0, advantage / (mean + eps))
    elif SCALE != "none":
        tl.static_assert(False, "unknown SCALE")
    if BASELINE != "none" or (SCALE != "none" and SCALE != "batch"):
        advantage = tl.where(gap == gap, tl.where(varies, advantage, 0.0), gap)
    return advantage


@triton.jit
def unbiased(squares, shifted, n, SCALE: tl.constexpr):
    """The std of a group from Σ (r − mean)²; or of the others in it, from Σ (r − least)² and Σ (r − least), which are
    exactly 0 where those are equal: no residue of rounding is ever divided by."""
    if SCALE == "leave-one-out":
        squares = tl.maximum(squares - shifted * shifted / tl.maximum(n - 1, 1), 0.0)
        std = tl.sqrt(squares / tl.maximum(n - 2, 1))
    else:
        std = tl.sqrt(squares / tl.maximum(n - 1, 1))
    return std


@triton.jit
def group_advantage(rewards_ptr, sequence, valid, G, eps, BASELINE: tl.constexpr, SCALE: tl.constexpr):
    """Advantages within groups of G consecutive rewards, std unbiased in two passes. G loads per token and pass, served
    by the cache. The batch-wide scale and the baselines of other arguments have a launch of their own."""
    tl.static_assert(SCALE != "batch" and BASELINE != "length-weighted" and BASELINE != "best-of-others")
    own = tl.load(rewards_ptr + sequence, mask=valid, other=0.0).to(tl.float32)
    first = sequence // G * G
    total, squares, shifted, low, high = own * 0.0, own * 0.0, own * 0.0, own * 0.0, own * 0.0
    other_low = own * 0.0 + float("inf")
    for g in range(0, G):
        r = tl.load(rewards_ptr + first + g, mask=valid, other=0.0).to(tl.float32)
        d = r - own
        total += d
        low, high = tl.minimum(low, d), tl.maximum(high, d)
        if SCALE == "leave-one-out":
            other_low = tl.minimum(other_low, tl.where(first + g != sequence, r, float("inf")))
    if SCALE == "group" or SCALE == "leave-one-out":
        for g in range(0, G):
            r = tl.load(rewards_ptr + first + g, mask=valid, other=0.0).to(tl.float32)
            if SCALE == "leave-one-out":
                d = tl.where(first + g != sequence, r - other_low, 0.0)
                shifted += d
            else:
                d = r - own - total / G
            squares += d * d
    std = unbiased(squares, shifted, G, SCALE)
    return normalised(own, G, -total / G, own, own, low < high, std, eps, BASELINE, SCALE)


@triton.jit
def group_block(
    rewards_ptr, ids_ptr, lengths_ptr, first, R, stride, G, eps,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Advantages of rewards first:first + BLOCK_S, and whether their groups vary. Each is held against the R rewards of
    the batch by group id, or against the groups of G consecutive ones that this block touches."""
    row = first + tl.arange(0, BLOCK_S)
    inside = row < R
    own = tl.load(rewards_ptr + row * stride, mask=inside, other=0.0).to(tl.float32)
    origin = tl.load(rewards_ptr).to(tl.float32)
    start, stop = first * 0, first * 0 + R
    if ids_ptr is not None:
        own_id = tl.load(ids_ptr + row, mask=inside, other=0)
    else:
        own_id = row // G
        if SCALE != "batch":
            start, stop = first // G * G, tl.minimum(stop, ((first + BLOCK_S - 1) // G + 1) * G)
    n, total, squares, low, high = own * 0.0, own * 0.0, own * 0.0, own * 0.0, own * 0.0
    other_low, other_high, shifted = own * 0.0 + float("inf"), own * 0.0 - float("inf"), own * 0.0
    weight, weighted = own * 0.0, own * 0.0
    batch_total, batch_squares = 0.0, 0.0
    for step in tl.static_range(0, 1 if SCALE == "none" or SCALE == "mean" else 2):
        for at in range(start, stop, BLOCK_R):
            column = at + tl.arange(0, BLOCK_R)
            seen = column < stop
            r = tl.load(rewards_ptr + column * stride, mask=seen, other=0.0).to(tl.float32)
            if ids_ptr is not None:
                column_id = tl.load(ids_ptr + column, mask=seen, other=0)
            else:
                column_id = column // G
            same = (own_id[:, None] == column_id[None, :]) & seen[None, :]  # (BLOCK_S, BLOCK_R)
            other = same & (row[:, None] != column[None, :])
            d = tl.where(same, r[None, :] - own[:, None], 0.0)
            if step == 0:
                n += tl.sum(same.to(tl.float32), 1)
                total += tl.sum(d, 1)
                low, high = tl.minimum(low, tl.min(d, 1)), tl.maximum(high, tl.max(d, 1))
                if SCALE == "leave-one-out":
                    other_low = tl.minimum(other_low, tl.min(tl.where(other, r[None, :], float("inf")), 1))
                if BASELINE == "best-of-others":
                    other_high = tl.maximum(other_high, tl.max(tl.where(other, r[None, :], -float("inf")), 1))
                if BASELINE == "length-weighted":
                    length = tl.load(lengths_ptr + column, mask=seen, other=0).to(tl.float32)
                    weight += tl.sum(tl.where(same, length[None, :], 0.0), 1)
                    weighted += tl.sum(d * length[None, :], 1)
                if SCALE == "batch":
                    batch_total += tl.sum(tl.where(seen, r - origin, 0.0), 0)
            elif SCALE == "batch":
                off = tl.where(seen, r - origin - batch_total / R, 0.0)
                batch_squares += tl.sum(off * off, 0)
            elif SCALE == "group":
                off = tl.where(same, d - (total / n)[:, None], 0.0)
                squares += tl.sum(off * off, 1)
            elif SCALE == "leave-one-out":
                off = tl.where(other, r[None, :] - other_low[:, None], 0.0)
                shifted += tl.sum(off, 1)
                squares += tl.sum(off * off, 1)
    std = unbiased(squares, shifted, n, SCALE)
    if SCALE == "batch":
        std = tl.sqrt(batch_squares / tl.maximum(R - 1, 1)) + own * 0.0
    weighted_gap = tl.where(weight > 0, -weighted / weight, 0.0)
    varies = low < high
    return normalised(own, n, -total / n, weighted_gap, own - other_high, varies, std, eps, BASELINE, SCALE), varies


@triton.jit(
    do_not_specialize=["R", "G"],
    do_not_specialize_on_alignment=["rewards_ptr", "ids_ptr", "lengths_ptr", "advantages_ptr"],
)
def _group_advantage_kernel(
    rewards_ptr, ids_ptr, lengths_ptr, advantages_ptr,

    R, G,

    eps,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_S rewards per program, groups in any order: 12 bytes per reward (16 with lengths) read twice by every
    program, from the cache, of the whole batch with ids and of the block's own groups without; 4 written."""
    first = tl.program_id(0) * BLOCK_S  # 32 bits: S samples take S² comparisons, which bounds S well before
    advantage, _ = group_block(
        rewards_ptr, ids_ptr, lengths_ptr, first, R, 1, G, eps, BASELINE, SCALE, BLOCK_S, BLOCK_R
    )
    row = first + tl.arange(0, BLOCK_S)
    tl.store(advantages_ptr + row, advantage, mask=row < R)


GROUP_BLOCKS = {"BLOCK_S": 16, "BLOCK_R": 64}


def group_advantages(
    rewards: Tensor,  # (R,)
    group_ids: Tensor | None,  # (R,) int64; None = group_size consecutive rewards
    group_size: int,
    *,
    eps: float,
    baseline: str,
    scale: str,
    lengths: Tensor | None = None,  # (R,), for "length-weighted"
) -> Tensor:
    """(R,) fp32 advantages in one launch, for every baseline and scale."""
    R = rewards.shape[0]
    advantages = torch.empty(R, dtype=torch.float32, device=rewards.device)
    if R:
        with on_device(rewards):
            _group_advantage_kernel[(triton.cdiv(R, GROUP_BLOCKS["BLOCK_S"]),)](
                rewards, group_ids, lengths, advantages, R, max(group_size, 1), eps,
                BASELINE=baseline, SCALE=scale, **GROUP_BLOCKS, num_warps=4,
            )  # fmt: skip
    return advantages
