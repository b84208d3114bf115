"""Logits to log-prob, entropy and softmax statistics in one read, and the gradient from cotangents on both."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_gradient import write_tile_gradient, write_zeros
from .softmax import (
    LOG2E,
    is_valid,
    load_target,
    load_tile,
    row_at,
    row_factor,
    row_scores,
    row_statistics,
    target_logit,
    tile_statistics,
    token_of_row,
)
from .tune import (
    PER_ROW,
    ROWS,
    STRIDES,
    RowConfig,
    architecture,
    compile_ahead,
    few_rows,
    on_device,
    row_config,
    tile_config,
    variant_of,
)


@triton.jit(do_not_specialize=[*STRIDES, *ROWS], do_not_specialize_on_alignment=PER_ROW)
def _logprob_fwd_kernel(
    logits_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr, logp_ptr, entropy_ptr, max_ptr, log_sum_ptr,

    stride_b: tl.int64, stride_t: tl.int64,

    T, V,

    log_vocab, factor, softcap, inner,
    BLOCK_V: tl.constexpr, TILES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row per program, 2V bytes read (bf16), 16 bytes written. A masked row reads nothing and writes zeros."""
    i = tl.program_id(0).to(tl.int64)
    n = token_of_row(i, rows_ptr)
    m = tl.full((), 0.0, tl.float32)
    log_s, entropy, logp = m, m, m
    if is_valid(mask_ptr, n):
        f = row_factor(factor, temperature_ptr, n)
        row_ptr = row_at(logits_ptr, i, T, stride_b, stride_t, ALIGNED)
        target = load_target(ids_ptr, n, V)
        _, m, log_s, entropy, logp = row_statistics(
            row_ptr, target, V, log_vocab, f, softcap, inner, False, BLOCK_V, TILES
        )
    store_scores(logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, n, logp, entropy, m, log_s)


@triton.jit
def store_scores(logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, n, logp, entropy, m, log_s):
    """The four numbers of token n."""
    tl.store(logp_ptr + n, logp)
    tl.store(entropy_ptr + n, entropy)
    tl.store(max_ptr + n, m)
    tl.store(log_sum_ptr + n, log_s)


