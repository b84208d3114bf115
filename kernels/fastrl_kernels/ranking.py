"""The loss of a ranked list of scores over all its pairs, and its gradient, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logprob import as_bytes
from .tune import on_device, ticket_counter

_BLOCK_K = 32  # pairs are taken in tiles of 32 × 32
_BLOCK_P = 256  # rows per step of the last sum


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1] to a few units in the last place, as 2·artanh(x/(2 + x)); log(1.0 + x) would lose the
    digits of a small x."""
    z = x / (2.0 + x)
    square = z * z
    series = 1.0 / 17
    for k in tl.static_range(0, 8):
        series = series * square + 1.0 / (15 - 2 * k)
    return 2.0 * z * series


@triton.jit
def softplus(x):
    """log(1 + eˣ) and its slope σ(x), without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + log1p(small), tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def answers(scores_ptr, mask_ptr, start, offs, K):
    """Scores of some places in the list, and which of them count."""
    valid = offs < K
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + start + offs, mask=valid, other=0) != 0
    return tl.load(scores_ptr + start + offs, mask=valid, other=0.0).to(tl.float32), valid


@triton.jit(
    do_not_specialize=["K"],
    do_not_specialize_on_alignment=["scores_ptr", "mask_ptr", "dscores_ptr", "partials_ptr", "loss_ptr", "ticket_ptr"],
)
def _ranked_reward_kernel(
    scores_ptr, mask_ptr, dscores_ptr, partials_ptr, loss_ptr, ticket_ptr,

    K,

    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A program per row; the K² pairs exist one tile at a time. 5 bytes read per score from memory (again from cache
    for every BLOCK_K places) and 4 written. The last program adds the rows up in their order."""
    pid = tl.program_id(0).to(tl.int64)
    start = pid * K
    offs_k = tl.arange(0, BLOCK_K)
    count = 0
    for at in range(0, K, BLOCK_K):
        _, valid = answers(scores_ptr, mask_ptr, start, at + offs_k, K)
        count += tl.sum(valid.to(tl.int32), 0)
    scored = count > 1
    pairs = tl.maximum(count.to(tl.float32) * (count - 1).to(tl.float32) / 2, 1.0)
    row_loss = 0.0
    for at_i in range(0, K, BLOCK_K):
        i = at_i + offs_k
        score_i, valid_i = answers(scores_ptr, mask_ptr, start, i, K)
        gradient = tl.zeros((BLOCK_K,), tl.float32)
        for at_j in range(0, K, BLOCK_K):
            j = at_j + offs_k
            score_j, valid_j = answers(scores_ptr, mask_ptr, start, j, K)
            before = i[:, None] < j[None, :]  # (BLOCK_K, BLOCK_K): i is ranked above j
            behind = i[:, None] > j[None, :]
            both = valid_i[:, None] & valid_j[None, :]
            gap = score_i[:, None] - score_j[None, :]
            value, slope = softplus(tl.where(before, -gap, gap))
            row_loss += tl.sum(tl.sum(tl.where(both & before, value, 0.0), 1), 0)
            gradient += tl.sum(tl.where(both & before, -slope, tl.where(both & behind, slope, 0.0)), 1)
        if dscores_ptr is not None:
            tl.store(dscores_ptr + start + i, tl.where(valid_i & scored, gradient / pairs, 0.0), mask=i < K)
    tl.store(partials_ptr + 2 * pid, tl.where(scored, row_loss / pairs, 0.0))
    tl.store(partials_ptr + 2 * pid + 1, scored.to(tl.float32))
    # All stores of this program must be visible before its ticket is.
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    if ticket == tl.num_programs(0) - 1:
        loss = tl.zeros((BLOCK_P,), tl.float32)
        rows = tl.zeros((BLOCK_P,), tl.float32)
        for at in range(0, tl.num_programs(0), BLOCK_P):
            row = at + tl.arange(0, BLOCK_P)
            inside = row < tl.num_programs(0)
            # .cg: other programs wrote these; read them from L2.
            loss += tl.load(partials_ptr + 2 * row, mask=inside, other=0.0, cache_modifier=".cg")
            rows += tl.load(partials_ptr + 2 * row + 1, mask=inside, other=0.0, cache_modifier=".cg")
        total = tl.maximum(tl.sum(rows, 0), 1.0)
        tl.store(loss_ptr, tl.sum(loss, 0) / total)
        tl.store(loss_ptr + 1, total)
        tl.store(ticket_ptr, 0)


def ranked_reward(
    scores: Tensor,  # (B, K) contiguous, best first
    mask: Tensor | None,  # (B, K) contiguous bool
    *,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss (0-d), the number of rows it is the mean of (0-d, at least 1), and (B, K) fp32 derivatives of the rows'
    losses, which the caller divides by that number."""
    B, K = scores.shape
    out = torch.zeros(2, dtype=torch.float32, device=scores.device)
    dscores = scores.new_empty((B, K), dtype=torch.float32) if grad else None
    if B and K:
        partials = scores.new_empty((B, 2), dtype=torch.float32)
        with on_device(scores):
            _ranked_reward_kernel[(B,)](
                scores, as_bytes(mask), dscores, partials, out, ticket_counter(scores.device), K,
                BLOCK_K=_BLOCK_K, BLOCK_P=_BLOCK_P, num_warps=4,
            )  # fmt: skip
    else:
        out[1] = 1
    return out[0], out[1], dscores
