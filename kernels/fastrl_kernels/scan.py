"""Advantages and returns of a sequence by one reverse scan: one launch, one program per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .logprob import as_bytes
from .tune import on_device

_BLOCK = 2048  # steps per scan, for every T
_WARPS = 8


@triton.jit
def chain(a, b, a_next, b_next):
    """c ↦ a_next·(a·c + b) + b_next: two steps as one."""
    return a * a_next, a_next * b + b_next


@triton.jit
def load_row(ptr, offs, mask):
    """Values as fp32, 0 where masked; 0 for None."""
    if ptr is not None:
        values = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.zeros(offs.shape, tl.float32)
    return values


@triton.jit
def states(rewards, values, valid, inside, carry, gamma, lam, CARRY_MASKED: tl.constexpr):
    """cₜ₊₁ = γ·(Vₜ₊₁ + λ·Aₜ₊₁) for a block of t in descending order, from the inputs at t + 1."""
    factor = gamma * lam
    counted = valid if CARRY_MASKED else inside
    a = tl.where(counted, factor, 1.0)
    b = tl.where(valid, factor * rewards + (gamma - factor) * values, 0.0)
    a, b = tl.associative_scan((a, b), 0, chain)
    return a * carry + b


@triton.jit
def last_of(x, BLOCK: tl.constexpr):
    """The last element of a block."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), 0)


_POINTERS = [
    "rewards_ptr", "values_ptr", "mask_ptr", "bootstrap_ptr", "lam_ptr", "lam_returns_ptr", "advantages_ptr",
    "returns_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=_POINTERS)
def _lambda_returns_kernel(
    rewards_ptr, values_ptr, mask_ptr, bootstrap_ptr, lam_ptr, lam_returns_ptr, advantages_ptr, returns_ptr,

    T,

    gamma, lam, lam_returns,
    CARRY_MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """9 bytes read per step (reward, value, mask; once from memory and once from the cache) and 8 written.

    cₜ = γλ·cₜ₊₁ + γλ·rₜ + γ(1 − λ)·Vₜ at a step that counts, else cₜ = cₜ₊₁; then Rₜ = rₜ + cₜ₊₁ and Aₜ = Rₜ − Vₜ. The
    scan runs over the inputs one step ahead of what is written, in descending order of t from the end of the row.
    """
    pid = tl.program_id(0).to(tl.int64)
    start = pid * T
    if lam_ptr is not None:
        lam = tl.load(lam_ptr + pid).to(tl.float32)
    if lam_returns_ptr is not None:
        lam_returns = tl.load(lam_returns_ptr + pid).to(tl.float32)
    carry = 0.0
    if bootstrap_ptr is not None:
        carry = gamma * tl.load(bootstrap_ptr + pid).to(tl.float32)
    carry_returns = carry
    for at in range(0, T, BLOCK):
        t = T - 1 - at - tl.arange(0, BLOCK)
        here, ahead = t >= 0, (t >= 0) & (t + 1 < T)
        valid, valid_ahead = here, ahead
        if mask_ptr is not None:
            valid = tl.load(mask_ptr + start + t, mask=here, other=0) != 0
            valid_ahead = tl.load(mask_ptr + start + t + 1, mask=ahead, other=0) != 0
        rewards_ahead = load_row(rewards_ptr, start + t + 1, valid_ahead)
        values_ahead = load_row(values_ptr, start + t + 1, valid_ahead)
        state = states(rewards_ahead, values_ahead, valid_ahead, ahead, carry, gamma, lam, CARRY_MASKED)
        carry = last_of(state, BLOCK)
        rewards = load_row(rewards_ptr, start + t, valid)
        if values_ptr is not None:
            values = load_row(values_ptr, start + t, valid)
            tl.store(advantages_ptr + start + t, tl.where(valid, rewards + state - values, 0.0), mask=here)
        if lam_returns is not None:
            state = states(
                rewards_ahead, values_ahead, valid_ahead, ahead, carry_returns, gamma, lam_returns, CARRY_MASKED
            )
            carry_returns = last_of(state, BLOCK)
        tl.store(returns_ptr + start + t, tl.where(valid, rewards + state, 0.0), mask=here)


def lambda_returns(
    rewards: Tensor,  # (B, T) contiguous fp32, as the next
    values: Tensor | None,  # None = 0
    mask: Tensor | None,  # (B, T) contiguous bool
    bootstrap: Tensor | None,  # (B,) fp32
    *,
    gamma: float,
    lam: float | Tensor,  # (B,)
    lam_returns: float | Tensor | None,  # (B,); None = as lam
    carry_masked: bool,
) -> tuple[Tensor, Tensor]:
    """(B, T) advantages and returns; without values both are the returns."""
    B, T = rewards.shape
    returns = rewards.new_empty((B, T))
    advantages = returns if values is None else rewards.new_empty((B, T))
    if B and T:
        lam, lam_ptr = _number_or_pointer(lam)
        lam_returns, lam_returns_ptr = _number_or_pointer(lam_returns)
        with on_device(rewards):
            _lambda_returns_kernel[(B,)](
                rewards, values, as_bytes(mask), bootstrap, lam_ptr, lam_returns_ptr, advantages, returns, T,
                gamma, lam, lam_returns, CARRY_MASKED=carry_masked, BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
    return advantages, returns


def _number_or_pointer(lam: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A number to pass, and the tensor that replaces it in the kernel."""
    return (0.0, lam.contiguous()) if isinstance(lam, Tensor) else (lam, None)
