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

from .groups import group_advantage
from .logprob import as_bytes
from .objective_fns import hold, k3, token_terms
from .tune import PER_ROW, on_device, token_config

STATISTICS = (
    "clip_low", "clip_high", "dual_clip", "clamped", "ratio", "ratio_square", "approx_kl", "approx_kl_k3", "ref_kl",
    "entropy", "rollout_weight", "ratio_min", "ratio_max",
)  # fmt: skip
_COLUMNS = 16  # the loss, then STATISTICS, padded to a power of two
_MIN_COLUMN = tl.constexpr(1 + STATISTICS.index("ratio_min"))
_MAX_COLUMN = tl.constexpr(1 + STATISTICS.index("ratio_max"))


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


_POINTERS = [
    *PER_ROW, "rewards_ptr", "rollout_ptr", "sequence_ptr", "cu_ptr", "lengths_ptr", "denominator_ptr", "loss_ptr",
    "statistics_ptr", "partials_ptr", "ticket_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "G", "first_sequence"], do_not_specialize_on_alignment=_POINTERS)
def _policy_fwd_kernel(
    logp_ptr, entropy_ptr, mask_ptr, advantages_ptr, rewards_ptr, old_ptr, ref_ptr, rollout_ptr,
    sequence_ptr, cu_ptr, lengths_ptr, denominator_ptr,
    loss_ptr, statistics_ptr, dlogp_ptr, dentropy_ptr, partials_ptr, ticket_ptr,

    N, T, G, first_sequence,

    weight_scale, low, high, delta, dual_clip, bound, kl_coef, entropy_coef, advantage_eps,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, SEQUENCE_LEVEL: tl.constexpr, PER_SEQUENCE_MEAN: tl.constexpr,
    PER_TOKEN_ADVANTAGE: tl.constexpr, BASELINE: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """At most 25 bytes read per token (logp, old, ref, rollout, entropy, advantage, mask) and 8 written; a sequence
    level ratio reads logp, old and advantage twice more. Masked tokens are not read. Nothing of [N, V] is touched."""
    pid = tl.program_id(0).to(tl.int64)
    start, stop = pid * BLOCK_N, N.to(tl.int64)
    if SEQUENCE_LEVEL:
        if cu_ptr is not None:
            start, stop = tl.load(cu_ptr + pid), tl.load(cu_ptr + pid + 1)
        else:
            start, stop = pid * T, pid * T + T
    else:
        stop = tl.minimum(start + BLOCK_N, stop)
    offs_n = tl.arange(0, BLOCK_N)

    sequence_log_ratio, through_mean = 0.0, 0.0
    if SEQUENCE_LEVEL:
        # One sequence: its advantage and weight are scalars, taken once.
        whole = pid >= 0
        if advantages_ptr is None:
            shared_advantage = group_advantage(
                rewards_ptr, pid + first_sequence, whole, G, advantage_eps, BASELINE, SCALE
            )
        elif not PER_TOKEN_ADVANTAGE:
            shared_advantage = tl.load(advantages_ptr + pid).to(tl.float32)
        shared_weight = token_weight(pid, whole, lengths_ptr, denominator_ptr, weight_scale, PER_SEQUENCE_MEAN)
        length = tl.maximum(tl.load(lengths_ptr + pid), 1.0)
        gap = 0.0
        for at in range(start, stop, BLOCK_N):
            offs = at + offs_n
            valid = offs < stop
            if mask_ptr is not None:
                valid = tl.load(mask_ptr + offs, mask=valid, other=0) != 0
            if old_ptr is not None:
                logp = tl.load(logp_ptr + offs, mask=valid, other=0.0)
                gap += masked_sum(logp - load_or(old_ptr, offs, valid, 0.0), valid)
            else:
                gap += masked_sum(tl.load(logp_ptr + offs, mask=valid, other=0.0) * 0.0, valid)
        sequence_log_ratio = gap / length

    # The sums of this program. With a sequence-level ratio a first pass collects Σ w·dℓ/dlog s, which every token of
    # the sequence shares; the second pass writes.
    sum_loss, sum_low, sum_high, sum_dual, sum_held = 0.0, 0.0, 0.0, 0.0, 0.0
    sum_ratio, sum_square, sum_kl, sum_k3, sum_ref, sum_entropy, sum_rollout = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    ratio_min, ratio_max = float("inf"), -float("inf")
    for step in tl.static_range(0, 2 if SEQUENCE_LEVEL else 1):
        for at in range(start, stop, BLOCK_N):
            offs = at + offs_n
            valid = offs < stop
            if mask_ptr is not None:
                valid = tl.load(mask_ptr + offs, mask=valid, other=0) != 0
            logp = tl.load(logp_ptr + offs, mask=valid, other=0.0)
            if not SEQUENCE_LEVEL:
                sequence = sequence_of(offs, sequence_ptr, T, valid)
            if PER_TOKEN_ADVANTAGE:
                advantage = load_or(advantages_ptr, offs, valid, 0.0)
            elif SEQUENCE_LEVEL:
                advantage = shared_advantage + tl.zeros((BLOCK_N,), tl.float32)
            elif advantages_ptr is not None:
                advantage = load_or(advantages_ptr, sequence, valid, 0.0)
            else:
                advantage = group_advantage(
                    rewards_ptr, sequence + first_sequence, valid, G, advantage_eps, BASELINE, SCALE
                )
            if SEQUENCE_LEVEL:
                weight = tl.where(valid, shared_weight, 0.0)
            else:
                weight = token_weight(sequence, valid, lengths_ptr, denominator_ptr, weight_scale, PER_SEQUENCE_MEAN)
            gap_t = logp * 0.0
            if old_ptr is not None:
                gap_t = logp - load_or(old_ptr, offs, valid, 0.0)
            log_ratio = gap_t
            if SEQUENCE_LEVEL:
                log_ratio = gap_t * 0.0 + sequence_log_ratio
            ref = load_or(ref_ptr, offs, valid, 0.0)
            loss, dratio, kl_value, dkl, ratio, held, dual = token_terms(
                logp, gap_t, log_ratio, advantage, ref, low, high, delta, dual_clip, bound, kl_coef, OBJECTIVE, KL
            )
            if SEQUENCE_LEVEL and step == 0:
                through_mean += masked_sum(weight * dratio, valid) / length
            else:
                if SEQUENCE_LEVEL:
                    dlogp = through_mean + weight * dkl
                else:
                    dlogp = weight * (dratio + dkl)
                written = offs < stop
                if dlogp_ptr is not None:
                    dlogp = tl.where(valid, tl.where(logp == logp, dlogp, float("nan")), 0.0)
                    tl.store(dlogp_ptr + offs, dlogp, mask=written)
                if dentropy_ptr is not None:
                    tl.store(dentropy_ptr + offs, -entropy_coef * weight, mask=written)
                if kl_coef is not None:
                    loss += kl_coef * kl_value
                if entropy_ptr is not None:
                    entropy = load_or(entropy_ptr, offs, valid, 0.0)
                    sum_entropy += masked_sum(entropy, valid)
                    if entropy_coef is not None:
                        loss -= entropy_coef * entropy
                sum_loss += masked_sum(weight * loss, valid)
                if low is not None:
                    sum_low += masked_sum((ratio < low) & (advantage < 0), valid)
                if high is not None:
                    sum_high += masked_sum((ratio > high) & (advantage > 0), valid)
                sum_dual += masked_sum(dual, valid)
                sum_held += masked_sum(held, valid)
                sum_ratio += masked_sum(ratio, valid)
                sum_square += masked_sum(ratio * ratio, valid)
                sum_kl += masked_sum(-gap_t, valid)
                held_gap, _ = hold(-gap_t, bound)
                sum_k3 += masked_sum(k3(held_gap), valid)
                sum_ref += masked_sum(kl_value, valid)
                if rollout_ptr is not None:
                    rollout = load_or(rollout_ptr, offs, valid, 0.0)
                    held_gap, _ = hold(logp - gap_t - rollout, bound)
                    sum_rollout += masked_sum(tl.where(rollout == rollout, tl.exp(held_gap), 1.0), valid)
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
    tl.store(row_ptr + 11, sum_rollout)
    tl.store(row_ptr + 12, ratio_min)
    tl.store(row_ptr + 13, ratio_max)
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


_tickets: dict[tuple[torch.device, int], Tensor] = {}


def _ticket(device: torch.device) -> Tensor:
    """A zeroed int32 counter for this device and stream. Launches on a stream run one after the other and the last
    program zeroes it again, so one counter serves them all without a memset per launch."""
    # Not kept: under the interpreter, where an error inside a kernel would leave a count behind, and during a capture,
    # whose memory belongs to the graph.
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros((), dtype=torch.int32, device=device)
    return _tickets[key]


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
    config = token_config(structure["SEQUENCE_LEVEL"])
    N, S = logp.shape[0], lengths.shape[0]
    programs = S if structure["SEQUENCE_LEVEL"] else triton.cdiv(N, config.block_n)
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
            sequence_ids, cu_seqlens, lengths, denominator,
            loss, statistics, dlogp, dentropy, partials, _ticket(logp.device),
            N, width, group_size, first_sequence, **numbers, **structure,
            PER_TOKEN_ADVANTAGE=per_token_advantages,
            BLOCK_N=config.block_n, BLOCK_P=config.block_p, COLUMNS=_COLUMNS, num_warps=config.num_warps,
        )  # fmt: skip
    return loss, statistics
