"""Device KL estimators: value and derivatives together. Twins of `fastrl/kl.py`."""

import triton
import triton.language as tl


@triton.jit
def nothing(x):
    """0, and NaN where x is NaN: not 0·x, which would make NaN of an infinity too."""
    return tl.where(x == x, 0.0, x)


@triton.jit
def hold(x, bound):
    """(x held to ±bound, whether the derivative passes). NaN stays NaN and passes; a bound of None holds nothing."""
    if bound is not None:
        held = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
        passes = (tl.abs(x) > bound) == 0
    else:
        held = x
        passes = (x < x) == 0
    return held, passes


@triton.jit
def k3(x):
    """e⁻ˣ − 1 + x, never negative: its series below |x| = 0.5, where the subtraction would cancel."""
    series = 1.0 / 720 - x * (1.0 / 5040) + x * x * (1.0 / 40320)
    series = 1.0 / 24 - x * (1.0 / 120 - x * series)
    series = x * x * (0.5 - x * (1.0 / 6 - x * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(-x) - 1.0 + x)


@triton.jit
def kl(x, bound, KL: tl.constexpr):
    """(estimate, derivative, held) of the KL from x = logp − ref; only k3 takes an exp, so only its x is held."""
    held = x != x
    if KL == "k1":
        value, derivative = x, tl.where(x == x, 1.0, x)
    elif KL == "abs":
        value, derivative = tl.abs(x), tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    elif KL == "k2":
        value, derivative = 0.5 * x * x, x
    elif KL == "k3":
        x, passes = hold(x, bound)
        value = k3(x)
        derivative = tl.where(passes, x - value, 0.0)
        held = passes == 0
    else:
        tl.static_assert(False, "unknown KL")
    return value, derivative, held


@triton.jit
def kl_terms(x, ratio, bound, kl_clamp, KL: tl.constexpr, KL_GRADIENT: tl.constexpr):
    """(KL as the loss adds it, its derivative through log r, its derivative by logp, held) from x = logp − ref."""
    value, slope, held = kl(x, bound, KL)
    if kl_clamp is not None:
        value, passes = hold(value, kl_clamp)
        slope = tl.where(passes, slope, 0.0)
    through = tl.zeros_like(value)
    if KL_GRADIENT == "importance_weighted":
        value, slope = ratio * value, ratio * slope
        through = value
    elif KL_GRADIENT == "straight_through":
        slope = x
    elif KL_GRADIENT != "plain":
        tl.static_assert(False, "unknown KL_GRADIENT")
    return value, through, slope, held
