"""Device functions over one row of logits: the transform and the statistics. Each once.

The unit of arithmetic is the tile: each gives its statistics by itself, and a row puts those of its tiles side by side
and adds them up in one step. So one program may take a whole row or several programs its tiles, with the same bits.

With u the transformed logit and f the factor on it, z = f·u is what softmax sees. Statistics are kept relative to a
maximum m in units of u, so that z − max z = f·(u − m) has no cancellation at large logits:
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
def row_at(ptr, i, T, stride_b, stride_t, ALIGNED: tl.constexpr):
    """Where row i of a (B, T, V) tensor of any strides begins; i is int64, but a grid has fewer than 2³¹ rows: the
    division is of 32 bits, the products of 64.

    ALIGNED: every row begins at a multiple of 16 bytes. Told here and not read off the strides: for an odd vocabulary
    T·V is a multiple of 16 at some lengths, each of which would be compiled anew.
    """
    row = i.to(tl.int32)
    ptr += (row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


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
def load_target(ids_ptr, n, V):
    """The id that token n scores, as 32 bits; -1 for one outside the vocabulary."""
    target = tl.load(ids_ptr + n)
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


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
    shift = tl.where(m == float("-inf"), 0.0, (m - safe) * k)
    decay = tl.exp2(shift)
    return safe, decay * s, decay * (q + shift * s)


@triton.jit
def tile_statistics(u, k):
    """(m, s, q/ln 2) of one tile by itself, with k = f·log2 e so that every exponent is one product. A tile of -inf
    alone has m = -inf and adds nothing."""
    m = tl.max(u, 0)
    d = (u - tl.where(m == float("-inf"), 0.0, m)) * k
    e = tl.exp2(d)
    return m, tl.sum(e, 0), tl.sum(tl.where(d == float("-inf"), 0.0, e * d), 0)


@triton.jit
def tiles_together(ms, ss, qs, k):
    """(m, s, q/ln 2) of a row from those of its tiles, side by side: (TILES,), absent ones -inf, 0, 0."""
    m = tl.max(ms, 0)
    _, ss, qs = decayed(m, ms, ss, qs, k)
    # Absent tiles are 0 already: said once more between the products and the sums, which the compiler would contract
    # to one operation, rounded in one lane as in no other. Lanes that disagree take different branches.
    absent = ms == float("-inf")
    ss, qs = tl.where(absent, 0.0, ss), tl.where(absent, 0.0, qs)
    return m, tl.sum(ss, 0), tl.sum(qs, 0)


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
def load_tile(row_ptr, start, target, V, softcap, inner, HINT: tl.constexpr, BLOCK_V: tl.constexpr):
    """`others` of the tile at `start`; columns beyond the vocabulary are -inf. Without a mask where the tile is full,
    so that its accesses are 16 bytes wide whatever V is."""
    offs = start + tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= V:
        x = tl.load(row_ptr + offs, eviction_policy=HINT)
        x, u = others(x, start, target, softcap, inner, BLOCK_V)
    else:
        x = tl.load(row_ptr + offs, mask=offs < V, other=0.0, eviction_policy=HINT)
        x, u = others(x, start, target, softcap, inner, BLOCK_V)
        u = tl.where(offs < V, u, float("-inf"))
    return x, u


@triton.jit
def target_logit(row_ptr, target, softcap, inner):
    """The target's transformed logit; -inf for an id outside the vocabulary, whose memory is never touched."""
    u = transform(tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32), softcap, inner)
    return tl.where(target >= 0, u, float("-inf"))


@triton.jit
def row_scores(ms, ss, qs, chosen, target, log_vocab, f):
    """(m, log s, entropy, logp) of a row from the statistics of its tiles and the target's logit `chosen`.

    logp, the target's log-prob, is at most 0, and NaN for an id outside the vocabulary.
    """
    k = f * LOG2E
    m, s, q = tiles_together(ms, ss, qs, k)
    m, log_s, mean = with_target(chosen, m, s, q, k)
    entropy = log_s - mean
    entropy = tl.where(entropy < 0, 0.0, tl.where(entropy > log_vocab, log_vocab, entropy))
    logp = (chosen - m) * f - log_s
    logp = tl.where(logp > 0, 0.0, logp)
    return m, log_s, entropy, tl.where(target >= 0, logp, float("nan"))


@triton.jit
def row_statistics(
    row_ptr, target, V, log_vocab, f, softcap, inner,
    KEEP: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """(last tile, m, log s, entropy, logp) of a row in one read: the tail first, then the full tiles from the left.

    The last tile read is the last full one, or the tail of a row shorter than a tile; it comes back as loaded, for
    `write_row_gradient` to begin with. KEEP: ask the cache to hold the row for a second sweep, else to let it go.
    """
    hint: tl.constexpr = "evict_last" if KEEP else "evict_first"
    k = f * LOG2E
    lane = tl.arange(0, TILES)
    ms = tl.full((TILES,), float("-inf"), tl.float32)
    ss = tl.full((TILES,), 0.0, tl.float32)
    qs = tl.full((TILES,), 0.0, tl.float32)
    x = tl.zeros((BLOCK_V,), row_ptr.dtype.element_ty)
    full = V // BLOCK_V * BLOCK_V
    if full < V:
        x, u = load_tile(row_ptr, full, target, V, softcap, inner, hint, BLOCK_V)
        m, s, q = tile_statistics(u, k)
        here = lane == full // BLOCK_V
        ms, ss, qs = tl.where(here, m, ms), tl.where(here, s, ss), tl.where(here, q, qs)
    for start in range(0, full, BLOCK_V):
        x = tl.load(row_ptr + start + tl.arange(0, BLOCK_V), eviction_policy=hint)
        x, u = others(x, start, target, softcap, inner, BLOCK_V)
        m, s, q = tile_statistics(u, k)
        here = lane == start // BLOCK_V
        ms, ss, qs = tl.where(here, m, ms), tl.where(here, s, ss), tl.where(here, q, qs)
    chosen = target_logit(row_ptr, target, softcap, inner)
    m, log_s, entropy, logp = row_scores(ms, ss, qs, chosen, target, log_vocab, f)
    return x, m, log_s, entropy, logp
