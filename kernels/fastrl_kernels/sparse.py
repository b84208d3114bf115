"""The gradient of logits as lists: the columns with p > eps and the target, and what these lists add to the gradients
of hidden states and head. Nothing is added atomically and nothing waits for the device: the same bits on every run."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .row_gradient import target_gradient, tile_gradient
from .softmax import LOG2E, row_factor, transform
from .tune import PER_ROW, architecture, on_device, warp_size

_PER_CALL = ["columns_ptr", "gradients_ptr", "number_ptr", "dropped_ptr", "order_ptr", "offsets_ptr"]
_COLUMNS = 8  # columns of the head per program: most have no entry, and an empty program costs its launch


@dataclass(frozen=True)
class EmissionConfig:
    """One program per row, `block_v` columns at a time."""

    block_v: int
    num_warps: int


@dataclass(frozen=True)
class SumConfig:
    """`block_e` entries times `block_h` hidden units at a time."""

    block_e: int
    block_h: int
    num_warps: int


def emission_config(vocab_size: int, warp: int = 32) -> EmissionConfig:
    """8 columns per thread, 16 bytes of bf16, and few threads: positions and the dropped mass take registers."""
    block_v = min(1024, max(16, triton.next_power_of_2(vocab_size)))
    return EmissionConfig(block_v, num_warps=max(1, block_v // (8 * warp)))


def gather_config(hidden_size: int, warp: int = 32) -> SumConfig:
    """Rows of the head are long and a list is short: 32 fp32 sums per thread."""
    block_h = min(512, max(16, triton.next_power_of_2(hidden_size)))
    return SumConfig(8, block_h, num_warps=max(1, 8 * block_h // (32 * warp)))


def column_config(hidden_size: int, warp: int = 32) -> SumConfig:
    """Twice the entries per step: a column that every row keeps is a long loop."""
    block_h = min(512, max(16, triton.next_power_of_2(hidden_size)))
    return SumConfig(16, block_h, num_warps=max(1, 16 * block_h // (32 * warp)))


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


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def _gather_columns_kernel(
    columns_ptr, gradients_ptr, weight_ptr, rows_ptr, dhidden_ptr,

    stride_w, stride_h,

    V, H,
    CAPACITY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK_H hidden units per program: per kept column 8 bytes of the list and 2H of the head read, 2H
    written per row (bf16); the columns of a list are counted first, 4 bytes per place."""
    blocks = tl.cdiv(H, BLOCK_H)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    offs_h = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_e = tl.arange(0, BLOCK_E)
    columns_ptr += i * CAPACITY
    gradients_ptr += i * CAPACITY
    used = tl.full((), 0, tl.int32)
    for first in range(0, CAPACITY, BLOCK_C):
        used += tl.sum((tl.load(columns_ptr + first + tl.arange(0, BLOCK_C)) < V).to(tl.int32), 0)
    total = tl.zeros((BLOCK_E, BLOCK_H), tl.float32)
    for first in range(0, used, BLOCK_E):
        listed = first + offs_e < used
        column = tl.load(columns_ptr + first + offs_e, mask=listed, other=0).to(tl.int64)
        g = tl.load(gradients_ptr + first + offs_e, mask=listed, other=0.0)
        w = tl.load(
            weight_ptr + column[:, None] * stride_w + offs_h[None, :],
            mask=listed[:, None] & (offs_h < H)[None, :],
            other=0.0,
        )
        total += g[:, None] * w.to(tl.float32)
    out = tl.sum(total, 0).to(dhidden_ptr.dtype.element_ty)
    tl.store(dhidden_ptr + tl.load(rows_ptr + i) * stride_h + offs_h, out, mask=offs_h < H)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=_PER_CALL)
