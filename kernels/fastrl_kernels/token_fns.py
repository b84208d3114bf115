"""What a token adds to the loss, from its own numbers and those of its sequence: inlined by the token kernel and by the
one-pass kernels."""

import triton
import triton.language as tl

from .correction_fns import bounded_weight, divergence, log_rho, outside
from .kl_fns import hold, kl_terms, nothing
from .objective_fns import objective


@triton.jit
def token_rollout_weight(
    old, rollout, bound, lower, upper, reject_lower, reject_upper,
    CORRECTION: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr, REJECT_LEVEL: tl.constexpr,
):  # fmt: skip
    """(importance weight, rejected) of what the token decides by itself."""
    if CORRECTION == "token":
        weight = bounded_weight(log_rho(old, rollout), bound, lower, upper, MODE)
    else:
        weight = tl.zeros_like(old) + 1.0
    rejected = old < old
    if REJECT != "off" and REJECT_LEVEL == "token":
        rejected = outside(divergence(old, rollout, bound, REJECT), reject_lower, reject_upper)
    return weight, rejected


@triton.jit
def token_terms(
    logp, old, log_ratio, advantage, ref, factor, selected, log_weight,
    low, high, delta, dual_clip, bound, kl_coef, kl_clamp, p0, p1, p2, p3,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Everything of a token once its log-ratio and the `factor` of its policy term are known: value and derivatives.

    Returns (policy loss + kl_coef·KL, derivative through log_ratio, derivative by logp, KL, ratio, held, clipped low,
    clipped high, dual). With `ref` None the KL is 0, with `kl_coef` None it is only measured; a `factor` of None is 1.
    """
    x, passes = hold(log_ratio, bound)
    ratio = tl.exp(x)
    loss, dx, dlogp, low_flag, high_flag, dual = objective(
        x, ratio, logp, old, advantage, selected, log_weight, low, high, delta, dual_clip, p0, p1, p2, p3,
        OBJECTIVE,
    )  # fmt: skip
    if factor is not None:
        kept = (factor == 0) == 0
        loss = tl.where(kept, factor * loss, nothing(logp))
        dx = tl.where(kept, factor * dx, 0.0)
        dlogp = tl.where(kept, factor * dlogp, 0.0)
    held = passes == 0
    value = tl.zeros_like(logp)
    if ref is not None:
        value, through, slope, kl_held = kl_terms(logp - ref, ratio, bound, kl_clamp, KL, KL_GRADIENT)
        if kl_coef is not None:
            loss += kl_coef * value
            dx += kl_coef * through
            dlogp += kl_coef * slope
            held = held | kl_held
    return loss, tl.where(passes, dx, 0.0), dlogp, value, ratio, held, low_flag, high_flag, dual


@triton.jit
def logp_cotangent(
    logp, n,
    advantages_ptr, weights_ptr, old_ptr, ref_ptr, rollout_ptr, policy_weights_ptr,
    low, high, delta, dual_clip, bound, kl_coef, kl_clamp, p0, p1, p2, p3,
    lower, upper, reject_lower, reject_upper,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_GRADIENT: tl.constexpr,
    CORRECTION: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr,
):  # fmt: skip
    """d(w·ℓ)/dlogp of token n, a token that counts; NaN where its log-prob is."""
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
    return tl.where(logp == logp, weight * (dratio + dlogp), float("nan"))


@triton.jit
def entropy_cotangent(valid, n, weights_ptr, entropy_weights_ptr, entropy_coef):
    """d(−w·entropy_coef·H)/dH of token n."""
    if entropy_weights_ptr is not None:
        weight = tl.load(entropy_weights_ptr + n, mask=valid, other=0.0)
    else:
        weight = tl.load(weights_ptr + n, mask=valid, other=0.0)
    return -entropy_coef * weight
