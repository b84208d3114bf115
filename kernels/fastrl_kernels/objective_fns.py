"""Device objectives: value and derivatives together, on scalars or blocks.

Twins of the plain-torch specifications in `fastrl/objectives.py`; selected by a string constexpr in `objective`, which
says what each takes and gives.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Device(NamedTuple):
    """What the kernels need of an objective, for the builds that `codegen.py` compiles."""

    numbers: int = 0
    """How many of p0 to p3 it takes."""
    one_pass: bool = True
    """Whether a token's derivative depends on its own row alone, at the token level."""
    sequence_ratio: bool = False
    folds: bool = False
    """Whether it takes the sequence's log-weight."""
    reads_selected: bool = False


OBJECTIVES = {
    "ppo_clip": Device(),
    "cispo": Device(),
    "sapo": Device(numbers=2),
    "gmpo": Device(one_pass=False, sequence_ratio=True),
    "vespo": Device(numbers=4, one_pass=False, folds=True),
    "dppo_tv": Device(numbers=1),
    "dppo_kl": Device(numbers=1),
    "reinforce": Device(),
    "importance_sampling": Device(),
    "topr": Device(numbers=1),
    "dro": Device(numbers=1),
    "clip_cov": Device(one_pass=False),
    "kl_cov": Device(numbers=1, one_pass=False, reads_selected=True),
}


@triton.jit
def clip(x, low, high):
    """x held to [low, high]; a bound of None is absent, NaN stays NaN."""
    if low is not None:
        x = tl.where(x < low, low, x)
    if high is not None:
        x = tl.where(x > high, high, x)
    return x


@triton.jit
def flags_outside(x, low, high, falls, rises):
    """(x < low where `falls`, x > high where `rises`)."""
    below, above = falls & rises, falls & rises
    if low is not None:
        below = (x < low) & falls
    if high is not None:
        above = (x > high) & rises
    return below, above


@triton.jit
def ppo_clip(ratio, advantage, low, high, delta, dual_clip):
    """ℓ = −min( min(r, δ)·A, clip(r, low, high)·A ), dual clip for A < 0; d/dlog r = −r·A where the
    chosen term is not held at a bound, else 0.

    Returns (loss, derivative, whether the dual clip replaced the loss).
    """
    free = clip(ratio, None, delta)
    clipped = clip(ratio, low, high)
    chosen = tl.where(-free * advantage < -clipped * advantage, clipped, free)
    loss = -chosen * advantage
    derivative = tl.where((chosen < ratio) | (chosen > ratio), 0.0, -ratio * advantage)
    dual = (advantage < 0) & (advantage > 0)
    if dual_clip is not None:
        bound = -dual_clip * advantage
        dual = (advantage < 0) & (loss > bound)
        loss = tl.where(dual, bound, loss)
        derivative = tl.where(dual, 0.0, derivative)
    return loss, derivative, dual


@triton.jit
def sapo(ratio, advantage, positive, negative):
    """ℓ = −A·(4/τ)·σ(τ·(r − 1)); d/dlog r = −A·4·σ·(1 − σ)·r, by e = exp(−|·|) so that nothing cancels."""
    tau = tl.where(advantage > 0, positive, negative)
    x = tau * (ratio - 1.0)
    e = tl.exp(-tl.abs(x))
    gate = tl.where(x < 0, e, 1.0) / (1.0 + e)
    return -advantage * (4.0 / tau) * gate, -4.0 * advantage * ratio * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def vespo_weight(log_weight, advantage, k_positive, lambda_positive, k_negative, lambda_negative):
    """φ(w)·A, φ = e^λ·w^k·e^(−λw), log w held to [log 1e-8, 20]."""
    log_w = clip(log_weight, -18.420680743952367, 20.0)
    k = tl.where(advantage < 0, k_negative, k_positive)
    lam = tl.where(advantage < 0, lambda_negative, lambda_positive)
    return tl.exp(lam + k * log_w - lam * tl.exp(log_w)) * advantage