def _sum_by_column_kernel(
    order_ptr, offsets_ptr, gradients_ptr, hidden_ptr, dweight_ptr, dbias_ptr,

    stride_h,

    V, H, first,
    CAPACITY: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of the head and BLOCK_H hidden units per program: per entry 12 bytes of the lists and 2H of
    hidden states read (bf16), 8 per column for its bounds; 4H written per column in the first call, later 4H read and
    written per column with entries."""
    blocks = tl.cdiv(H, BLOCK_H) if dweight_ptr is not None else 1
    block = tl.program_id(0) % blocks
    offs_h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_e = tl.arange(0, BLOCK_E)
    for j in range(COLUMNS):
        v = (tl.program_id(0) // blocks).to(tl.int64) * COLUMNS + j
        start = tl.load(offsets_ptr + v, mask=v < V, other=0)
        stop = tl.load(offsets_ptr + v + 1, mask=v < V, other=0)
        if (v < V) & ((first != 0) | (stop > start)):
            share = tl.zeros((BLOCK_E,), tl.float32)
            total = tl.zeros((BLOCK_E, BLOCK_H), tl.float32)
            for at in range(start, stop, BLOCK_E):
                entry = at + offs_e < stop
                place = tl.load(order_ptr + at + offs_e, mask=entry, other=0)
                g = tl.load(gradients_ptr + place, mask=entry, other=0.0)
                share += g
                if dweight_ptr is not None:
                    h = tl.load(
                        hidden_ptr + (place // CAPACITY)[:, None] * stride_h + offs_h[None, :],
                        mask=entry[:, None] & (offs_h < H)[None, :],
                        other=0.0,
                    )
                    total += g[:, None] * h.to(tl.float32)
            if dweight_ptr is not None:
                out_ptr = dweight_ptr + v * H + offs_h
                sums = tl.sum(total, 0)
                if first == 0:
                    sums += tl.load(out_ptr, mask=offs_h < H, other=0.0)
                tl.store(out_ptr, sums, mask=offs_h < H)
            if dbias_ptr is not None:
                bias = tl.load(dbias_ptr + v) + tl.sum(share, 0)
                tl.store(dbias_ptr + v, bias, mask=block == 0)


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


def gather_columns(columns: Tensor, gradients: Tensor, weight: Tensor, rows: Tensor, dhidden: Tensor) -> None:
    """dhidden[rows[i]] ← Σ g·weight[column] over list i; weight (V, H) and dhidden (N, H) with unit inner strides."""
    n, capacity = columns.shape
    V, H = weight.shape
    if n == 0 or H == 0:
        return
    config = gather_config(H, warp_size(architecture(weight.device)))
    with on_device(weight):
        _gather_columns_kernel[(n * triton.cdiv(H, config.block_h),)](
            columns, gradients, weight, rows, dhidden, weight.stride(0), dhidden.stride(0), V, H,
            capacity, min(capacity, 1024), config.block_e, config.block_h, num_warps=config.num_warps,
        )  # fmt: skip


def sum_by_column(
    order: Tensor,  # (n·C,) int64: places of the lists, by column
    offsets: Tensor,  # (V + 1,) int32: where each column's begin
    gradients: Tensor,  # (n, C) fp32
    hidden: Tensor,  # (n, H), unit inner stride
    dweight: Tensor | None,  # (V, H) fp32, contiguous
    dbias: Tensor | None,  # (V,) fp32
    *,
    first: bool,
) -> None:
    """dweight[v] += Σ g·hidden[row], dbias[v] += Σ g over the entries of column v; `first`: dweight is empty yet."""
    V, H = offsets.shape[0] - 1, hidden.shape[1]
    capacity = gradients.shape[1]
    config = column_config(H, warp_size(architecture(hidden.device)))
    blocks = 1 if dweight is None else triton.cdiv(H, config.block_h)
    with on_device(hidden):
        _sum_by_column_kernel[(triton.cdiv(V, _COLUMNS) * blocks,)](
            order, offsets, gradients, hidden, dweight, dbias, hidden.stride(0), V, H, int(first),
            capacity, _COLUMNS, config.block_e, config.block_h, num_warps=config.num_warps,
        )  # fmt: skip
