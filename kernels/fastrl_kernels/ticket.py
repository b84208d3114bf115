"""The one-pass loss with every logit read once: the tiles of a row lie in the registers of as many programs, which wait
for each other between the statistics and the gradient."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logprob import num_rows, scores_of_parts, store_part, store_scores
from .row_gradient import store_tile, target_gradient, tile_gradient, write_zeros
from .softmax import is_valid, load_target, row_at, row_factor, token_of_row
from .token_fns import entropy_cotangent, logp_cotangent
from .tune import CHIPS, PER_ROW, ROWS, STRIDES, row_config

WINS: frozenset[str] = frozenset()
"""Architectures on which it was measured to be faster than a row per program: none, it has not been timed yet."""
_forced: contextvars.ContextVar[bool | None] = contextvars.ContextVar("tickets", default=None)


@contextlib.contextmanager
def tickets(use: bool) -> Iterator[None]:
    """Take this schedule wherever it can run, or nowhere, meanwhile: to compare the two. It changes no bit."""
    token = _forced.set(use)
    try:
        yield
    finally:
        _forced.reset(token)


def takes_tickets(
    vocab_size: int, dtype_bytes: int, arch: str, softcap: bool = False, *, multiprocessors: int | None = None
) -> bool:
    """Whether rows of this vocabulary go by ticket. A row of one tile has nobody to wait for; the interpreter, which
    runs one program after another, would wait forever.

    The tiles of a row must be resident together, one per multiprocessor at worst, and beside those of another such
    launch on another stream. `multiprocessors` is how many the device has, which may be fewer than its architecture
    stands for: a smaller chip of the family, or a slice of one.
    """
    forced = _forced.get()
    if arch not in CHIPS or not (arch in WINS if forced is None else forced):
        return False
    tiles = -(-vocab_size // row_config(vocab_size, dtype_bytes, arch, softcap).block_v)
    there = CHIPS[arch].multiprocessors if multiprocessors is None else multiprocessors
    return 1 < tiles <= there // 2


@triton.jit(do_not_specialize=[*STRIDES, *ROWS], do_not_specialize_on_alignment=PER_ROW)
def _fused_ticket_kernel(
    parts_ptr, arrived_ptr, ticket_ptr,
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
    """One tile of a row per program: 2 bytes read and 2 written per logit (bf16), 24 per tile beside them.

    Programs take tickets from a counter instead of their place in the grid, which the device may run in any order. The
    tickets of a row are handed out before those of the next, and whoever is done leaves room for the next ticket: where
    the tiles of one row fit the device together, a tile waits only for programs that run, or will be the next to.
    In place is safe, since no tile is written before all tiles of its row have been read.
    """
    tiles = tl.cdiv(V, BLOCK_V)
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    i, j = (ticket // tiles).to(tl.int64), ticket % tiles
    start = j * BLOCK_V
    n = token_of_row(i, rows_ptr)
    row_ptr = row_at(logits_ptr, i, T, stride_b, stride_t, ALIGNED)
    part_ptr = parts_ptr + i * 4 * TILES
    valid = is_valid(mask_ptr, n)
    f = row_factor(factor, temperature_ptr, n)
    m = tl.full((), 0.0, tl.float32)
    log_s, entropy, logp, c = m, m, m, m
    e = None
    target = tl.full((), 0, tl.int32)
    x = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
    if valid:
        target = load_target(ids_ptr, n, V)
        x = store_part(row_ptr, part_ptr, j, target, V, f, softcap, inner, BLOCK_V, TILES)
        tl.debug_barrier()
        seen = tl.atomic_add(arrived_ptr + i, 1, sem="acq_rel") + 1
        while seen < tiles:
            seen = tl.atomic_add(arrived_ptr + i, 0, sem="acquire")
        m, log_s, entropy, logp = scores_of_parts(part_ptr, target, V, log_vocab, f, BLOCK_V, TILES)
        c = logp_cotangent(
            logp, n, advantages_ptr, weights_ptr, old_ptr, ref_ptr, rollout_ptr, policy_weights_ptr,
            low, high, delta, dual_clip, bound, kl_coef, kl_clamp, p0, p1, p2, p3,
            lower, upper, reject_lower, reject_upper, OBJECTIVE, KL, KL_GRADIENT, CORRECTION, MODE, REJECT,
        )  # fmt: skip
    live = valid & (c != 0)
    if entropy_coef is not None:
        e = entropy_cotangent(valid, n, weights_ptr, entropy_weights_ptr, entropy_coef)
        live = live | (valid & (e != 0))
    if j == 0:
        store_scores(logp_ptr, entropy_ptr, max_ptr, log_sum_ptr, n, logp, entropy, m, log_s)
        tl.store(dlogp_ptr + n, c)
        if entropy_coef is not None:
            tl.store(dentropy_ptr + n, e)
    out_ptr = row_at(dlogits_ptr, i, out_T, out_stride_b, out_stride_t, ALIGNED)
    if live:
        own = target_gradient(logp, entropy, c, e, f)
        g = tile_gradient(x.to(tl.float32), start, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
        store_tile(out_ptr, start, V, g, BLOCK_V)
    else:
        write_zeros(out_ptr, start, V, BLOCK_V)


def launch_by_ticket(
    logits: Tensor, *arguments: Any, V: int, BLOCK_V: int, TILES: int, num_warps: int, **options: Any
) -> None:
    """The arguments of `_fused_kernel`; the counters and the statistics of the tiles are allocated here."""
    count = num_rows(logits)
    parts = torch.empty((count, 4, TILES), dtype=torch.float32, device=logits.device)
    counters = torch.zeros(count + 1, dtype=torch.int32, device=logits.device)
    _fused_ticket_kernel[(count * triton.cdiv(V, BLOCK_V),)](
        parts, counters[1:], counters, logits, *arguments, **options,
        V=V, BLOCK_V=BLOCK_V, TILES=TILES, num_warps=num_warps,
    )  # fmt: skip
