"""Clocks, and the ceilings of this machine measured with them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
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


def time_step(case: Case, provider: Provider, run: Run) -> float:
    """Milliseconds of one step on inputs made anew, outside the clock: in-place providers overwrite theirs."""
    inputs = timed_inputs(case, provider)
    gc.collect()
    return timed(lambda: step(run, inputs), case.shape.device)


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
