"""Logits to log-prob, entropy and softmax statistics in one read, and the gradient from cotangents on both."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import (
    is_valid,
    row_factor,
    row_start,
    row_statistics,
    token_of_row,
    write_row_gradient,
    write_zero_row,
)
from .tune import PER_ROW, on_device, row_config


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=PER_ROW)
def _logprob_fwd_kernel(
    logits_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr, logp_ptr, entropy_ptr, max_ptr, log_sum_ptr,

    stride_b, stride_t,

    T, V,

    log_vocab, factor, softcap, inner,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program, 2V bytes read (bf16), 16 bytes written. A masked row reads nothing and writes zeros."""
    i = tl.program_id(0).to(tl.int64)
    n = token_of_row(i, rows_ptr)
    if is_valid(mask_ptr, n):
        f = row_factor(factor, temperature_ptr, n)
        row_ptr = logits_ptr + row_start(i, T, stride_b, stride_t)
        target = tl.load(ids_ptr + n)
        _, m, log_s, entropy, logp = row_statistics(row_ptr, target, V, log_vocab, f, softcap, inner, False, BLOCK_V)
        tl.store(logp_ptr + n, logp)
        tl.store(entropy_ptr + n, entropy)
        tl.store(max_ptr + n, m)
        tl.store(log_sum_ptr + n, log_s)
    else:
        tl.store(logp_ptr + n, 0.0)
        tl.store(entropy_ptr + n, 0.0)
        tl.store(max_ptr + n, 0.0)
        tl.store(log_sum_ptr + n, 0.0)


@triton.jit(do_not_specialize=["T", "out_T"], do_not_specialize_on_alignment=PER_ROW)
def _logprob_bwd_kernel(
    logits_ptr, dlogits_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr, logp_ptr, entropy_ptr, max_ptr, log_sum_ptr,
    dlogp_ptr, dentropy_ptr,

    stride_b, stride_t, out_stride_b, out_stride_t,

    T, out_T, V,

    factor, softcap, inner,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program: 2V bytes read and 2V written (bf16); a masked row, or one whose cotangents are both zero,
    only writes its zeros."""
    i = tl.program_id(0).to(tl.int64)
    n = token_of_row(i, rows_ptr)
    out_ptr = dlogits_ptr + row_start(i, out_T, out_stride_b, out_stride_t)
    live = is_valid(mask_ptr, n)
    c = tl.full((), 0.0, tl.float32)
    e = None
    logp = tl.load(logp_ptr + n, mask=live, other=0.0)
    if dlogp_ptr is not None:
        c = tl.load(dlogp_ptr + n, mask=live, other=0.0)
        c = tl.where(logp == logp, c, float("nan"))
    if dentropy_ptr is not None:
        e = tl.load(dentropy_ptr + n, mask=live, other=0.0)
        live = live & ((c != 0) | (e != 0))
    else:
        live = live & (c != 0)
    if live:
        f = row_factor(factor, temperature_ptr, n)
        row_ptr = logits_ptr + row_start(i, T, stride_b, stride_t)
        m, log_s, entropy = tl.load(max_ptr + n), tl.load(log_sum_ptr + n), tl.load(entropy_ptr + n)
        target = tl.load(ids_ptr + n)
        write_row_gradient(None, row_ptr, out_ptr, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
    else:
        write_zero_row(out_ptr, V, BLOCK_V)


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """(stride_b, stride_t, T) of (B, T, V) or (N, V) rows; the last dimension must have stride 1."""
    if x.ndim == 3:
        return x.stride(0), x.stride(1), max(x.shape[1], 1)
    return x.stride(0), 0, 1


def num_rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] if x.ndim == 3 else x.shape[0]


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def logprob_fwd(
    logits: Tensor,  # (B, T, V) or (n, V), unit inner stride
    ids: Tensor,  # (N,) int64
    mask: Tensor | None,  # (N,) bool
    rows: Tensor | None,  # (n,) int64: the token that each row scores; None = row i scores token i
    temperature: Tensor | None,  # (N,) fp32, on top of `factor`
    logp: Tensor,  # (N,) fp32, written at the scored tokens, as the next three
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    *,
    factor: float,
    softcap: float | None,
    inner: float,
) -> None:
    """log-prob of the target, entropy, row maximum and log of the shifted sum of exponentials, for each row."""
    if num_rows(logits) == 0:
        return
    V = logits.shape[-1]
    config = row_config(V, softcap is not None)
    stride_b, stride_t, T = row_strides(logits)
    with on_device(logits):
        _logprob_fwd_kernel[(num_rows(logits),)](
            logits, ids, as_bytes(mask), rows, temperature, logp, entropy, row_max, log_sum,
            stride_b, stride_t, T, V, math.log(V), factor, softcap, inner, config.block_v, num_warps=config.num_warps,
        )  # fmt: skip


def logprob_bwd(
    logits: Tensor,
    dlogits: Tensor,  # as logits in shape, any strides with a unit inner one; may be logits itself
    ids: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | None,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    dlogp: Tensor | None,  # (N,) fp32 cotangent
    dentropy: Tensor | None,  # (N,) fp32 cotangent
    *,
    factor: float,
    softcap: float | None,
    inner: float,
) -> None:
    """Write d(Σ dlogp·logp + dentropy·entropy)/dlogits."""
    if num_rows(logits) == 0:
        return
    V = logits.shape[-1]
    config = row_config(V, softcap is not None)
    stride_b, stride_t, T = row_strides(logits)
    out_stride_b, out_stride_t, out_T = row_strides(dlogits)
    with on_device(logits):
        _logprob_bwd_kernel[(num_rows(logits),)](
            logits, dlogits, ids, as_bytes(mask), rows, temperature, logp, entropy, row_max, log_sum, dlogp, dentropy,
            stride_b, stride_t, out_stride_b, out_stride_t, T, out_T, V, factor, softcap, inner,
            config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
