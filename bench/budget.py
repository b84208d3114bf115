"""How long a run may take, and what of it the next case gets."""

from __future__ import annotations

import time

SECONDS_PER_CASE = 12.0
"""For the rounds, where there is no budget or enough of it."""
LEAST_SECONDS = 3.0
"""That any case needs: its inputs, the oracle, two steps to warm up and the least rounds."""


class Budget:
    """Seconds of the wall clock since construction; None: as many as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._start = time.monotonic()
        self._last = 0.0

    def share(self, cases_left: int) -> float | None:
        """Seconds for the rounds of the next of `cases_left` cases: half of its share of what is left, since the
        oracle, compiling and memory need the rest. None if it would not fit: it is taken to need as long as the last
        case that ran."""
        if self.seconds is None:
            return SECONDS_PER_CASE
        left = self.seconds - (time.monotonic() - self._start)
        if left < max(LEAST_SECONDS, self._last):
            return None
        return min(SECONDS_PER_CASE, left / cases_left / 2)

    def took(self, seconds: float) -> None:
        """Of the case that ran just now."""
        self._last = seconds
