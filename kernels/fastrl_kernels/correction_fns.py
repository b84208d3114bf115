"""Device rollout correction: importance weights and rejections. Twins of `fastrl/correction.py`.

CORRECTION is the level of the weight ("token", "sequence", "geometric", or "none" for rejections alone), "off" without
a correction; REJECT the divergence or "off".
"""

import triton
import triton.language as tl

from .kl_fns import hold, k3


@triton.jit
def log_rho(old, rollout):
    """log(π_old/π_rollout), 0 where the sampler reported NaN."""
    return tl.where(rollout == rollout, old - rollout, 0.0)


@triton.jit
def certain(logp):
    """A probability kept 1e-6 from 0 and 1."""
    p = tl.exp(logp)
    return tl.where(p < 1e-6, 1e-6, tl.where(p > 1.0 - 1e-6, 1.0 - 1e-6, p))


@triton.jit
def divergence(old, rollout, bound, REJECT: tl.constexpr):
    """The divergence of a token between rollout and old policy."""
    x, _ = hold(log_rho(old, rollout), bound)
    if REJECT == "k1":
        value = -x
    elif REJECT == "k2":
        value = 0.5 * x * x
    elif REJECT == "k3":
        value = k3(-x)
    elif REJECT == "tv":
        value = tl.where(rollout == rollout, tl.abs(certain(rollout) - certain(old)), 0.0)
    elif REJECT == "binary_kl":
        p, q = certain(rollout), certain(old)
        value = p * tl.log(p / q) + (1.0 - p) * tl.log((1.0 - p) / (1.0 - q))
        value = tl.where(rollout == rollout, value, 0.0)
    else:
        tl.static_assert(False, "unknown REJECT")
    return value


@triton.jit
def outside(x, low, high):
    """x < low or x > high, a bound of None absent."""
    out = x < x
    if low is not None:
        out = out | (x < low)
    if high is not None:
        out = out | (x > high)
    return out


@triton.jit
def bounded_weight(log_weight, bound, lower, upper, MODE: tl.constexpr):
    """exp of the held log-weight, truncated to [lower, upper] or 0 outside."""
    held, _ = hold(log_weight, bound)
    weight = tl.exp(held)
    if MODE == "mask":
        weight = tl.where(outside(weight, lower, upper), 0.0, weight)
    else:
        if lower is not None:
            weight = tl.where(weight < lower, lower, weight)
        if upper is not None:
            weight = tl.where(weight > upper, upper, weight)
    return weight


@triton.jit
def log_of_weight(weight):
    """log of a weight, held to [log 1e-8, 20] (VESPO)."""
    return tl.log(tl.where(weight < 1e-8, 1e-8, tl.where(weight > 485165195.4097903, 485165195.4097903, weight)))
