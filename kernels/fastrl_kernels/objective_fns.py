"""Device objectives and KL estimators: value and derivative together, on scalars or blocks.

Twins of the plain-torch specifications in `fastrl/objectives.py`; selected by a string constexpr.
"""

import triton
import triton.language as tl


@triton.jit
def hold(x, bound):
    """(x held to ±bound, whether the derivative passes). NaN stays NaN and passes; a bound of None holds nothing."""
    if bound is not None:
        held = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
        passes = (tl.abs(x) > bound) == 0
    else:
        held = x
        passes = x == x
        passes = passes | (passes == 0)
    return held, passes


@triton.jit
def ppo_clip(ratio, advantage, low, high, delta, dual_clip):
    """ℓ = −min( min(r, δ)·A, clip(r, low, high)·A ), dual clip for A < 0; d/dlog r = −r·A where the
    chosen term is not held at a bound, else 0.

    Returns (loss, derivative, whether the dual clip replaced the loss).
    """
    clipped, free = ratio, ratio
    if low is not None:
        clipped = tl.where(ratio < low, low, clipped)
    if high is not None:
        clipped = tl.where(ratio > high, high, clipped)
    if delta is not None:
        free = tl.where(ratio > delta, delta, ratio)
    chosen = tl.where(-free * advantage < -clipped * advantage, clipped, free)
    loss = -chosen * advantage
    derivative = tl.where((chosen < ratio) | (chosen > ratio), 0.0, -ratio * advantage)
    dual = advantage != advantage
    if dual_clip is not None:
        bound = -dual_clip * advantage
        dual = (advantage < 0) & (loss > bound)
        loss = tl.where(dual, bound, loss)
        derivative = tl.where(dual, 0.0, derivative)
    return loss, derivative, dual


@triton.jit
def objective(ratio, advantage, low, high, delta, dual_clip, OBJECTIVE: tl.constexpr):
    """(loss, dloss/dlog_ratio, dual-clipped) of the named objective; `ratio` is exp of the held log-ratio."""
    if OBJECTIVE == "ppo_clip":
        loss, derivative, dual = ppo_clip(ratio, advantage, low, high, delta, dual_clip)
    else:
        tl.static_assert(False, "unknown OBJECTIVE")
    return loss, derivative, dual


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
def token_terms(
    logp, delta_logp, log_ratio, advantage, ref, low, high, delta, dual_clip, bound, kl_coef,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """Everything of a token that needs no sequence: value and both derivatives.

    Returns (loss without the KL, dloss/dlog_ratio, kl value, kl_coef·dkl/dlogp, ratio, held, dual). With `ref` None the
    KL is 0, with `kl_coef` None it is only measured.
    """
    held_ratio, passes = hold(log_ratio, bound)
    ratio = tl.exp(held_ratio)
    loss, derivative, dual = objective(ratio, advantage, low, high, delta, dual_clip, OBJECTIVE)
    derivative = tl.where(passes, derivative, 0.0)
    held = passes == 0
    if ref is not None:
        kl_value, slope, kl_held = kl(logp - ref, bound, KL)
    else:
        kl_value, slope, kl_held = tl.zeros_like(logp), tl.zeros_like(logp), held
    if kl_coef is not None:
        dkl = kl_coef * slope
        held = held | kl_held
    else:
        dkl = tl.zeros_like(logp)
    return loss, derivative, kl_value, dkl, ratio, held, dual
