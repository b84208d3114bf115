"""Advantages that end with a statistic of the whole batch of them: GDPO and GPG, each in one launch.

Every program normalises a block of samples; the one that draws the last ticket takes the statistic over all of them and
rescales them in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import GROUP_BLOCKS, group_block
from .tune import on_device, ticket_counter

_BLOCK = 1024  # samples per step of the last program


@triton.jit
def rescale(advantages_ptr, varies_ptr, lengths_ptr, R, eps, factor, FINISH: tl.constexpr, BLOCK: tl.constexpr):
    """The batch's own scale, in place; samples whose group does not vary stay exactly 0. Weights are 1 for "batch",
    the lengths for "tokens"; "signal" multiplies by factor·R/#(samples whose group varies)."""
    offs = tl.arange(0, BLOCK).to(tl.int64)
    total, weight, squares = 0.0, 0.0, 0.0
    for step in tl.static_range(0, 3):
        for at in range(0, R, BLOCK):
            row = at + offs
            inside = row < R
            # .cg: other programs wrote these; read them from L2.
            x = tl.load(advantages_ptr + row, mask=inside, other=0.0, cache_modifier=".cg")
            varies = tl.load(varies_ptr + row, mask=inside, other=0, cache_modifier=".cg") != 0
            if FINISH == "tokens":
                w = tl.load(lengths_ptr + row, mask=inside, other=0).to(tl.float32)
            elif FINISH == "signal":
                w = varies.to(tl.float32)
            else:
                w = inside.to(tl.float32)
            if step == 0:
                weight += tl.sum(w, 0)
                total += tl.sum(tl.where(w > 0, w * x, 0.0), 0)
            elif step == 1 and FINISH != "signal":
                off = tl.where(w > 0, x - total / tl.maximum(weight, 1.0), 0.0)
                squares += tl.sum(w * off * off, 0)
            elif step == 2:
                if FINISH == "signal":
                    x = x * (factor * R / tl.maximum(weight, 1.0))
                else:
                    variance = squares / tl.maximum(weight - 1, 1.0)
                    x = x - total / tl.maximum(weight, 1.0)
                    if FINISH == "tokens":
                        x = x * tl.rsqrt(variance + eps)
                    elif FINISH == "batch":
                        x = x / (tl.sqrt(variance) + eps)
                    else:
                        tl.static_assert(False, "unknown FINISH")
                tl.store(advantages_ptr + row, tl.where(varies, x, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["R", "K", "G"],
    do_not_specialize_on_alignment=[
        "rewards_ptr", "weights_ptr", "ids_ptr", "lengths_ptr", "advantages_ptr", "varies_ptr"
    ],
)  # fmt: skip
def _batch_advantage_kernel(
    rewards_ptr, weights_ptr, ids_ptr, lengths_ptr, advantages_ptr, varies_ptr, ticket_ptr,

    R, K, G,

    eps, finish_eps, factor,
    SCALE: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σₖ wₖ·Aₖ over K rewards of a sample, each within its group, then the batch's scale. Per program and reward: 12
    bytes per sample of the batch (or of its groups), twice, from the cache; 5 written, and read 3 times by the last."""
    first = tl.program_id(0) * BLOCK_S
    row = first + tl.arange(0, BLOCK_S)
    inside = row < R
    advantage, varies = tl.zeros((BLOCK_S,), tl.float32), tl.zeros((BLOCK_S,), tl.int1)
    for k in range(0, K):
        one, differs = group_block(
            rewards_ptr + k, ids_ptr, lengths_ptr, first, R, K, G, eps, "mean", SCALE, BLOCK_S, BLOCK_R
        )
        if weights_ptr is not None:
            one *= tl.load(weights_ptr + k).to(tl.float32)
        advantage += one
        varies = varies | differs | (one != one)
    tl.store(advantages_ptr + row, advantage, mask=inside)
    if FINISH != "none":
        tl.store(varies_ptr + row, varies.to(tl.int8), mask=inside)
        # All stores of this program must be visible before its ticket is.
        tl.debug_barrier()
        ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
        if ticket == tl.num_programs(0) - 1:
            rescale(advantages_ptr, varies_ptr, lengths_ptr, R, finish_eps, factor, FINISH, BLOCK)
            tl.store(ticket_ptr, 0)


def batch_advantages(
    rewards: Tensor,  # (R, K) contiguous
    weights: Tensor | None,  # (K,)
    group_ids: Tensor | None,  # (R,) int64; None = group_size consecutive samples
    group_size: int,
    lengths: Tensor | None,  # (R,), for finish "tokens"
    *,
    eps: float,
    finish_eps: float,
    factor: float,
    scale: str,
    finish: str,
) -> Tensor:
    """(R,) fp32 advantages in one launch; finish is "batch", "tokens", "signal" or "none"."""
    R, K = rewards.shape
    advantages = torch.empty(R, dtype=torch.float32, device=rewards.device)
    if R:
        varies = torch.empty(R, dtype=torch.int8, device=rewards.device)
        with on_device(rewards):
            _batch_advantage_kernel[(triton.cdiv(R, GROUP_BLOCKS["BLOCK_S"]),)](
                rewards, weights, group_ids, lengths, advantages, varies, ticket_counter(rewards.device),
                R, K, max(group_size, 1), eps, finish_eps, factor,
                SCALE=scale, FINISH=finish, BLOCK=_BLOCK, **GROUP_BLOCKS, num_warps=4,
            )  # fmt: skip
    return advantages
