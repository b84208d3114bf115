"""Step B: one launch on [N] log-probs gives the loss, its derivatives and every metric sum.

Ratio (token or sequence level), clipping, group-normalised advantages from rewards, KL, entropy bonus and aggregation
weights are all computed here. A program takes a block of tokens, or a whole sequence when the ratio needs one. Each
program stores its partial sums; the program that draws the last ticket adds them up in a fixed order, so the result is
the same on every run and needs no second launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_fns import (
    load_advantage,
    load_or,
    load_policies,
    masked_sum,
    sequence_numbers,
    sequence_of,
    token_weight,
    tokens_advantage,
    valid_tokens,
)
from .correction_fns import log_rho
from .kl_fns import hold, k3
from .logprob import as_bytes
from .objective_fns import prepare
from .token_fns import token_rollout_weight, token_terms
from .tune import PER_ROW, on_device, ticket_counter, token_config

STATISTICS = (
    "clip_low", "clip_high", "dual_clip", "clamped", "ratio", "ratio_square", "approx_kl", "approx_kl_k3", "ref_kl",
    "entropy", "rollout_weight", "rollout_weight_square", "rollout_ratio_square", "rejected", "ratio_min", "ratio_max",
)  # fmt: skip
_COLUMNS = 32  # the loss, then STATISTICS, padded to a power of two
_MIN_COLUMN = tl.constexpr(1 + STATISTICS.index("ratio_min"))
_MAX_COLUMN = tl.constexpr(1 + STATISTICS.index("ratio_max"))


_POINTERS = [
    *PER_ROW, "rewards_ptr", "sequence_ptr", "cu_ptr", "lengths_ptr", "denominator_ptr", "loss_ptr",
    "statistics_ptr", "partials_ptr", "ticket_ptr", "selected_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "G", "first_sequence"], do_not_specialize_on_alignment=_POINTERS)
def _policy_fwd_kernel(
    logp_ptr, entropy_ptr, mask_ptr, advantages_ptr, rewards_ptr, old_ptr, ref_ptr, rollout_ptr,
    policy_weights_ptr, selected_ptr, entropy_weights_ptr, sequence_ptr, cu_ptr, lengths_ptr, denominator_ptr,
    loss_ptr, statistics_ptr, dlogp_ptr, dentropy_ptr, partials_ptr, ticket_ptr,

    N, T, G, first_sequence,

    weight_scale, low, high, delta, dual_clip, bound, kl_coef, kl_clamp, entropy_coef, p0, p1, p2, p3,
    lower, upper, reject_lower, reject_upper, off_policy, advantage_eps,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_GRADIENT: tl.constexpr, LEVEL: tl.constexpr,
    BY_SEQUENCE: tl.constexpr, FOLDS: tl.constexpr, READS_SELECTED: tl.constexpr,
    CORRECTION: tl.constexpr, MODE: tl.constexpr, REJECT: tl.constexpr, REJECT_LEVEL: tl.constexpr,
    PER_SEQUENCE_MEAN: tl.constexpr, PER_TOKEN_ADVANTAGE: tl.constexpr, BASELINE: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """At most 33 bytes read per token (logp, old, ref, rollout, entropy, advantage, two weights, mask) and 8 written.
    What depends on the sequence reads logp, old, rollout and mask once more, a ratio whose gradient goes through the
    sequence everything once more again. Masked tokens are not read. Nothing of [N, V] is touched."""
    pid = tl.program_id(0).to(tl.int64)
    start, stop = pid * BLOCK_N, N.to(tl.int64)
    if BY_SEQUENCE:
        if cu_ptr is not None:
            # Offsets that the host could not check must not lead outside.
            start, stop = tl.maximum(tl.load(cu_ptr + pid), 0), tl.minimum(tl.load(cu_ptr + pid + 1), stop)
        else:
            start, stop = pid * T, pid * T + T
    else:
        stop = tl.minimum(start + BLOCK_N, stop)
    offs_n = tl.arange(0, BLOCK_N)

    length, sequence_log_ratio, sequence_weight, sequence_rejected, behaviour, log_weight = 1.0, 0.0, 1.0, 0.0, 0.0, 0.0
    shared_advantage, shared_weight = 0.0, 0.0
    if BY_SEQUENCE:
        whole = pid >= 0
        shared_weight = token_weight(pid, whole, lengths_ptr, denominator_ptr, weight_scale, PER_SEQUENCE_MEAN)
        if not PER_TOKEN_ADVANTAGE:
            shared_advantage = load_advantage(
                advantages_ptr, rewards_ptr, pid, pid, first_sequence, whole, G, advantage_eps, False, BASELINE, SCALE
            )
        length, sequence_log_ratio, sequence_weight, sequence_rejected, behaviour, log_weight = sequence_numbers(
            logp_ptr, mask_ptr, advantages_ptr, old_ptr, rollout_ptr, policy_weights_ptr, lengths_ptr,
            pid, start, stop,
            shared_advantage, low, high, bound, lower, upper, reject_lower, reject_upper, off_policy,
            OBJECTIVE, LEVEL, FOLDS, CORRECTION, MODE, REJECT, REJECT_LEVEL, PER_TOKEN_ADVANTAGE, BLOCK_N,
        )  # fmt: skip

    # The sums of this program. Where the ratio's gradient goes through the sequence, a first pass collects
    # Σ w·dℓ/dlog s, which every token of the sequence shares; the second pass writes.
    through = 0.0
    sum_loss, sum_low, sum_high, sum_dual, sum_held, sum_rejected = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    sum_ratio, sum_square, sum_kl, sum_k3, sum_ref, sum_entropy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    sum_weight, sum_weight_square, sum_rho_square = 0.0, 0.0, 0.0
    ratio_min, ratio_max = float("inf"), -float("inf")
    THROUGH: tl.constexpr = LEVEL == "sequence" or LEVEL == "sequence_sum"
    for step in tl.static_range(0, 2 if THROUGH else 1):
        for at in range(start, stop, BLOCK_N):
            offs = at + offs_n
            valid = valid_tokens(mask_ptr, offs, stop)
            logp, old, gap, rollout = load_policies(logp_ptr, old_ptr, rollout_ptr, offs, valid)
            if BY_SEQUENCE:
                sequence = offs
                weight = tl.where(valid, shared_weight, 0.0)
            else:
                sequence = sequence_of(offs, sequence_ptr, T, valid)
                weight = token_weight(sequence, valid, lengths_ptr, denominator_ptr, weight_scale, PER_SEQUENCE_MEAN)
            advantage = tokens_advantage(
                shared_advantage, advantages_ptr, rewards_ptr, offs, sequence, first_sequence, valid, G, advantage_eps,
                BY_SEQUENCE, PER_TOKEN_ADVANTAGE, BASELINE, SCALE,
            )  # fmt: skip
            log_ratio = gap
            if LEVEL != "token":
                log_ratio = tl.zeros_like(gap) + sequence_log_ratio

            rollout_weight, rejected = token_rollout_weight(
                old, rollout, bound, lower, upper, reject_lower, reject_upper,
                CORRECTION, MODE, REJECT, REJECT_LEVEL,
            )  # fmt: skip
            if BY_SEQUENCE:
                # The interpreter cannot broadcast a scalar condition to a block, hence sums of numbers.
                rollout_weight *= sequence_weight
                rejected = rejected | (tl.zeros((BLOCK_N,), tl.float32) + sequence_rejected > 0)
            if policy_weights_ptr is not None:
                rollout_weight = load_or(policy_weights_ptr, offs, valid, 0.0)
            rollout_weight = tl.where(rejected, 0.0, rollout_weight)
            if not FOLDS:
                rejected = rejected | (rollout_weight == 0)
            if off_policy is not None:
                rejected = rejected | ((advantage < 0) & (tl.zeros_like(advantage) + behaviour > off_policy))
            factor, selected = None, None
            if CORRECTION != "off" or policy_weights_ptr is not None or off_policy is not None:
                factor = tl.where(rejected, 0.0, tl.zeros_like(logp) + 1.0 if FOLDS else rollout_weight)
            if selected_ptr is not None:
                selected = load_or(selected_ptr, offs, valid, 0.0)
                if not READS_SELECTED:
                    factor = selected if factor is None else selected * factor
            ref = load_or(ref_ptr, offs, valid, 0.0)
            loss, dratio, dlogp, kl_value, ratio, held, low_flag, high_flag, dual = token_terms(
                logp, old, log_ratio, advantage, ref, factor, selected, log_weight,
                low, high, delta, dual_clip, bound, kl_coef, kl_clamp, p0, p1, p2, p3, OBJECTIVE, KL, KL_GRADIENT,
            )  # fmt: skip
            if THROUGH and step == 0:
                through += masked_sum(weight * dratio, valid)
            else:
                if THROUGH:
                    _, passes = prepare(gap, advantage, low, high, OBJECTIVE)
                    shared = through / length if LEVEL == "sequence" else through
                    dlogp = tl.where(passes, shared, 0.0) + weight * dlogp
                else:
                    dlogp = weight * (dratio + dlogp)
                written = offs < stop
                if dlogp_ptr is not None:
                    dlogp = tl.where(valid, tl.where(logp == logp, dlogp, float("nan")), 0.0)
                    tl.store(dlogp_ptr + offs, dlogp, mask=written)
                entropy_weight = weight
                if entropy_weights_ptr is not None:
                    entropy_weight = load_or(entropy_weights_ptr, offs, valid, 0.0)
                if dentropy_ptr is not None:
                    tl.store(dentropy_ptr + offs, -entropy_coef * entropy_weight, mask=written)
                if entropy_ptr is not None:
                    entropy = load_or(entropy_ptr, offs, valid, 0.0)
                    sum_entropy += masked_sum(entropy, valid)
                    if entropy_coef is not None:
                        sum_loss -= masked_sum(entropy_coef * entropy_weight * entropy, valid)
                sum_loss += masked_sum(weight * loss, valid)
                sum_low += masked_sum(low_flag, valid)
                sum_high += masked_sum(high_flag, valid)
                sum_dual += masked_sum(dual, valid)
                sum_held += masked_sum(held, valid)
                sum_ratio += masked_sum(ratio, valid)
                sum_square += masked_sum(ratio * ratio, valid)
                sum_kl += masked_sum(-gap, valid)
                held_gap, _ = hold(-gap, bound)
                sum_k3 += masked_sum(k3(held_gap), valid)
                sum_ref += masked_sum(kl_value, valid)
                if rollout_ptr is not None:
                    held_gap, _ = hold(log_rho(old, rollout), bound)
                    rho = tl.exp(held_gap)
                    sum_rho_square += masked_sum(rho * rho, valid)
                    if CORRECTION == "off" and policy_weights_ptr is None:
                        rollout_weight = rho
                if rollout_ptr is not None or policy_weights_ptr is not None:
                    sum_weight += masked_sum(rollout_weight, valid)
                    sum_weight_square += masked_sum(rollout_weight * rollout_weight, valid)
                sum_rejected += masked_sum(rejected, valid)
                ratio_min = tl.minimum(ratio_min, tl.min(tl.where(valid, ratio, float("inf")), 0))
                ratio_max = tl.maximum(ratio_max, tl.max(tl.where(valid, ratio, -float("inf")), 0))

    row_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    tl.store(row_ptr, sum_loss)
    tl.store(row_ptr + 1, sum_low)
    tl.store(row_ptr + 2, sum_high)
    tl.store(row_ptr + 3, sum_dual)
    tl.store(row_ptr + 4, sum_held)
    tl.store(row_ptr + 5, sum_ratio)
    tl.store(row_ptr + 6, sum_square)
    tl.store(row_ptr + 7, sum_kl)
    tl.store(row_ptr + 8, sum_k3)
    tl.store(row_ptr + 9, sum_ref)
    tl.store(row_ptr + 10, sum_entropy)
    tl.store(row_ptr + 11, sum_weight)
    tl.store(row_ptr + 12, sum_weight_square)
    tl.store(row_ptr + 13, sum_rho_square)
    tl.store(row_ptr + 14, sum_rejected)
    tl.store(row_ptr + 15, ratio_min)
    tl.store(row_ptr + 16, ratio_max)
    # All stores of this program must be visible before its ticket is.
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    if ticket == tl.num_programs(0) - 1:
        finish(partials_ptr, loss_ptr, statistics_ptr, tl.num_programs(0), BLOCK_P, COLUMNS)
        tl.store(ticket_ptr, 0)


@triton.jit
def finish(partials_ptr, loss_ptr, statistics_ptr, programs, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr):
    """Reduce the partial sums of all programs in their order."""
    column = tl.arange(0, COLUMNS)[None, :]
    is_min, is_max = column == _MIN_COLUMN, column == _MAX_COLUMN
    neutral = tl.where(is_min, float("inf"), tl.where(is_max, -float("inf"), 0.0))
    sums = tl.zeros((BLOCK_P, COLUMNS), tl.float32) + neutral
    for at in range(0, programs, BLOCK_P):
        row = at + tl.arange(0, BLOCK_P)[:, None]
        # .cg: other programs wrote these; read them from L2.
        x = tl.load(
            partials_ptr + row * COLUMNS + column, mask=(row < programs) & (column < _MAX_COLUMN + 1), other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        x = tl.where(row < programs, x, neutral)
        sums = tl.where(is_min, tl.minimum(sums, x), tl.where(is_max, tl.maximum(sums, x), sums + x))
    lowest = tl.min(sums, 0)
    highest = tl.max(sums, 0)
    added = tl.sum(sums, 0)
    column = tl.arange(0, COLUMNS)
    result = tl.where(column == _MIN_COLUMN, lowest, tl.where(column == _MAX_COLUMN, highest, added))
    tl.store(loss_ptr + column, result, mask=column == 0)
    tl.store(statistics_ptr + column - 1, result, mask=(column > 0) & (column < _MAX_COLUMN + 1))


def policy_loss_fwd(
    logp: Tensor,  # (N,) fp32
    entropy: Tensor | None,  # (N,) fp32
    *,
    mask: Tensor | None,  # (N,) bool
    advantages: Tensor | None,  # (N,) or (S,) fp32; None = from rewards in groups of group_size
    rewards: Tensor | None,  # (R,)
    old: Tensor | None,  # (N,) fp32, as the next two
    ref: Tensor | None,
    rollout: Tensor | None,
    policy_weights: Tensor | None,
    selected: Tensor | None,
    entropy_weights: Tensor | None,
    sequence_ids: Tensor | None,  # (N,) int32, packed
    cu_seqlens: Tensor | None,  # (S + 1,) int64, packed
    lengths: Tensor,  # (S,) fp32 valid tokens
    denominator: Tensor | None,  # 0-d
    width: int,
    group_size: int,
    first_sequence: int,
    per_token_advantages: bool,
    numbers: dict[str, float | None],
    structure: dict[str, Any],
    dlogp: Tensor | None,  # (N,) fp32, written
    dentropy: Tensor | None,  # (N,) fp32, written
) -> tuple[Tensor, Tensor]:
    """The loss (0-d) and the statistics (len(STATISTICS),); derivatives into `dlogp` and `dentropy` if given."""
    config = token_config(structure["BY_SEQUENCE"])
    N, S = logp.shape[0], lengths.shape[0]
    programs = S if structure["BY_SEQUENCE"] else triton.cdiv(N, config.block_n)
    loss = torch.empty((), dtype=torch.float32, device=logp.device)
    statistics = torch.empty(len(STATISTICS), dtype=torch.float32, device=logp.device)
    if programs == 0 or N == 0:
        loss.zero_()
        statistics.zero_()
        statistics[STATISTICS.index("ratio_min")] = float("inf")
        statistics[STATISTICS.index("ratio_max")] = -float("inf")
        return loss, statistics
    partials = torch.empty((programs, _COLUMNS), dtype=torch.float32, device=logp.device)
    with on_device(logp):
        _policy_fwd_kernel[(programs,)](
            logp, entropy, as_bytes(mask), advantages, rewards, old, ref, rollout,
            policy_weights, selected, entropy_weights, sequence_ids, cu_seqlens, lengths, denominator,
            loss, statistics, dlogp, dentropy, partials, ticket_counter(logp.device),
            N, width, group_size, first_sequence, **numbers, **structure,
            PER_TOKEN_ADVANTAGE=per_token_advantages,
            BLOCK_N=config.block_n, BLOCK_P=config.block_p, COLUMNS=_COLUMNS, num_warps=config.num_warps,
        )  # fmt: skip
    return loss, statistics
