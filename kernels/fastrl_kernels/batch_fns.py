"""Device functions over a batch's tokens: loads, weights, masked sums, and what a token needs of its sequence."""

import triton
import triton.language as tl

from .correction_fns import bounded_weight, divergence, log_of_weight, log_rho, outside
from .groups import group_advantage
from .kl_fns import hold, nothing
from .objective_fns import prepare


@triton.jit
def load_or(ptr, offs, mask, other):
    """Values as fp32, `other` where masked; None stays None."""
    if ptr is not None:
        values = tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)
    else:
        values = None
    return values


@triton.jit
def sequence_of(offs, sequence_ptr, T, valid):
    """The sequence of each token."""
    if sequence_ptr is not None:
        sequence = tl.load(sequence_ptr + offs, mask=valid, other=0).to(tl.int64)
    else:
        sequence = offs // T
    return sequence


@triton.jit
def token_weight(sequence, valid, lengths_ptr, denominator_ptr, weight_scale, PER_SEQUENCE_MEAN: tl.constexpr):
    """wₜ = mₜ·(1/length)·scale/D."""
    weight = tl.where(valid, weight_scale, 0.0)
    if PER_SEQUENCE_MEAN:
        length = tl.load(lengths_ptr + sequence, mask=valid, other=1.0)
        weight = weight / tl.maximum(length, 1.0)
    if denominator_ptr is not None:
        weight = weight / tl.load(denominator_ptr).to(tl.float32)
    return tl.where(valid, weight, 0.0)


@triton.jit
def masked_sum(values, valid):
    """Sum over the tokens that count."""
    return tl.sum(tl.where(valid, values.to(tl.float32), 0.0), 0)


@triton.jit
def exact_sum(values, valid):
    """The same in fp64: an exponent of the whole sequence, whose absolute error becomes the ratio's relative one."""
    return tl.sum(tl.where(valid, values.to(tl.float64), 0.0), 0)


@triton.jit
def valid_tokens(mask_ptr, offs, stop):
    """Which of the tokens count."""
    valid = offs < stop
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + offs, mask=valid, other=0) != 0
    return valid


