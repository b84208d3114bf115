"""Launch configurations: frozen data, chosen by pure functions of what stays fixed over a run (V, dtype, architecture;
never N). How many programs share a row may depend on N, since it changes no bit: see `few_rows`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
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
ROWS = ["logits_ptr", "dlogits_ptr"]
"""Their alignment is told by a constexpr, together with that of the strides; see `row_at`."""
STRIDES = ["T", "out_T", "stride_b", "stride_t", "out_stride_b", "out_stride_t"]
"""How rows lie: no compiled variant depends on it, nor on the size of `ROWS` (which AMD's asks)."""


@dataclass(frozen=True)
class Chip:
    """What the heuristics read of an architecture."""

    multiprocessors: int
    cache_bytes: int
    """The last cache before the memory."""
    warp_size: int = 32
    resident_threads: int = 1024
    """Of one multiprocessor, by the 64 registers that a thread of the one-pass kernel takes."""


CHIPS = {
    "sm_80": Chip(multiprocessors=108, cache_bytes=40 * 2**20),
    "sm_90": Chip(multiprocessors=132, cache_bytes=50 * 2**20),
    "sm_100": Chip(multiprocessors=148, cache_bytes=126 * 2**20),
    "gfx942": Chip(multiprocessors=304, cache_bytes=256 * 2**20, warp_size=64),
}
"""By architecture and never as the device reports itself: two kinds of H100 must sum a row in the same order."""


@dataclass(frozen=True)
class RowConfig:
    """Tiles of `block_v` columns by programs of `num_warps` warps; `tiles` of them, rounded up to a power of two, make
    a row."""

    block_v: int
    num_warps: int
    tiles: int = 1


@dataclass(frozen=True)
class TokenConfig:
    """One program per `block_n` tokens, or per sequence in steps of `block_n`; `block_p` partial sums per last step."""

    block_n: int
    num_warps: int
    block_p: int = 64


def row_config(vocab_size: int, dtype_bytes: int, arch: str, softcap: bool = False) -> RowConfig:
    """Row kernels: 16 fp32 values per thread (8 with a softcap, whose tanh takes the registers), the whole row in one
    tile when it is short.

    A program of 256 threads, or of more where so many rows in flight would not stay in the cache between the two sweeps
    of the one-pass kernel; a row in flight holds half of its bytes on average. The same for every kernel that sums a
    row, so that scoring and training give the same bits. An unknown architecture takes the small program. Rows of a
    vocabulary that is no multiple of 8 are moved element by element, and the addresses leave no registers for 1024
    threads.
    """
    chip = CHIPS.get(arch)
    threads, most = 256, 512 if vocab_size % 8 else 1024
    while chip and threads < most and not _stay_in_cache(chip, threads, vocab_size * dtype_bytes):
        threads *= 2
    per_thread = 8 if softcap else 16
    block_v = min(threads * per_thread, max(16, triton.next_power_of_2(vocab_size)))
    tiles = triton.next_power_of_2(triton.cdiv(vocab_size, block_v))
    return RowConfig(block_v, max(1, block_v // per_thread // warp_size(arch)), tiles)


def _stay_in_cache(chip: Chip, threads: int, row_bytes: int) -> bool:
    rows = chip.multiprocessors * (chip.resident_threads // threads)
    return rows * row_bytes / 2 <= 0.8 * chip.cache_bytes


def tile_config(vocab_size: int, arch: str, softcap: bool = False) -> RowConfig:
    """The gradient alone, which adds nothing up: one small program per tile, whatever the row's tiles are."""
    return row_config(vocab_size, 0, arch, softcap)


def warp_size(arch: str) -> int:
    return CHIPS[arch].warp_size if arch in CHIPS else 32


def few_rows(rows: int, arch: str, variant: tuple[Any, ...]) -> bool:
    """Whether so few rows leave multiprocessors idle that the tiles of a row should be programs of their own.

    Not once `variant` has met more rows: both ways give the same bits, and a new number of rows must compile nothing.
    """
    few = variant not in _met_many and rows < (CHIPS[arch].multiprocessors if arch in CHIPS else 0)
    if not few:
        _met_many.add(variant)
    return few


_met_many: set[tuple[Any, ...]] = set()
_compiled_ahead: set[tuple[Any, ...]] = set()


def variant_of(kernel: Any, arguments: Iterable[Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a compiled variant of a kernel depends on: device, which arguments are there, their dtypes, V and the
    constexprs."""
    present = tuple(x.dtype if isinstance(x, torch.Tensor) else x is None for x in arguments)
    return (
        kernel,
        present,
        tuple((name, x is None if isinstance(x, float | None) else x) for name, x in options.items()),
    )


def compile_ahead(kernel: Any, variant: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
    """Compile, once, what the first launch with more rows would need, so that it need not wait."""
    if variant not in _compiled_ahead:
        _compiled_ahead.add(variant)
        kernel.warmup(*arguments, grid=(1,), **options)


def token_config(by_sequence: bool = False) -> TokenConfig:
    """Two tokens per thread: what compiles without spills; more threads for a program that takes a sequence."""
    return TokenConfig(block_n=1024, num_warps=16) if by_sequence else TokenConfig(block_n=256, num_warps=4)


def architecture(device: torch.device) -> str:
    """The key of `CHIPS` for a device, or what it calls itself; "interpreter" on the CPU."""
    return _architecture(device.index or 0) if device.type == "cuda" else "interpreter"


@functools.cache
def _architecture(index: int) -> str:
    properties = _properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    family = {8: "sm_80", 9: "sm_90"}.get(properties.major, "sm_100" if properties.major >= 10 else "")
    return family or f"sm_{properties.major}{properties.minor}"


def multiprocessors(device: torch.device) -> int | None:
    """How many the device has, whatever its architecture; None on the CPU."""
    return _properties(device.index or 0).multi_processor_count if device.type == "cuda" else None


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


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