@triton.jit
def dppo_shift(logp, old, DIVERGENCE: tl.constexpr):
    """How far the token's probability has moved, signed: π − π_old, or the binary KL with the sign of the move."""
    p, q = tl.exp(logp), tl.exp(old)
    if DIVERGENCE == "dppo_tv":
        shift = p - q
    else:
        kl = q * (old - logp) + (1.0 - q) * tl.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
        shift = tl.where(logp > old, kl, tl.where(logp < old, -kl, logp - old))
    return shift


@triton.jit
def prepare(gap, advantage, low, high, OBJECTIVE: tl.constexpr):
    """(a token's own log-ratio as its sequence averages it, whether the derivative passes)."""
    prepared = gap
    if OBJECTIVE == "gmpo":
        prepared = tl.where(advantage < 0, clip(gap, low, None), clip(gap, None, high))
        prepared = tl.where(advantage == 0, 0.0, prepared)
        passes = ((prepared < gap) | (prepared > gap) | (advantage == 0)) == 0
    else:
        passes = (gap < gap) == 0
    return prepared, passes


@triton.jit
def objective(
    x, ratio, logp, old, advantage, selected, log_weight, low, high, delta, dual_clip, p0, p1, p2, p3,
    OBJECTIVE: tl.constexpr,
):  # fmt: skip
    """(loss, dloss/dx, dloss/dlogp, clipped low, clipped high, dual-clipped) of the named objective.

    `x` is the held log-ratio, ratio = exp(x); `selected` and `log_weight` may be None where it does not read them;
    low and high are its bounds, p0 to p3 its own numbers in the order of its definition.
    """
    zero = tl.zeros_like(advantage)
    falls, rises = advantage < 0, advantage > 0
    never = falls & rises
    low_flag, high_flag, dual = never, never, never
    dx, dlogp = zero, zero
    if OBJECTIVE == "ppo_clip" or OBJECTIVE == "clip_cov":
        loss, dx, dual = ppo_clip(ratio, advantage, low, high, delta, dual_clip)
        low_flag, high_flag = flags_outside(ratio, low, high, falls, rises)
    elif OBJECTIVE == "cispo":
        dlogp = -clip(ratio, low, high) * advantage
        loss = dlogp * logp
        low_flag, high_flag = flags_outside(ratio, low, high, falls, rises)
    elif OBJECTIVE == "sapo":
        loss, dx = sapo(ratio, advantage, p0, p1)
    elif OBJECTIVE == "gmpo":
        loss = -ratio * advantage
        dx = loss
        low_flag, high_flag = flags_outside(logp - old, low, high, falls, rises)
    elif OBJECTIVE == "vespo":
        dlogp = -vespo_weight(log_weight, advantage, p0, p1, p2, p3)
        loss = dlogp * logp
    elif OBJECTIVE == "dppo_tv" or OBJECTIVE == "dppo_kl":
        low_flag, high_flag = flags_outside(dppo_shift(logp, old, OBJECTIVE), low, high, rises == 0, rises)
        dropped = low_flag | high_flag
        dlogp = tl.where(dropped, 0.0, -clip(ratio, None, p0) * advantage)
        loss = tl.where(dropped, 0.0, dlogp * logp)
    elif OBJECTIVE == "reinforce":
        dlogp = -advantage
        loss = dlogp * logp
    elif OBJECTIVE == "importance_sampling":
        loss = -ratio * advantage
        dx = loss
    elif OBJECTIVE == "topr":
        dlogp = -tl.where(rises, 1.0, clip(ratio, None, p0)) * advantage
        loss = dlogp * logp
    elif OBJECTIVE == "dro":
        loss = -(advantage * logp - 0.5 * p0 * x * x)
        dx, dlogp = p0 * x, -advantage
    elif OBJECTIVE == "kl_cov":
        dx = -ratio * advantage
        loss = dx + selected * p0 * tl.abs(x)
        dx += selected * p0 * tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    else:
        tl.static_assert(False, "unknown OBJECTIVE")
    return loss, dx, dlogp, low_flag, high_flag, dual
