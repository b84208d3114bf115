"""Device functions over one row of logits: the transform, the online statistics, the gradient of a tile. Each once.

With u the transformed logit and f the factor on it, z = f·u is what softmax sees. Statistics are kept relative to the
row maximum m in units of u, so that z − max z = f·(u − m) has no cancellation at large logits:
    s = Σ exp(f(u − m)),   q = Σ exp(f(u − m))·f(u − m)
    logp_t = f(u_t − m) − log s,   H = log s − q / s
The target joins last: where it is the maximum, log s = log1p(Σ of the others) keeps the log-prob of a confident token,
and 1 − p = −expm1(logp) its gradient, where 1 + the others would round to 1 from 17 nats on.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to about 1 ulp: a minimax polynomial below 0.625 (Cephes), else through exp; tl has none of its own."""
    a = tl.abs(x)
    z = x * x
    poly = -5.70498872745e-3 * z + 2.06390887954e-2
    poly = poly * z - 5.37397155531e-2
    poly = poly * z + 1.33314422036e-1
    poly = poly * z - 3.33332819422e-1
    small = poly * z * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def log1p(x):
    """log(1 + x) to a few ulp for x ≥ 0: the rounding of 1 + x is divided out (Kahan); tl has none of its own."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / (w - 1.0)))


@triton.jit
def one_minus_exp(x):
    """1 − eˣ for x ≤ 0 without cancellation, from eˣ = (1 + t)/(1 − t) with t = tanh(x/2)."""
    t = tanh(0.5 * x)
    return -2.0 * t / (1.0 - t)


@triton.jit
def transform(x, softcap, inner):
    """u of a raw logit: x, or softcap·tanh(inner·x) with inner = logit_scale / softcap."""
    if softcap is not None:
        x = softcap * tanh(x * inner)
    return x


@triton.jit
def row_start(i, T, stride_b, stride_t):
    """Offset of row i of a (B, T, V) tensor with any strides; i is int64."""
    return (i // T) * stride_b + (i % T) * stride_t


@triton.jit
def token_of_row(i, rows_ptr):
    """The token that row i scores: i itself, or where the caller's list of rows says."""
    if rows_ptr is not None:
        i = tl.load(rows_ptr + i)
    return i


@triton.jit
def is_valid(mask_ptr, n):
    """Whether token n counts."""
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + n) != 0
    else:
        valid = n >= 0
    return valid


@triton.jit
def row_factor(factor, temperature_ptr, n):
    """f of token n; a scalar temperature is inside `factor` already."""
    if temperature_ptr is not None:
        factor = factor / tl.load(temperature_ptr + n).to(tl.float32)
    return factor


@triton.jit
def decayed(new, m, s, q, k):
    """(what to subtract from logits, s, q) relative to the maximum `new` instead of m; nothing seen stays 0."""
    safe = tl.where(new == float("-inf"), 0.0, new)
    first = m == float("-inf")
    shift = tl.where(first, 0.0, (m - safe) * k)
    decay = tl.where(first, 0.0, tl.exp2(shift))
    return safe, decay * s, decay * (q + shift * s)


@triton.jit
def online_step(u, m, s, q, k):
    """Take a tile into the running statistics (m, s, q/ln 2), with k = f·log2 e so that every exponent is one product.
    -inf adds nothing, also when all seen so far is -inf."""
    new = tl.maximum(m, tl.max(u, 0))
    safe, s, q = decayed(new, m, s, q, k)
    d = (u - safe) * k
    e = tl.exp2(d)
    return new, s + tl.sum(e, 0), q + tl.sum(tl.where(u == float("-inf"), 0.0, e * d), 0)


@triton.jit
def without_target(x, start, target, BLOCK_V: tl.constexpr):
    """The tile with -inf in the target's place."""
    if (target >= start) & (target < start + BLOCK_V):
        nothing = tl.full((), float("-inf"), tl.float32).to(x.dtype)
        x = tl.where(start + tl.arange(0, BLOCK_V) == target, nothing, x)
    return x


@triton.jit
def others(x, start, target, softcap, inner, BLOCK_V: tl.constexpr):
    """(tile to keep, its transformed logits without the target). The kept tile need not hold the target, whose gradient
    is taken by itself; only a softcap would make it finite again."""
    if softcap is not None:
        u = without_target(transform(x.to(tl.float32), softcap, inner), start, target, BLOCK_V)
    else:
        x = without_target(x, start, target, BLOCK_V)
        u = x.to(tl.float32)
    return x, u


