"""Peak memory of one step beyond its inputs: the allocator's count on a GPU, resident memory of a fresh process else.

`ru_maxrss` would not do: a child starts with the high-water mark of the process that spawned it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.case import Case, Provider, Run, step, timed_inputs
from bench.quiet import Neighbours, wait_for_quiet
from bench.timing import time_step, timed, waited

ROOT = Path(__file__).parents[1]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.002
_ATTEMPTS, _PATIENCE = 3, 20.0
_WORKER_SECONDS = {"cpu": 600.0, "cuda": 90.0}
"""After which a fresh process hangs, for all that anyone can tell. On a CPU two steps of the slowest provider,
compiling included, take minutes; a GPU's first call is to take seconds, and its run has a budget."""


class Peak:
    """MiB above the start; None until the block has ended, or where the system does not say."""

    mib: float | None = None


def gpu_peak(case: Case, provider: Provider, run: Run) -> float:
    """MiB that the allocator handed out during one warm step, at the most at once, beyond the inputs."""
    if case.memory_only:  # nothing has run at this size yet: the first call compiles, and allocates for it
        time_step(case, provider, run)
    inputs = timed_inputs(case, provider)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = step(run, inputs)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    del outputs
    return peak


def touch(case: Case) -> None:
    """Write to as much memory as the largest provider will ask for, and free it.

    A virtual machine gets memory from its host at the first touch, at ten times the price of later ones; whoever comes
    first or allocates most would pay it. Nothing to do on a GPU, whose allocator keeps its memory.
    """
    if case.shape.device == "cpu":
        wanted = 5 * case.shape.rows * max(case.shape.vocab, 64) * case.shape.itemsize
        torch.empty(min(wanted, _available() // 3), dtype=torch.uint8).fill_(1)


def _available() -> int:
    """Bytes that can be allocated without swapping."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.exists() else None
    return int(found.group(1)) * 1024 if found else 2**30


def in_fresh_process(case: Case, provider: str, quick: bool) -> dict[str, Any]:
    """first_ms, first_peak_mib and peak_mib of a provider that has the process to itself.

    If other processes disturbed the first call, another process tries; after `_ATTEMPTS` first_ms is None. A quick run
    only shows that everything works: it takes what comes.
    """
    if quick:
        found = _in_process(case, provider, quick)
        del found["disturbed"]
        return found
    for _ in range(_ATTEMPTS):
        wait_for_quiet(_PATIENCE)
        found = _in_process(case, provider, quick)
        if not found.pop("disturbed"):
            return found
    return found | {"first_ms": None}


def first_call(case: Case, provider: str, quick: bool) -> dict[str, Any]:
    """first_ms on a GPU, in a process of its own that finds no compiled kernel; the import is not in it. It allocates
    beside this process, whose allocator keeps what the rounds have freed: that is given back first."""
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        return _in_process(case, provider, quick, TRITON_CACHE_DIR=folder)


def _in_process(case: Case, provider: str, quick: bool, **settings: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench", "--worker", case.name, provider, "--device", case.shape.device]
    command += ["--quick"] * quick
    # One compile thread: a pool of compilers outlives the call, and would count as somebody else's work.
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | settings
    limit = _WORKER_SECONDS[case.shape.device]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"in a fresh process: no end after {limit:g} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"in a fresh process: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def worker(case: Case, name: str) -> dict[str, Any]:
    """The first step of this process, timed with everything that only a first call does, and the peak of a second."""
    provider = case.providers[name]
    run = provider.load(case.shape)
    if case.shape.device != "cpu":
        given = timed_inputs(case, provider)
        return {"first_ms": waited(lambda: step(run, given))}
    touch(case)
    peaks, times, disturbed = [], [], []
    for _ in range(2):
        inputs = timed_inputs(case, provider)
        neighbours = Neighbours()
        with resident_peak() as peak:
            times.append(timed(lambda inputs=inputs: step(run, inputs), "cpu"))
        disturbed.append(neighbours.disturbed())
        peaks.append(peak.mib)
        del inputs
    return {"first_ms": times[0], "first_peak_mib": peaks[0], "peak_mib": peaks[1], "disturbed": disturbed[0]}


@contextlib.contextmanager
def resident_peak() -> Iterator[Peak]:
    """Measure the peak increase of resident memory inside the block."""
    peak = Peak()
    gc.collect()
    _return_free_memory()
    if not _STATUS.exists():
        yield peak
        return
    before = _resident("VmRSS")
    if _reset_high_water_mark():
        yield peak
        peak.mib = _resident("VmHWM") - before
        return
    samples, stop = [before], threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            samples.append(_resident("VmRSS"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
    peak.mib = max(samples) - before


def _resident(field: str) -> float:
    """MiB of a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    return int(found.group(1)) / 2**10 if found else 0.0


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _return_free_memory() -> None:
    """Give freed heap back to the system (glibc), so that reusing it counts again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
