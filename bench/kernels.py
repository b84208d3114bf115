"""What a call costs the GPU itself: its kernels and copies as the profiler sees them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.case import Case, Provider, Run, step, timed_inputs

PROFILES = 3
"""Of which the one in the middle counts: the first of a process may miss kernels."""


def of_step(case: Case, provider: Provider, run: Run) -> dict[str, float] | None:
    """The whole step: what it builds, the loss, its backward, the metrics on the host."""

    def prepare() -> Callable[[], Any]:
        inputs = timed_inputs(case, provider)
        return lambda: step(run, inputs)

    return _kernels(prepare)


def of_forward(case: Case, provider: Provider, run: Run) -> dict[str, float] | None:
    """The loss call alone, on what was built before."""
    if provider.forward is None:
        return of_step(case, provider, run)
    forward = provider.forward
    return _kernels(lambda: forward(timed_inputs(case, provider)))


def _kernels(prepare: Callable[[], Callable[[], Any]]) -> dict[str, float] | None:
    """ms of all kernels and copies, how many they are, and how many of them are fastrl's own Triton kernels. None where
    the profiler sees none: it may not be allowed to."""
    found = [one for _ in range(PROFILES) if (one := summary(_profiled(prepare())))["launches"]]
    return sorted(found, key=lambda one: one["ms"])[len(found) // 2] if found else None


def _profiled(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, microseconds) of everything on the device."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def summary(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """What is not one of fastrl's Triton kernels is a kernel or a copy of torch's."""
    found, own = list(events), triton_names()
    triton = sum(name in own for name, _ in found)
    return {"ms": sum(time for _, time in found) / 1e3, "launches": len(found), "triton": triton}


def triton_names() -> set[str]:
    """Names of the functions in `fastrl_kernels` that Triton compiles; a kernel is called as its function."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "fastrl_kernels"]
    every = [value for module in modules for value in vars(module).values()]
    return {value.fn.__name__ for value in every if hasattr(getattr(value, "fn", None), "__name__")}