@triton.jit
def with_target(u, m, s, q, k):
    """(m, log s, q/s) once the target's logit u has joined the statistics of the others."""
    new = tl.maximum(m, u)
    safe, s, q = decayed(new, m, s, q, k)
    d = (u - safe) * k
    e = tl.exp2(d)
    q = (q + tl.where(u == float("-inf"), 0.0, e * d)) * LN2
    return new, tl.where(e == 1.0, log1p(s), tl.log(s + e)), q / (s + e)


@triton.jit
def row_statistics(row_ptr, target, V, log_vocab, f, softcap, inner, KEEP: tl.constexpr, BLOCK_V: tl.constexpr):
    """(last tile, m, log s, entropy, logp) of a row in one read: the masked tail, then the full tiles from the left.

    logp, the target's log-prob, is at most 0, and NaN for an id outside the vocabulary, whose memory is never touched.

    The last tile read is the last full one, or the tail of a row shorter than a tile; it comes back as loaded, for
    `write_row_gradient` to begin with. KEEP: ask the cache to hold the row for a second sweep, else to let it go.
    """
    hint: tl.constexpr = "evict_last" if KEEP else "evict_first"
    offs = tl.arange(0, BLOCK_V)
    k = f * LOG2E
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.full((), 0.0, tl.float32)
    q = tl.full((), 0.0, tl.float32)
    x = tl.zeros((BLOCK_V,), row_ptr.dtype.element_ty)
    full = V // BLOCK_V * BLOCK_V
    if full < V:
        tail = full + offs < V
        x = tl.load(row_ptr + full + offs, mask=tail, other=0.0, eviction_policy=hint)
        x, u = others(x, full, target, softcap, inner, BLOCK_V)
        m, s, q = online_step(tl.where(tail, u, float("-inf")), m, s, q, k)
    for start in range(0, full, BLOCK_V):
        x = tl.load(row_ptr + start + offs, eviction_policy=hint)
        x, u = others(x, start, target, softcap, inner, BLOCK_V)
        m, s, q = online_step(u, m, s, q, k)
    inside = (target >= 0) & (target < V)
    chosen = transform(tl.load(row_ptr + tl.where(inside, target, 0)).to(tl.float32), softcap, inner)
    chosen = tl.where(inside, chosen, float("-inf"))
    m, log_s, mean = with_target(chosen, m, s, q, k)
    entropy = log_s - mean
    entropy = tl.where(entropy < 0, 0.0, tl.where(entropy > log_vocab, log_vocab, entropy))
    logp = (chosen - m) * f - log_s
    logp = tl.where(logp > 0, 0.0, logp)
    return x, m, log_s, entropy, tl.where(inside, logp, float("nan"))


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
def write_row_gradient(
    last, row_ptr, out_ptr, V, target, logp, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Second sweep over a row, in the reverse order of the first (what was read last is the likeliest to be in cache),
    rounding once at the store. `last` is the tile that `row_statistics` kept, or None: then it is read as well."""
    offs = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    own = target_gradient(logp, entropy, c, e, f)
    todo = full
    if last is not None:
        todo = tl.maximum(full - BLOCK_V, 0)
        g = tile_gradient(last.to(tl.float32), todo, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
        tl.store(out_ptr + todo + offs, g.to(out_ptr.dtype.element_ty), mask=todo + offs < V, cache_modifier=".cs")
    for back in range(BLOCK_V, todo + BLOCK_V, BLOCK_V):
        start = todo - back
        x = tl.load(row_ptr + start + offs, eviction_policy="evict_first").to(tl.float32)
        g = tile_gradient(x, start, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
        tl.store(out_ptr + start + offs, g.to(out_ptr.dtype.element_ty), cache_modifier=".cs")
    unread = full < V
    if last is not None:
        unread = unread & (full > 0)
    if unread:
        tail = full + offs < V
        x = tl.load(row_ptr + full + offs, mask=tail, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tile_gradient(x, full, target, own, m, log_s, entropy, c, e, f, softcap, inner, BLOCK_V)
        tl.store(out_ptr + full + offs, g.to(out_ptr.dtype.element_ty), mask=tail, cache_modifier=".cs")


@triton.jit
def write_zero_row(out_ptr, V, BLOCK_V: tl.constexpr):
    """A row without gradient: zeros, and nothing read."""
    zeros = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
    offs = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        tl.store(out_ptr + start + offs, zeros, cache_modifier=".cs")
    if full < V:
        tl.store(out_ptr + full + offs, zeros, mask=full + offs < V, cache_modifier=".cs")
