"""Clocks, and the ceilings of this machine measured with them."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.case import DTYPES, Case, Provider, Run, step, timed_inputs

LEAD_MS = 5.0
"""How long a GPU sleeps before a call is timed, so that the host runs ahead of it."""
HOW = ("warm", "cold", "wall")
"""The ways to time a step: as it comes; after other data went through the caches; by the wall clock (on a GPU)."""


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call: CUDA events on a GPU, the wall clock elsewhere.

    The GPU first sleeps for `LEAD_MS`, before the first event and so outside of the interval, while the host runs
    ahead: what Python does before its launches is hidden, for every provider alike, as it is in a training step whose
    queue is full. `waited` says what that hides. It hides neither a host that takes longer than the lead, nor what
    follows a wait for the device inside the call (metrics read on the host, the number of rows that count): the
    interval then holds that wait and the launches after it."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    torch.cuda._sleep(_lead_cycles())
    return _between_events(call)


def _between_events(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _lead_cycles() -> int:
    """Cycles of `LEAD_MS`, by the GPU's own events: how long a cycle is depends on the GPU."""
    cycles = 10_000_000
    return round(cycles * LEAD_MS / min(_between_events(lambda: torch.cuda._sleep(cycles)) for _ in range(3)))


def waited(call: Callable[[], Any]) -> float:
    """Milliseconds by the wall clock until a GPU has done all that one call asked of it: the host's work on an idle
    device, and compiling, included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def time_step(case: Case, provider: Provider, run: Run, how: str = "warm") -> float:
    """Milliseconds of one step on inputs made anew, outside the clock: in-place providers overwrite theirs. `how` is
    one of `HOW`."""
    inputs = timed_inputs(case, provider)
    gc.collect()  # of what came since the heap was settled: cheap inside `settled_heap`, and only there
    if how == "cold":
        _flushing(case.shape.device).add_(1)
    if how == "wall":
        return waited(lambda: step(run, inputs))
    return timed(lambda: step(run, inputs), case.shape.device)


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """No automatic collection meanwhile, and collections by hand that look only at what came since `settle`: with TRL
    and Liger imported a full one takes a quarter of a second, hundreds of times what a short step takes."""
    gc.disable()
    settle()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def settle() -> None:
    """Collect, and take what is left out of the collector's sight."""
    gc.collect()
    gc.freeze()


@functools.cache
def _flushing(device: str) -> torch.Tensor:
    """Twice as many bytes as the last cache holds; reading and writing all of them evicts everything else."""
    return torch.zeros(2 * last_cache_bytes(device), dtype=torch.uint8, device=device)


def last_cache_bytes(device: str) -> int:
    """Size of the largest cache; where the system does not say, larger than any we know of."""
    if device != "cpu":
        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 2**28
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    sizes = [int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] for text in found if text[-1:] in ("K", "M")]
    return max(sizes, default=2**28)


def copy_bandwidth(device: str) -> float:
    """GB/s of a large copy, bytes read plus written, best of several."""
    size = 2**30 if device != "cpu" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source).zero_()
    best = min(timed(lambda: target.copy_(source), device) for _ in range(12))
    return 2 * size / best / 1e6


def gemm_rate(dtype: str, device: str) -> float:
    """TFLOP/s of a large square product with a (V, H)-like transposed right side, 2·n³ FLOP, best of several."""
    n, repeats = (8192, 20) if device != "cpu" else (2048, 6)
    a, b = (torch.randn((n, n), device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    best = min(timed(lambda: torch.mm(a, b.t(), out=out), device) for _ in range(repeats))
    return 2 * n**3 / best / 1e9