@triton.jit(do_not_specialize=[*STRIDES, *ROWS], do_not_specialize_on_alignment=PER_ROW)
def _tile_statistics_kernel(
    logits_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr, parts_ptr,

    stride_b: tl.int64, stride_t: tl.int64,

    T, V,

    factor, softcap, inner,
    BLOCK_V: tl.constexpr, TILES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of a row per program: its m, s and q to `parts` (n, 4, TILES), whose last plane begins with the target's
    logit. 2 bytes read per logit (bf16), 12 written per tile."""
    tiles = tl.cdiv(V, BLOCK_V)
    pid = tl.program_id(0)
    i, j = (pid // tiles).to(tl.int64), pid % tiles
    n = token_of_row(i, rows_ptr)
    if is_valid(mask_ptr, n):
        f = row_factor(factor, temperature_ptr, n)
        row_ptr = row_at(logits_ptr, i, T, stride_b, stride_t, ALIGNED)
        target = load_target(ids_ptr, n, V)
        store_part(row_ptr, parts_ptr + i * 4 * TILES, j, target, V, f, softcap, inner, BLOCK_V, TILES)


@triton.jit
def store_part(row_ptr, part_ptr, j, target, V, f, softcap, inner, BLOCK_V: tl.constexpr, TILES: tl.constexpr):
    """Store the statistics of tile j; the first tile adds the target's logit. Returns the tile as loaded."""
    x, u = load_tile(row_ptr, j * BLOCK_V, target, V, softcap, inner, "evict_first", BLOCK_V)
    m, s, q = tile_statistics(u, f * LOG2E)
    tl.store(part_ptr + j, m)
    tl.store(part_ptr + TILES + j, s)
    tl.store(part_ptr + 2 * TILES + j, q)
    if j == 0:
        tl.store(part_ptr + 3 * TILES, target_logit(row_ptr, target, softcap, inner))
    return x


@triton.jit
def scores_of_parts(part_ptr, target, V, log_vocab, f, BLOCK_V: tl.constexpr, TILES: tl.constexpr):
    """(m, log s, entropy, logp) of a row from what `store_part` left, past the first-level cache, which may be old."""
    lane = tl.arange(0, TILES)
    there = lane < tl.cdiv(V, BLOCK_V)
    ms = tl.load(part_ptr + lane, mask=there, other=float("-inf"), cache_modifier=".cg")
    ss = tl.load(part_ptr + TILES + lane, mask=there, other=0.0, cache_modifier=".cg")
    qs = tl.load(part_ptr + 2 * TILES + lane, mask=there, other=0.0, cache_modifier=".cg")
    chosen = tl.load(part_ptr + 3 * TILES, cache_modifier=".cg")
    return row_scores(ms, ss, qs, chosen, target, log_vocab, f)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _parts_to_scores_kernel(
    parts_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr, logp_ptr, entropy_ptr, max_ptr, log_sum_ptr,

    V,

    log_vocab, factor,
    BLOCK_V: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row per program: 12 bytes read per tile, 16 written. The same bits as `_logprob_fwd_kernel`."""
    i = tl.program_id(0).to(tl.int64)
    n = token_of_row(i, rows_ptr)
    m = tl.full((), 0.0, tl.float32)
    log_s, entropy, logp = m, m, m
    if is_valid(mask_ptr, n):
        f = row_factor(factor, temperature_ptr, n)
        target = load_target(ids_ptr, n, V)
        m, log_s, entropy, logp = scores_of_parts(parts_ptr + i * 4 * TILES, target, V, log_vocab, f, BLOCK_V, TILES)
    store_scores(logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, n, logp, entropy, m, log_s)


@triton.jit(do_not_specialize=[*STRIDES, *ROWS], do_not_specialize_on_alignment=PER_ROW)
def _logprob_bwd_kernel(
    logits_ptr, dlogits_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr, logp_ptr, entropy_ptr, max_ptr, log_sum_ptr,
    dlogp_ptr, dentropy_ptr,

    stride_b: tl.int64, stride_t: tl.int64, out_stride_b: tl.int64, out_stride_t: tl.int64,

    T, out_T, V,

    factor, softcap, inner,
    BLOCK_V: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of a row per program, since nothing is added up: 2 bytes read and 2 written per logit (bf16); a tile of
    a masked row, or of one whose cotangents are both zero, only writes its zeros."""
    tiles = tl.cdiv(V, BLOCK_V)
    pid = tl.program_id(0)
    i, start = (pid // tiles).to(tl.int64), pid % tiles * BLOCK_V
    n = token_of_row(i, rows_ptr)
    out_ptr = row_at(dlogits_ptr, i, out_T, out_stride_b, out_stride_t, ALIGNED)
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
        row_ptr = row_at(logits_ptr, i, T, stride_b, stride_t, ALIGNED)
        m, log_s, entropy = tl.load(max_ptr + n), tl.load(log_sum_ptr + n), tl.load(entropy_ptr + n)
        target = load_target(ids_ptr, n, V)
        write_tile_gradient(
            row_ptr, out_ptr, start, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V
        )
    else:
        write_zeros(out_ptr, start, V, BLOCK_V)


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """(stride_b, stride_t, T) of (B, T, V) or (N, V) rows; the last dimension must have stride 1."""
    if x.ndim == 3:
        return x.stride(0), x.stride(1), max(x.shape[1], 1)
    return x.stride(0), 0, 1


def rows_aligned(*tensors: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    return all(
        not any(at % 16 for at in (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])))
        for x in tensors
    )


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
    count, V, arch = num_rows(logits), logits.shape[-1], architecture(logits.device)
    if count == 0:
        return
    config = row_config(V, logits.element_size(), arch, softcap is not None)
    block = {"BLOCK_V": config.block_v, "TILES": config.tiles, "num_warps": config.num_warps}
    tokens = (ids, as_bytes(mask), rows, temperature)
    scores = (logp, entropy, row_max, log_sum)
    arguments = (logits, *tokens, *scores, *row_strides(logits))
    transform = {"factor": factor, "softcap": softcap, "inner": inner}
    options = {"V": V, "log_vocab": math.log(V), **transform, **block, "ALIGNED": rows_aligned(logits)}
    variant = variant_of(_logprob_fwd_kernel, arguments, options)
    with on_device(logits):
        if not few_rows(count, arch, variant):
            _logprob_fwd_kernel[(count,)](*arguments, **options)
            return
        parts = tile_statistics_of_rows(logits, *tokens, config, **transform)
        _parts_to_scores_kernel[(count,)](parts, *tokens, *scores, V, math.log(V), factor, **block)
        compile_ahead(_logprob_fwd_kernel, variant, *arguments, **options)


def tile_statistics_of_rows(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | None,
    config: RowConfig,
    *,
    factor: float,
    softcap: float | None,
    inner: float,
) -> Tensor:
    """(n, 4, TILES) fp32: m, s and q of every tile, each by a program of its own, and the target's logit."""
    count, V = num_rows(logits), logits.shape[-1]
    parts = torch.empty((count, 4, config.tiles), dtype=torch.float32, device=logits.device)
    _tile_statistics_kernel[(count * triton.cdiv(V, config.block_v),)](
        logits, ids, mask, rows, temperature, parts, *row_strides(logits), V, factor, softcap, inner,
        BLOCK_V=config.block_v, TILES=config.tiles, ALIGNED=rows_aligned(logits), num_warps=config.num_warps,
    )  # fmt: skip
    return parts


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
    count, V = num_rows(logits), logits.shape[-1]
    if count == 0:
        return
    config = tile_config(V, architecture(logits.device), softcap is not None)
    stride_b, stride_t, T = row_strides(logits)
    out_stride_b, out_stride_t, out_T = row_strides(dlogits)
    with on_device(logits):
        _logprob_bwd_kernel[(count * triton.cdiv(V, config.block_v),)](
            logits, dlogits, ids, as_bytes(mask), rows, temperature, logp, entropy, row_max, log_sum, dlogp, dentropy,
            stride_b, stride_t, out_stride_b, out_stride_t, T, out_T, V, factor, softcap, inner,
            config.block_v, rows_aligned(logits, dlogits), num_warps=config.num_warps,
        )  # fmt: skip
