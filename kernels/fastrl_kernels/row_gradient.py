"""Device functions for the gradient of a row of logits, from its statistics: by tile, and over a whole row."""

import triton
import triton.language as tl

from .softmax import LN2, LOG2E, one_minus_exp, transform


@triton.jit
def target_gradient(logp, entropy, c, e, f):
    """The same for the target, from its log-prob: f·(c(1 − p) − e·p(log p + H)), whose 1 − p keeps its digits."""
    g = c * one_minus_exp(logp)
    if e is not None:
        g -= e * tl.where(logp == float("-inf"), 0.0, tl.exp(logp) * (logp + entropy))
    return g * f


@triton.jit
def tile_gradient(x, start, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V: tl.constexpr):
    """d(c·logp + e·H)/dx of a tile: f·(c(1[j = target] − p) − e·p(log p + H)), times the softcap's slope, in fp32.

    `own` is the target's, without the slope; `e` is None when nothing flows into the entropy.
    """
    u = transform(x, softcap, inner)
    log2_p = (u - m) * (f * LOG2E) - log_s * LOG2E
    p = tl.exp2(log2_p)
    g = -(c * f) * p
    if e is not None:
        e2 = e * f * LN2
        g -= tl.where(u == float("-inf"), 0.0, p * (e2 * (log2_p + entropy * LOG2E)))
    if (target >= start) & (target < start + BLOCK_V):
        g = tl.where(start + tl.arange(0, BLOCK_V) == target, own, g)
    if softcap is not None:
        t = u / softcap
        g = g * (inner * softcap) * (1.0 - t * t)
    return g


@triton.jit
def store_tile(out_ptr, start, V, g, BLOCK_V: tl.constexpr):
    """Store a tile, rounding once; without a mask where it is full, so that the stores are 16 bytes wide whatever V
    is. Nobody reads the gradient soon: the cache need not keep it."""
    offs = start + tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= V:
        tl.store(out_ptr + offs, g.to(out_ptr.dtype.element_ty), cache_modifier=".cs")
    else:
        tl.store(out_ptr + offs, g.to(out_ptr.dtype.element_ty), mask=offs < V, cache_modifier=".cs")


@triton.jit
def write_tile_gradient(
    row_ptr, out_ptr, start, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Read a tile, write its gradient."""
    offs = start + tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= V:
        x = tl.load(row_ptr + offs, eviction_policy="evict_first").to(tl.float32)
    else:
        x = tl.load(row_ptr + offs, mask=offs < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
    own = target_gradient(logp, entropy, c, e, f)
    g = tile_gradient(x, start, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
    store_tile(out_ptr, start, V, g, BLOCK_V)


@triton.jit
def write_row_gradient(
    last, row_ptr, out_ptr, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Second sweep over a row, in the reverse order of the first (what was read last is the likeliest to be in cache),
    rounding once at the store. `last` is the tile that `row_statistics` kept."""
    offs = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    own = target_gradient(logp, entropy, c, e, f)
    kept = tl.maximum(full - BLOCK_V, 0)
    g = tile_gradient(last.to(tl.float32), kept, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
    store_tile(out_ptr, kept, V, g, BLOCK_V)
    for back in range(BLOCK_V, kept + BLOCK_V, BLOCK_V):
        # Told, as Triton 3.6 does not see it beside a softcap, and stores 2 bytes at a time.
        start = tl.multiple_of(kept - back, 16)
        x = tl.load(row_ptr + start + offs, eviction_policy="evict_first").to(tl.float32)
        g = tile_gradient(x, start, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
        tl.store(out_ptr + start + offs, g.to(out_ptr.dtype.element_ty), cache_modifier=".cs")
    if (full > 0) & (full < V):
        write_tile_gradient(
            row_ptr, out_ptr, full, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V
        )


@triton.jit
def write_zeros(out_ptr, start, V, BLOCK_V: tl.constexpr):
    """A tile without gradient: zeros, and nothing read."""
    store_tile(out_ptr, start, V, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), BLOCK_V)


@triton.jit
def write_zero_row(out_ptr, V, BLOCK_V: tl.constexpr):
    """A row without gradient: zeros, and nothing read."""
    zeros = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        tl.store(out_ptr + start + tl.arange(0, BLOCK_V), zeros, cache_modifier=".cs")
    if full < V:
        store_tile(out_ptr, full, V, zeros, BLOCK_V)
