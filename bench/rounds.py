"""Rounds: every provider once, in turns, until the time is spent. The clock is the wall's, so that what is not timed,
making inputs above all, is paid for too."""

from __future__ import annotations

import time

from bench.case import Case, Run
from bench.quiet import Neighbours, wait_for_quiet
from bench.rows import Row, Say, reason_for_failure
from bench.timing import settle, time_step

MIN_ROUNDS, MIN_SIDE_ROUNDS, MAX_ROUNDS = 5, 3, 25
"""At least, at least of cold rounds and of those by the wall clock, and at most; the least is run however long it
takes, since fewer have no quartiles."""
WARM_UP_SECONDS, WARM_UPS = 1.0, 5
WARM_UP_SHARE = 0.25
"""Of a case's seconds, at most, for the warm-ups of all providers after the two steps that each needs."""
RETRIES, PATIENCE = 5.0, 10.0
"""Times the seconds of the rounds: how long rounds in place of dropped ones may take, and how long they may wait for
quiet."""


def warm_up(case: Case, rows: dict[str, Row], runs: dict[str, Run], seconds: float, say: Say) -> float:
    """Untimed steps: they compile what is left to compile, raise clocks, and touch memory that a virtual machine may
    only now get from its host. Returns the seconds of one round."""
    total = 0.0
    limit = min(WARM_UP_SECONDS, WARM_UP_SHARE * seconds / max(1, len(runs)))
    for name in list(runs):
        say(f"{case.name}: warming up {name}")
        with reason_for_failure(rows[name], runs):
            spent = [_seconds(case, name, runs)]
            while len(spent) < WARM_UPS and (len(spent) < 2 or sum(spent) < limit):
                if spent[0] > WARM_UP_SECONDS and case.shape.device == "cpu":
                    break
                spent.append(_seconds(case, name, runs))
            total += spent[-1]
        settle()  # what compiling left behind
    return total


def _seconds(case: Case, name: str, runs: dict[str, Run]) -> float:
    start = time.monotonic()
    time_step(case, case.providers[name], runs[name])
    return time.monotonic() - start


def run(
    case: Case, rows: dict[str, Row], runs: dict[str, Run], how: str, seconds: float, guarded: bool, say: Say
) -> tuple[dict[str, list[float]], int | None]:
    """Milliseconds per provider, one each per round, and how many rounds were dropped because others disturbed them
    (none unless `guarded`: on a GPU other processes' CPU time says little, and a quick run takes what comes).

    Every round starts with another provider, so that nobody always follows the same one: what a predecessor leaves in
    caches, in the allocator or in the processor's clock is shared out. If too few of the attempts were quiet, all of
    them are kept and the count is None.
    """
    least = MIN_ROUNDS if how == "warm" else MIN_SIDE_ROUNDS
    quiet: list[dict[str, float]] = []
    every: list[dict[str, float]] = []
    start, patience = time.monotonic(), PATIENCE * seconds
    while runs and not finished(len(quiet), len(every), time.monotonic() - start, seconds, least):
        say(f"{case.name}: {how} round {len(quiet) + 1}")
        if guarded and len(every) > len(quiet):  # disturbed before: look before the next
            waited = wait_for_quiet(patience)
            patience, start = max(patience - waited, 0.0), start + waited
        neighbours, found = Neighbours(), {}
        for name in rotated(list(runs), len(every)):
            with reason_for_failure(rows[name], runs):
                found[name] = time_step(case, case.providers[name], runs[name], how)
        every.append(found)
        if not (guarded and neighbours.disturbed()):
            quiet.append(found)
    enough = len(quiet) >= least
    kept = quiet if enough else every
    return {name: [found[name] for found in kept] for name in runs}, len(every) - len(quiet) if enough else None


def finished(quiet: int, every: int, spent: float, seconds: float, least: int) -> bool:
    """Whether `every` attempts in `spent` seconds, `quiet` of them undisturbed, are enough."""
    if quiet >= MAX_ROUNDS:
        return True
    if quiet >= least:
        return spent * (every + 1) / every > seconds  # the next would end too late
    return every >= 2 * MAX_ROUNDS or (every >= least and spent > (1 + RETRIES) * seconds)


def rotated(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]
