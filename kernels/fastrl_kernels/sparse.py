"""The gradient of logits as lists: the columns with p > eps and the target. What these add to the gradients of hidden
states and head is in `sparse_sums.py`."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .row_gradient import target_gradient, tile_gradient
from .softmax import LOG2E, row_factor, transform
from .tune import PER_ROW, architecture, on_device, warp_size

_PER_CALL = ["columns_ptr", "gradients_ptr", "number_ptr", "dropped_ptr"]


@dataclass(frozen=True)
class EmissionConfig:
    """One program per row, `block_v` columns at a time."""

    block_v: int
    num_warps: int


def emission_config(vocab_size: int, warp: int = 32) -> EmissionConfig:
    """8 columns per thread, 16 bytes of bf16, and few threads: positions and the dropped mass take registers."""
    block_v = min(1024, max(16, triton.next_power_of_2(vocab_size)))
    return EmissionConfig(block_v, num_warps=max(1, block_v // (8 * warp)))


@triton.jit
def list_tile(
    x, tail, start, target, m, log_s, f, softcap, inner, eps, number, dropped, columns_ptr,
    CAPACITY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(columns kept so far, dropped mass per lane) after a tile, whose kept columns are appended to the row's list."""
    cols = start + tl.arange(0, BLOCK_V)
    p = tl.exp2((transform(x, softcap, inner) - m) * (f * LOG2E) - log_s * LOG2E)
    if tail is not None:
        p = tl.where(tail, p, 0.0)
    if (target >= start) & (target < start + BLOCK_V):
        p = tl.where(cols == target, 2.0, p)
    keep = p > eps
    dropped += tl.where(keep, 0.0, p)
    kept = keep.to(tl.int32)
    here = tl.sum(kept, 0)
    if here > 0:
        place = number + tl.cumsum(kept, 0) - 1
        tl.store(columns_ptr + place, cols, mask=keep & (place < CAPACITY))
    return number + here, dropped


@triton.jit
def differentiate_list(
    row_ptr, columns_ptr, gradients_ptr, used, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner,
    CAPACITY: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of the listed columns, from their logits read again; what follows them in the list is emptied."""
    own = target_gradient(logp, entropy, c, e, f)
    for first in range(0, CAPACITY, BLOCK_C):
        places = first + tl.arange(0, BLOCK_C)
        listed = places < used
        cols = tl.load(columns_ptr + places, mask=listed, other=0)
        x = tl.load(row_ptr + cols, mask=listed, other=0.0).to(tl.float32)
        at = tl.max(tl.where(listed & (cols == target), places, -1), 0)
        g = tile_gradient(x, first, at, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_C)
        tl.store(gradients_ptr + places, tl.where(listed, g, 0.0))
        tl.store(columns_ptr + places, tl.where(listed, cols, V))


@triton.jit(do_not_specialize_on_alignment=[*PER_ROW, *_PER_CALL])
def _sparsify_kernel(
    logits_ptr, ids_ptr, rows_ptr, temperature_ptr, logp_ptr, entropy_ptr, max_ptr, log_sum_ptr,
    dlogp_ptr, dentropy_ptr, columns_ptr, gradients_ptr, number_ptr, dropped_ptr,

    stride_b: tl.int64,

    V,

    eps, factor, softcap, inner,
    CAPACITY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program: 2V bytes read (bf16), 12 per place of the list and 8 per row written, 6 per kept column read
    again. A row whose cotangents are both zero is not read and gets an empty list; so does one with more columns than
    places, or with NaN, under the number CAPACITY + 1."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(rows_ptr + i)
    row_ptr = logits_ptr + i * stride_b
    columns_ptr += i * CAPACITY
    logp, c = tl.load(logp_ptr + n), tl.load(dlogp_ptr + n)
    e = None
    live = c != 0
    if dentropy_ptr is not None:
        e = tl.load(dentropy_ptr + n)
        live = live | (e != 0)
    broken = logp != logp
    f = row_factor(factor, temperature_ptr, n)
    m, log_s, entropy = tl.load(max_ptr + n), tl.load(log_sum_ptr + n), tl.load(entropy_ptr + n)
    target = tl.load(ids_ptr + n)
    number = tl.full((), 0, tl.int32)
    lost = tl.full((), 0.0, tl.float32)
    if live & (broken == 0):
        offs = tl.arange(0, BLOCK_V)
        dropped = tl.zeros((BLOCK_V,), tl.float32)
        full = V // BLOCK_V * BLOCK_V
        ahead = tl.load(row_ptr + offs, mask=offs < full, other=0.0, eviction_policy="evict_first")
        for start in range(0, full, BLOCK_V):
            x = ahead.to(tl.float32)
            after = start + BLOCK_V + offs  # a tile is on its way while positions are counted
            ahead = tl.load(row_ptr + after, mask=after < full, other=0.0, eviction_policy="evict_first")
            number, dropped = list_tile(
                x, None, start, target, m, log_s, f, softcap, inner, eps, number, dropped, columns_ptr,
                CAPACITY, BLOCK_V,
            )  # fmt: skip
        if full < V:
            tail = full + offs < V
            x = tl.load(row_ptr + full + offs, mask=tail, other=0.0, eviction_policy="evict_first").to(tl.float32)
            number, dropped = list_tile(
                x, tail, full, target, m, log_s, f, softcap, inner, eps, number, dropped, columns_ptr,
                CAPACITY, BLOCK_V,
            )  # fmt: skip
        lost = tl.sum(dropped, 0)
    over = (number > CAPACITY) | broken
    tl.store(number_ptr + n, tl.where(over, CAPACITY + 1, number))
    tl.store(dropped_ptr + n, tl.where(over, 0.0, lost))
    # The list is read, or emptied, by threads other than those that filled it.
    tl.debug_barrier()
    differentiate_list(
        row_ptr, columns_ptr, gradients_ptr + i * CAPACITY, tl.where(over, 0, number), V, target, logp, m, log_s,
        entropy, c, e, f, softcap, inner, CAPACITY, BLOCK_C,
    )  # fmt: skip


def sparsify(
    logits: Tensor,  # (n, V), unit inner stride
    ids: Tensor,  # (N,) int64
    rows: Tensor,  # (n,) int64: the token that each row scores
    temperature: Tensor | None,  # (N,) fp32, on top of `factor`
    logp: Tensor,  # (N,) fp32, as the next three: the scores of the tokens
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    dlogp: Tensor,  # (N,) fp32 cotangent
    dentropy: Tensor | None,  # (N,) fp32 cotangent
    columns: Tensor,  # (n, C) int32, written; C a power of two
    gradients: Tensor,  # (n, C) fp32, written
    number: Tensor,  # (N,) int32, written at the tokens of the rows
    dropped: Tensor,  # (N,) fp32, written at the tokens of the rows
    *,
    eps: float,
    factor: float,
    softcap: float | None,
    inner: float,
) -> None:
    """List each row's target and columns with p > eps, in order, with d(Σ dlogp·logp + dentropy·entropy)/dlogits there;
    unused places hold column V and 0. `number` of them: C + 1 = too many, then none is listed; `dropped` = Σ p
    of the others."""
    n, V = logits.shape
    if n == 0:
        return
    capacity = columns.shape[1]
    config = emission_config(V, warp_size(architecture(logits.device)))
    with on_device(logits):
        _sparsify_kernel[(n,)](
            logits, ids, rows, temperature, logp, entropy, row_max, log_sum, dlogp, dentropy, columns, gradients,
            number, dropped, logits.stride(0), V, eps, factor, softcap, inner,
            capacity, min(capacity, 1024), config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
