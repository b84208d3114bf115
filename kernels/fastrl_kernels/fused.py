"""One pass over the logits: statistics, objective, and the gradient, in one kernel. For losses whose coefficient at a
token depends on that token's own row alone."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .kl_fns import nothing
from .logprob import as_bytes, num_rows, row_strides
from .softmax import (
    is_valid,
    row_factor,
    row_start,
    row_statistics,
    token_of_row,
    write_row_gradient,
    write_zero_row,
)
from .token_fns import token_rollout_weight, token_terms
from .tune import PER_ROW, on_device, row_config


@triton.jit(do_not_specialize=["T", "out_T"], do_not_specialize_on_alignment=PER_ROW)
def _fused_kernel(
    logits_ptr, dlogits_ptr, ids_ptr, mask_ptr, rows_ptr, temperature_ptr,
    advantages_ptr, weights_ptr, entropy_weights_ptr, old_ptr, ref_ptr, rollout_ptr, policy_weights_ptr,
    logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, dlogp_ptr, dentropy_ptr,

    stride_b, stride_t, out_stride_b, out_stride_t,

    T, out_T, V,

    log_vocab, factor, softcap, inner,
    low, high, delta, dual_clip, bound, kl_coef, kl_clamp, entropy_coef, p0, p1, p2, p3,
    lower, upper, reject_lower, reject_upper,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_GRADIENT: tl.constexpr,
    CORRECTION: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row per program: 2V bytes read for the statistics, the same less one tile read again (from L2 as far as it
    holds the row) and 2V written for the gradient (bf16). A masked row, or one with a zero coefficient, reads no more
    and writes zeros."""
    i = tl.program_id(0).to(tl.int64)
    n = token_of_row(i, rows_ptr)
    out_ptr = dlogits_ptr + row_start(i, out_T, out_stride_b, out_stride_t)
    row_ptr = logits_ptr + row_start(i, T, stride_b, stride_t)
    valid = is_valid(mask_ptr, n)
    f = row_factor(factor, temperature_ptr, n)
    m = tl.full((), 0.0, tl.float32)
    log_s, entropy, logp, c = m, m, m, m
    e = None
    target = tl.full((), 0, tl.int64)
    last = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
    if valid:
        target = tl.load(ids_ptr + n)
        last, m, log_s, entropy, logp = row_statistics(row_ptr, target, V, log_vocab, f, softcap, inner, True, BLOCK_V)
        old, gap = logp, nothing(logp)
        if old_ptr is not None:
            old = tl.load(old_ptr + n)
            gap = logp - old
        ref = None
        if ref_ptr is not None:
            ref = tl.load(ref_ptr + n)
        advantage, weight = tl.load(advantages_ptr + n), tl.load(weights_ptr + n)
        scale = None
        if CORRECTION != "off":
            rollout = tl.load(rollout_ptr + n)
            scale, rejected = token_rollout_weight(
                old, rollout, bound, lower, upper, reject_lower, reject_upper, CORRECTION, MODE, REJECT, "token"
            )
            scale = tl.where(rejected, 0.0, scale)
        elif policy_weights_ptr is not None:
            scale = tl.load(policy_weights_ptr + n)
        _, dratio, dlogp, _, _, _, _, _, _ = token_terms(
            logp, old, gap, advantage, ref, scale, None, None,
            low, high, delta, dual_clip, bound, kl_coef, kl_clamp, p0, p1, p2, p3, OBJECTIVE, KL, KL_GRADIENT,
        )  # fmt: skip
        c = weight * (dratio + dlogp)
        c = tl.where(logp == logp, c, float("nan"))
    tl.store(logp_ptr + n, logp)
    tl.store(entropy_ptr + n, entropy)
    tl.store(max_ptr + n, m)
    tl.store(log_sum_ptr + n, log_s)
    tl.store(dlogp_ptr + n, c)
    live = valid & (c != 0)
    if entropy_coef is not None:
        if entropy_weights_ptr is not None:
            e = -entropy_coef * tl.load(entropy_weights_ptr + n, mask=valid, other=0.0)
        else:
            e = -entropy_coef * tl.load(weights_ptr + n, mask=valid, other=0.0)
        tl.store(dentropy_ptr + n, e)
        live = live | (valid & (e != 0))
    # In place, the gradient overwrites logits that the whole program must have read before.
    tl.debug_barrier()
    if live:
        write_row_gradient(last, row_ptr, out_ptr, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
    else:
        write_zero_row(out_ptr, V, BLOCK_V)


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
    """Score every row and write d(Σ wₜ·ℓₜ)/dlogits in the same launch."""
    if num_rows(logits) == 0:
        return
    V = logits.shape[-1]
    config = row_config(V, transform["softcap"] is not None)
    stride_b, stride_t, T = row_strides(logits)
    out_stride_b, out_stride_t, out_T = row_strides(dlogits)
    with on_device(logits):
        _fused_kernel[(num_rows(logits),)](
            logits, dlogits, ids, as_bytes(mask), rows, temperature, advantages, weights, entropy_weights, old, ref,
            rollout, policy_weights, logp, entropy, row_max, log_sum, dlogp, dentropy,
            stride_b, stride_t, out_stride_b, out_stride_t, T, out_T, V, math.log(V),
            **transform, **numbers, **structure, BLOCK_V=config.block_v, num_warps=config.num_warps,
        )  # fmt: skip
