"""What the lists of `sparse.py` add to the gradients of hidden states and head. Nothing is added atomically and nothing
waits for the device: the same bits on every run."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .tune import architecture, on_device, warp_size

_PER_CALL = ["order_ptr", "offsets_ptr", "gradients_ptr"]
_COLUMNS = 8  # columns of the head per program: most have no entry, and an empty program costs its launch


@dataclass(frozen=True)
class SumConfig:
    """`block_e` entries times `block_h` hidden units at a time."""

    block_e: int
    block_h: int
    num_warps: int


def gather_config(hidden_size: int, warp: int = 32) -> SumConfig:
    """Rows of the head are long and a list is short: 32 fp32 sums per thread."""
    block_h = min(512, max(16, triton.next_power_of_2(hidden_size)))
    return SumConfig(8, block_h, num_warps=max(1, 8 * block_h // (32 * warp)))


def column_config(hidden_size: int, warp: int = 32) -> SumConfig:
    """Twice the entries per step: a column that every row keeps is a long loop."""
    block_h = min(512, max(16, triton.next_power_of_2(hidden_size)))
    return SumConfig(16, block_h, num_warps=max(1, 16 * block_h // (32 * warp)))


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
