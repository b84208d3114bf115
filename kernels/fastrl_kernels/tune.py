"""Launch configurations: frozen data, chosen by pure functions of what stays fixed over a run (V, dtype, never N)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton

PER_ROW = [
    "ids_ptr", "mask_ptr", "rows_ptr", "temperature_ptr", "advantages_ptr", "weights_ptr", "entropy_weights_ptr",
    "old_ptr", "ref_ptr", "rollout_ptr", "policy_weights_ptr", "logp_ptr", "entropy_ptr", "max_ptr", "log_sum_ptr",
    "dlogp_ptr", "dentropy_ptr",
]  # fmt: skip
"""Pointers that a row kernel reads one number from. Their alignment changes with N and with views of them, and must not
compile another variant."""


@dataclass(frozen=True)
class RowConfig:
    """One program per row, `block_v` columns at a time."""

    block_v: int
    num_warps: int


@dataclass(frozen=True)
class TokenConfig:
    """One program per `block_n` tokens, or per sequence in steps of `block_n`; `block_p` partial sums per last step."""

    block_n: int
    num_warps: int
    block_p: int = 64


def row_config(vocab_size: int, softcap: bool = False, warp_size: int = 0) -> RowConfig:
    """Row kernels: 16 fp32 values per thread (8 with a softcap, whose tanh takes the registers), the whole row in one
    tile when it is short.

    The same for scoring and for the fused gradient, so that both sum a row in the same order and give the same bits.
    `warp_size` is the running device's unless given (64 on AMD's CDNA).
    """
    block_v = min(2048 if softcap else 4096, max(16, triton.next_power_of_2(vocab_size)))
    threads = block_v // (8 if softcap else 16)
    return RowConfig(block_v, num_warps=max(1, threads // (warp_size or _warp_size())))


def token_config(by_sequence: bool = False) -> TokenConfig:
    """Two tokens per thread: what compiles without spills; more threads for a program that takes a sequence."""
    return TokenConfig(block_n=1024, num_warps=16) if by_sequence else TokenConfig(block_n=256, num_warps=4)


def _warp_size() -> int:
    return 64 if torch.version.hip else 32


def on_device(tensor: torch.Tensor) -> Any:
    """Make the tensor's device current for a launch; Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_tickets: dict[tuple[torch.device, int], torch.Tensor] = {}


def ticket_counter(device: torch.device) -> torch.Tensor:
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
