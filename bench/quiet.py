"""How much processor time others took while we measured: on a shared machine a median can be off by several times.

The rule looks at other processes only, never at our own times, and drops whole rounds with all their providers, so it
cannot favour anybody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")
_IDLE_FIELDS = (3, 4)  # idle, iowait
_BUSY_FIELDS = slice(0, 8)  # user ... steal; the guest fields after them are counted in user already
SHARE = 0.1
"""Of all cores' time; above it a round is dropped."""
_LOOK, _PATIENCE = 0.5, 10.0
_RESOLUTION = 0.03
"""Seconds below which nothing is said: the kernel counts in ticks of 10 ms."""


class Neighbours:
    """Seconds of processor time that other processes used since construction; None where the system does not say."""

    def __init__(self) -> None:
        self._wall, self._own, self._all = time.perf_counter(), _own_seconds(), _busy_seconds()

    def disturbed(self) -> bool:
        """Whether others took so much that the round does not count."""
        if self._all is None:
            return False
        others = (_busy_seconds() - self._all) - (_own_seconds() - self._own)
        available = (time.perf_counter() - self._wall) * (os.cpu_count() or 1)
        return others > max(_RESOLUTION, SHARE * available)


def wait_for_quiet(seconds: float) -> float:
    """Wait until others leave the processor alone, or `seconds` at most; how long it took."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        neighbours = Neighbours()
        time.sleep(_LOOK)
        if not neighbours.disturbed():
            break
    return time.monotonic() - start


def undisturbed(measure: Callable[[], float], tries: int) -> tuple[float, bool]:
    """The best of a rate measured until others left it alone, `tries` times at most, and whether they did: a ceiling
    taken on a busy machine would flatter every share of it."""
    best = 0.0
    for i in range(tries):
        neighbours = Neighbours()
        best = max(best, measure())
        if not neighbours.disturbed():
            return best, True
        if i + 1 < tries:
            wait_for_quiet(_PATIENCE)
    return best, False


def _own_seconds() -> float:
    """Processor time of this process and of the compilers that it waited for."""
    return sum(os.times()[:4])


def _busy_seconds() -> float | None:
    if not _STAT.exists():
        return None
    ticks = [int(x) for x in _STAT.read_text().splitlines()[0].split()[1:]][_BUSY_FIELDS]
    idle = sum(ticks[i] for i in _IDLE_FIELDS)
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
