"""Clocks, and the ceilings of this machine measured with them."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.case import DTYPES, Case, Provider, Run, step, timed_inputs


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call: CUDA events on a GPU, the wall clock elsewhere."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def waited(call: Callable[[], Any]) -> float:
    """Milliseconds by the wall clock until a GPU has done all that one call asked of it, compiling included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def time_step(case: Case, provider: Provider, run: Run, cold: bool = False) -> float:
    """Milliseconds of one step on inputs made anew, outside the clock: in-place providers overwrite theirs. With
    `cold`, other data has gone through the caches since."""
    inputs = timed_inputs(case, provider)
    gc.collect()
    if cold:
        _flushing(case.shape.device).add_(1)
    return timed(lambda: step(run, inputs), case.shape.device)


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


def kernel_time(case: Case, provider: Provider, run: Run) -> dict[str, float]:
    """What one step costs the GPU itself: milliseconds of its kernels and copies together, and how many they are."""
    from torch.profiler import ProfilerActivity, profile

    inputs = timed_inputs(case, provider)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(run, inputs)
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"ms": sum(event.time_range.elapsed_us() for event in events) / 1e3, "launches": len(events)}


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