@triton.jit
def load_advantage(
    advantages_ptr, rewards_ptr, offs, sequence, first_sequence, valid, G, eps,
    PER_TOKEN_ADVANTAGE: tl.constexpr, BASELINE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The advantages of some tokens: given per token or sequence, or from their group's rewards."""
    if PER_TOKEN_ADVANTAGE:
        advantage = load_or(advantages_ptr, offs, valid, 0.0)
    elif advantages_ptr is not None:
        advantage = load_or(advantages_ptr, sequence, valid, 0.0)
    else:
        advantage = group_advantage(rewards_ptr, sequence + first_sequence, valid, G, eps, BASELINE, SCALE)
    return advantage


@triton.jit
def tokens_advantage(
    shared, advantages_ptr, rewards_ptr, offs, sequence, first_sequence, valid, G, eps,
    BY_SEQUENCE: tl.constexpr, PER_TOKEN_ADVANTAGE: tl.constexpr, BASELINE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The same for a block of tokens, where `shared` is that of their sequence if they have one in common."""
    if BY_SEQUENCE and not PER_TOKEN_ADVANTAGE:
        advantage = tl.zeros_like(offs).to(tl.float32) + shared
    else:
        advantage = load_advantage(
            advantages_ptr, rewards_ptr, offs, sequence, first_sequence, valid, G, eps,
            PER_TOKEN_ADVANTAGE, BASELINE, SCALE,
        )  # fmt: skip
    return advantage


@triton.jit
def load_policies(logp_ptr, old_ptr, rollout_ptr, offs, valid):
    """(logp, old, logp − old, rollout); without old log-probs the old policy is this one, without rollout ones the
    sampler is the old policy."""
    logp = tl.load(logp_ptr + offs, mask=valid, other=0.0)
    old, gap = logp, nothing(logp)
    if old_ptr is not None:
        old = load_or(old_ptr, offs, valid, 0.0)
        gap = logp - old
    rollout = old
    if rollout_ptr is not None:
        rollout = load_or(rollout_ptr, offs, valid, 0.0)
    return logp, old, gap, rollout


@triton.jit
def sequence_numbers(
    logp_ptr, mask_ptr, advantages_ptr, old_ptr, rollout_ptr, policy_weights_ptr, lengths_ptr,
    i, start, stop,
    shared_advantage, low, high, bound, lower, upper, reject_lower, reject_upper, off_policy,
    OBJECTIVE: tl.constexpr, LEVEL: tl.constexpr, FOLDS: tl.constexpr,
    CORRECTION: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr, REJECT_LEVEL: tl.constexpr,
    PER_TOKEN_ADVANTAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a token needs of its whole sequence i, in one pass over it: (length, log-ratio, rollout weight, 1 if it is
    rejected, mean of behaviour − logp, log-weight of an objective that weighs sequences)."""
    length = tl.maximum(tl.load(lengths_ptr + i), 1.0)
    zero = tl.zeros_like(length).to(tl.float64)
    gaps, rhos, diverged, behaviour, log_weight = zero, zero, zero, zero, zero
    most = tl.zeros_like(length) - float("inf")
    for at in range(start, stop, BLOCK_N):
        offs = at + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask_ptr, offs, stop)
        logp, old, gap, rollout = load_policies(logp_ptr, old_ptr, rollout_ptr, offs, valid)
        prepared = gap
        if OBJECTIVE == "gmpo":
            advantage = tl.zeros((BLOCK_N,), tl.float32) + shared_advantage
            if PER_TOKEN_ADVANTAGE:
                advantage = load_or(advantages_ptr, offs, valid, 0.0)
            prepared, _ = prepare(gap, advantage, low, high, OBJECTIVE)
        gaps += exact_sum(prepared, valid)
        if CORRECTION != "off":
            rhos += exact_sum(log_rho(old, rollout), valid)
        if REJECT != "off" and REJECT_LEVEL != "token":
            parted = divergence(old, rollout, bound, REJECT)
            diverged += exact_sum(parted, valid)
            most = tl.maximum(most, tl.max(tl.where(valid, parted, -float("inf")), 0))
            most += masked_sum(nothing(parted), valid)  # a maximum does not see NaN
        if off_policy is not None:
            behaviour += exact_sum(tl.where(rollout == rollout, rollout - logp, 0.0), valid)
        if FOLDS:
            held_gap, _ = hold(gap, bound)
            log_weight += exact_sum(held_gap, valid)
            if CORRECTION == "token":
                weight = bounded_weight(log_rho(old, rollout), bound, lower, upper, MODE)
                log_weight += exact_sum(log_of_weight(weight), valid)
            elif policy_weights_ptr is not None:
                log_weight += exact_sum(log_of_weight(load_or(policy_weights_ptr, offs, valid, 1.0)), valid)
    log_ratio = gaps.to(tl.float32)  # a division in fp64 would be a call and cost a spill
    if LEVEL != "sequence_sum":
        log_ratio = log_ratio / length
    weight = tl.zeros_like(length) + 1.0
    if CORRECTION == "sequence":
        weight = bounded_weight(rhos.to(tl.float32), bound, lower, upper, MODE)
    elif CORRECTION == "geometric":
        weight = bounded_weight(rhos.to(tl.float32) / length, bound, lower, upper, MODE)
    if FOLDS and CORRECTION == "sequence":
        log_weight += log_of_weight(weight).to(tl.float64)
    rejected = length < 0
    if REJECT_LEVEL == "sequence-mean":
        rejected = outside(diverged.to(tl.float32) / length, reject_lower, reject_upper)
    elif REJECT_LEVEL == "sequence-sum":
        rejected = outside(diverged.to(tl.float32), reject_lower, reject_upper)
    elif REJECT_LEVEL == "sequence-max":
        rejected = outside(most, reject_lower, reject_upper)
    mean_behaviour = behaviour.to(tl.float32) / length
    return length, log_ratio, weight, rejected.to(tl.float32), mean_behaviour, log_weight.to(tl.float32)
