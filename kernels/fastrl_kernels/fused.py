"""One pass over the logits: statistics, objective, and the gradient. For losses whose coefficient at a token depends on
that token's own row alone.

Three schedules of the same arithmetic, with the same bits: a row per program (`_fused_kernel`), the tiles of few rows
by programs of their own in three launches, and a row's tiles by programs that wait for each other (`ticket.py`)."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .logprob import (
    as_bytes,
    logprob_bwd,
    num_rows,
    row_strides,
    rows_aligned,
    scores_of_parts,
    store_scores,
    tile_statistics_of_rows,
)
from .row_gradient import write_row_gradient, write_zero_row
from .softmax import is_valid, load_target, row_at, row_factor, row_statistics, token_of_row
from .ticket import launch_by_ticket, takes_tickets
from .token_fns import entropy_cotangent, logp_cotangent
from .tune import (
    PER_ROW,
    ROWS,
    STRIDES,
    architecture,
    compile_ahead,
    few_rows,
    multiprocessors,
    on_device,
    row_config,
    variant_of,
)


@triton.jit(do_not_specialize=[*STRIDES, *ROWS], do_not_specialize_on_alignment=PER_ROW)
def _fused_kernel(
    logits_ptr, dlogits_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr,
    advantages_ptr, weights_ptr, entropy_weights_ptr, old_ptr, ref_ptr, rollout_ptr, policy_weights_ptr,
    logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, dlogp_ptr, dentropy_ptr,

    stride_b: tl.int64, stride_t: tl.int64, out_stride_b: tl.int64, out_stride_t: tl.int64,

    T, out_T, V,

    log_vocab, factor, softcap, inner,
    low, high, delta, dual_clip, bound, kl_coef, kl_clamp, entropy_coef, p0, p1, p2, p3,
    lower, upper, reject_lower, reject_upper,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_GRADIENT: tl.constexpr,
    CORRECTION: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr,
    BLOCK_V: tl.constexpr, TILES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row per program: 2V bytes read for the statistics, the same less one tile read again (from L2 as far as it
    holds the row) and 2V written for the gradient (bf16). A masked row, or one with a zero coefficient, reads no more
    and writes zeros."""
    i = tl.program_id(0).to(tl.int64)
    n = token_of_row(i, rows_ptr)
    row_ptr = row_at(logits_ptr, i, T, stride_b, stride_t, ALIGNED)
    valid = is_valid(mask_ptr, n)
    f = row_factor(factor, temperature_ptr, n)
    m = tl.full((), 0.0, tl.float32)
    log_s, entropy, logp, c = m, m, m, m
    e = None
    target = tl.full((), 0, tl.int32)
    last = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
    if valid:
        target = load_target(ids_ptr, n, V)
        last, m, log_s, entropy, logp = row_statistics(
            row_ptr, target, V, log_vocab, f, softcap, inner, True, BLOCK_V, TILES
        )
        c = logp_cotangent(
            logp, n, advantages_ptr, weights_ptr, old_ptr, ref_ptr, rollout_ptr, policy_weights_ptr,
            low, high, delta, dual_clip, bound, kl_coef, kl_clamp, p0, p1, p2, p3,
            lower, upper, reject_lower, reject_upper, OBJECTIVE, KL, KL_GRADIENT, CORRECTION, MODE, REJECT,
        )  # fmt: skip
    store_scores(logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, n, logp, entropy, m, log_s)
    tl.store(dlogp_ptr + n, c)
    live = valid & (c != 0)
    if entropy_coef is not None:
        e = entropy_cotangent(valid, n, weights_ptr, entropy_weights_ptr, entropy_coef)
        tl.store(dentropy_ptr + n, e)
        live = live | (valid & (e != 0))
    # In place, the gradient overwrites logits that the whole program must have read before.
    tl.debug_barrier()
    out_ptr = row_at(dlogits_ptr, i, out_T, out_stride_b, out_stride_t, ALIGNED)
    if live:
        write_row_gradient(last, row_ptr, out_ptr, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
    else:
        write_zero_row(out_ptr, V, BLOCK_V)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _parts_to_cotangents_kernel(
    parts_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr,
    advantages_ptr, weights_ptr, entropy_weights_ptr, old_ptr, ref_ptr, rollout_ptr, policy_weights_ptr,
    logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, dlogp_ptr, dentropy_ptr,

    V,

    log_vocab, factor,
    low, high, delta, dual_clip, bound, kl_coef, kl_clamp, entropy_coef, p0, p1, p2, p3,
    lower, upper, reject_lower, reject_upper,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_GRADIENT: tl.constexpr,
    CORRECTION: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr,
    BLOCK_V: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The middle of `_fused_kernel`, one row per program: from the statistics of its tiles to scores and cotangents. 12
    bytes read per tile; the gradient is left to `logprob_bwd`."""
    i = tl.program_id(0).to(tl.int64)
    n = token_of_row(i, rows_ptr)
    valid = is_valid(mask_ptr, n)
    m = tl.full((), 0.0, tl.float32)
    log_s, entropy, logp, c = m, m, m, m
    if valid:
        f = row_factor(factor, temperature_ptr, n)
        target = load_target(ids_ptr, n, V)
        m, log_s, entropy, logp = scores_of_parts(parts_ptr + i * 4 * TILES, target, V, log_vocab, f, BLOCK_V, TILES)
        c = logp_cotangent(
            logp, n, advantages_ptr, weights_ptr, old_ptr, ref_ptr, rollout_ptr, policy_weights_ptr,
            low, high, delta, dual_clip, bound, kl_coef, kl_clamp, p0, p1, p2, p3,
            lower, upper, reject_lower, reject_upper, OBJECTIVE, KL, KL_GRADIENT, CORRECTION, MODE, REJECT,
        )  # fmt: skip
    store_scores(logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, n, logp, entropy, m, log_s)
    tl.store(dlogp_ptr + n, c)
    if entropy_coef is not None:
        tl.store(dentropy_ptr + n, entropy_cotangent(valid, n, weights_ptr, entropy_weights_ptr, entropy_coef))


def fused_loss_grad(
    logits: Tensor,  # (B, T, V) or (n, V), unit inner stride
    dlogits: Tensor,  # written; may be logits itself
    ids: Tensor,  # (N,) int64
    mask: Tensor | None,  # (N,) bool
    rows: Tensor | None,  # (n,) int64; None = row i scores token i
    temperature: Tensor | None,  # (N,) fp32
    advantages: Tensor,  # (N,) fp32
    weights: Tensor,  # (N,) fp32
    entropy_weights: Tensor | None,  # (N,) fp32; None = weights
    old: Tensor | None,  # (N,) fp32
    ref: Tensor | None,  # (N,) fp32, as the next two
    rollout: Tensor | None,
    policy_weights: Tensor | None,
    logp: Tensor,  # (N,) fp32, written at the scored tokens, as the next five
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    *,
    transform: dict[str, float | None],
    numbers: dict[str, float | None],
    structure: dict[str, Any],
) -> None:
    """Score every row and write d(Σ wₜ·ℓₜ)/dlogits, from one launch; three for few rows, and for a gradient of another
    dtype or alignment: in one kernel Triton gives all tiles of a row the wider layout of the two, which would sum the
    row in another order than scoring does."""
    count, V, arch = num_rows(logits), logits.shape[-1], architecture(logits.device)
    if count == 0:
        return
    kind = (V, logits.element_size(), arch, transform["softcap"] is not None)
    config = row_config(*kind)
    tokens = (ids, as_bytes(mask), rows, temperature)
    given = (advantages, weights, entropy_weights, old, ref, rollout, policy_weights)
    scores, cotangents = (logp, entropy, row_max, log_sum), (dlogp, dentropy)
    block = {"BLOCK_V": config.block_v, "TILES": config.tiles, "num_warps": config.num_warps}
    stride_b, stride_t, T = row_strides(logits)
    out_stride_b, out_stride_t, out_T = row_strides(dlogits)
    strides = (stride_b, stride_t, out_stride_b, out_stride_t, T, out_T)
    arguments = (logits, dlogits, *tokens, *given, *scores, *cotangents, *strides)
    options = {"V": V, "log_vocab": math.log(V), **transform, **numbers, **structure, **block}
    options["ALIGNED"] = rows_aligned(logits)
    apart = dlogits.dtype != logits.dtype or rows_aligned(dlogits) != rows_aligned(logits)
    variant = variant_of(_fused_kernel, arguments, options)
    by_ticket = not apart and takes_tickets(*kind, multiprocessors=multiprocessors(logits.device))
    with on_device(logits):
        if apart or few_rows(count, arch, variant):
            parts = tile_statistics_of_rows(logits, *tokens, config, **transform)
            _parts_to_cotangents_kernel[(count,)](
                parts, *tokens, *given, *scores, *cotangents, V, math.log(V), transform["factor"],
                **numbers, **structure, **block,
            )  # fmt: skip
            logprob_bwd(logits, dlogits, ids, mask, rows, temperature, *scores, *cotangents, **transform)
            if not (apart or by_ticket):
                compile_ahead(_fused_kernel, variant, *arguments, **options)
        elif by_ticket:
            launch_by_ticket(*arguments, **options)
        else:
            _fused_kernel[(count,)](*arguments, **options)
