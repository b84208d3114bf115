"""One runner for all cases: check every provider, time those that are right in turns, then take their memory."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import memory
from bench.case import Case, Run, Unavailable, unchanged
from bench.check import Oracle
from bench.quiet import Neighbours, wait_for_quiet
from bench.timing import time_step

SECONDS_PER_CASE = 12.0
SECONDS_FOR_RETRIES, SECONDS_OF_PATIENCE = 60.0, 120.0
"""Per case, how long rounds in place of dropped ones may take, and how long rounds may wait for quiet."""
MIN_ROUNDS, MAX_ROUNDS = 5, 25
WARM_UP_SECONDS, WARM_UPS = 1.0, 5
STEADY = 1.5
"""A provider whose quartiles are further apart than this factor has no speed-up worth printing."""

Row = dict[str, Any]
Say = Callable[[str], None]


def run_case(
    case: Case,
    names: list[str],
    ceilings: dict[str, float | None],
    quick: bool,
    say: Say,
    seconds: float = SECONDS_PER_CASE,
) -> list[Row]:
    """One row per provider. A provider that cannot run, fails or is wrong has a reason in its row and no speed. The
    rounds take about `seconds`, and are at least `MIN_ROUNDS`."""
    rows = {name: _row(case, name) for name in names if name in case.providers}
    runs = _checked(case, rows, say)
    if case.memory_only:
        _take_memory(case, rows, runs, quick, say)
        return list(rows.values())
    rounds = _warm_up(case, rows, runs, say, seconds)
    times, dropped = _rounds(case, rows, runs, rounds, case.shape.device == "cpu" and not quick, say)
    _take_memory(case, rows, runs, quick, say)
    for name in runs:
        rows[name] |= _speed(case, times[name], ceilings) | _against_eager(times, name, dropped is not None)
        if case.providers[name].timed is not unchanged:  # the least work was counted for other inputs
            rows[name]["rate"] = None
        rows[name]["disturbed_rounds"] = "none, too few were quiet" if dropped is None else dropped
    return list(rows.values())


def skipped(case: Case, names: list[str], reason: str) -> list[Row]:
    """The rows of a case that was not run at all."""
    return [_row(case, name) | {"status": "skipped", "reason": reason} for name in names if name in case.providers]


def _rounds(
    case: Case, rows: dict[str, Row], runs: dict[str, Run], wanted: int, guarded: bool, say: Say
) -> tuple[dict[str, list[float]], int | None]:
    """Milliseconds per provider, one each per round, and how many rounds were dropped because others disturbed them
    (none unless `guarded`: on a GPU other processes' CPU time says little, and a quick run takes what comes).

    Every round starts with another provider, so that nobody always follows the same one: what a predecessor leaves in
    caches, in the allocator or in the processor's clock is shared out. If fewer than `MIN_ROUNDS` in twice as many
    attempts were quiet, all of them are kept and the count is None.
    """
    quiet: list[dict[str, float]] = []
    every: list[dict[str, float]] = []
    start, patience = time.monotonic(), SECONDS_OF_PATIENCE
    while runs and len(quiet) < wanted and len(every) < 2 * wanted:
        if len(every) >= wanted and time.monotonic() - start > SECONDS_FOR_RETRIES:
            break
        say(f"{case.name}: round {len(quiet) + 1} of {wanted}")
        if guarded and len(every) > len(quiet):  # disturbed before: look before the next
            waited = wait_for_quiet(patience)
            patience, start = max(patience - waited, 0.0), start + waited
        neighbours, found = Neighbours(), {}
        for name in _rotated(list(runs), len(every)):
            with _reason_for_failure(rows[name], runs):
                found[name] = _time(case, name, runs)
        every.append(found)
        if not (guarded and neighbours.disturbed()):
            quiet.append(found)
    enough = len(quiet) >= MIN_ROUNDS
    kept = quiet if enough else every
    return {name: [found[name] for found in kept] for name in runs}, len(every) - len(quiet) if enough else None


def _rotated(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


def _row(case: Case, name: str) -> Row:
    return {
        "case": case.name,
        "suite": case.suite,
        "target": case.target,
        "shape": dataclasses.asdict(case.shape) | {"rows": case.shape.rows},
        "provider": name,
        "status": "ok",
        "reason": None,
        "errors": None,
        "checked_rows": None,
        "ms": None,
        "first_ms": None,
        "peak_mib": None,
        "first_peak_mib": None,
        "rate": None,
        "vs_eager": None,
        "disturbed_rounds": None,
    }


def _checked(case: Case, rows: dict[str, Row], say: Say) -> dict[str, Run]:
    """The providers whose values and gradients are right, and the floor."""
    say(f"{case.name}: float64 oracle")
    try:
        oracle = Oracle(case)
    except Exception as error:  # typically out of memory; the other cases must still run
        for row in rows.values():
            row |= {"status": "failed", "reason": tidy(f"the oracle failed, {type(error).__name__}: {error}")}
        return {}
    runs: dict[str, Run] = {}
    for name, row in rows.items():
        say(f"{case.name}: checking {name}")
        with _reason_for_failure(row, runs):
            run = case.providers[name].load(case.shape)
            if case.providers[name].floor:
                row["status"] = "floor"
                runs[name] = run
                continue
            errors = oracle.check(case.providers[name], run)
            row["checked_rows"] = oracle.shape.rows
            row["errors"] = {key: {"error": e.error, "bar": e.bar} for key, e in errors.items()}
            wrong = [f"{key} is off by {e.error:.2e}, allowed {e.bar:.2e}" for key, e in errors.items() if not e.ok]
            if case.providers[name].approximate:
                row["status"] = "approximate"
                runs[name] = run
            elif wrong:
                row |= {"status": "wrong", "reason": "; ".join(wrong)}
            else:
                runs[name] = run
    return runs


@contextlib.contextmanager
def _reason_for_failure(row: Row, runs: dict[str, Run]) -> Iterator[None]:
    """If the block fails, note why in the row and leave the provider out from then on."""
    try:
        yield
    except Unavailable as error:
        row |= {"status": "unavailable", "reason": tidy(str(error))}
        runs.pop(row["provider"], None)
    except Exception as error:  # other people's code may raise anything, and the other providers must still run
        row |= {"status": "failed", "reason": tidy(f"{type(error).__name__}: {error}")}
        runs.pop(row["provider"], None)
        if row["shape"]["device"] != "cpu":
            torch.cuda.empty_cache()


def tidy(message: str) -> str:
    """The first line of a message, without paths."""
    first = (message.strip().splitlines() or [""])[0]
    return re.sub(r"(?:/[\w.+-]+){2,}", "...", first)[:300]


def _warm_up(case: Case, rows: dict[str, Row], runs: dict[str, Run], say: Say, seconds: float) -> int:
    """Untimed steps: they compile what is left to compile, raise clocks, and touch memory that a virtual machine may
    only now get from its host. Returns how many rounds the time allows."""
    total = 0.0
    memory.touch(case)
    for name in list(runs):
        say(f"{case.name}: warming up {name}")
        with _reason_for_failure(rows[name], runs):
            spent = [_time(case, name, runs) / 1e3]
            while len(spent) < WARM_UPS and (len(spent) < 2 or sum(spent) < WARM_UP_SECONDS):
                if spent[0] > WARM_UP_SECONDS and case.shape.device == "cpu":
                    break
                spent.append(_time(case, name, runs) / 1e3)
            total += spent[-1]
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / total))) if total else MIN_ROUNDS


def _time(case: Case, name: str, runs: dict[str, Run]) -> float:
    return time_step(case, case.providers[name], runs[name])


def _take_memory(case: Case, rows: dict[str, Row], runs: dict[str, Run], quick: bool, say: Say) -> None:
    for name in list(runs):
        say(f"{case.name}: memory of {name}")
        with _reason_for_failure(rows[name], runs):
            rows[name] |= _memory(case, name, runs[name], quick)


def _memory(case: Case, name: str, run: Run, quick: bool) -> Row:
    if case.shape.device == "cpu":
        return memory.in_fresh_process(case, name, quick)
    if case.memory_only:  # nothing has run at this size yet: the first call compiles, and allocates for it
        time_step(case, case.providers[name], run)
    return {"peak_mib": memory.gpu_peak(case, case.providers[name], run)}


def _speed(case: Case, times: list[float], ceilings: dict[str, float | None]) -> Row:
    """Median, spread, and the share of the ceiling that the least possible bytes or FLOP make of it."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    ms = {"median": median, "q25": low, "q75": high, "min": min(times), "max": max(times), "samples": times}
    if case.least_flops is not None:
        flops = case.least_flops(case.shape)
        achieved, ceiling, unit = flops / median / 1e9, ceilings[f"gemm_{case.shape.dtype}_tflops"], "TFLOP/s"
        rate = {"least_flops": flops}
    else:
        moved = case.least_bytes(case.shape)
        achieved, ceiling, unit = moved / median / 1e6, ceilings["copy_gbs"], "GB/s"
        rate = {"least_bytes": moved}
    rate |= {"value": achieved, "unit": unit, "ceiling": ceiling, "share": achieved / ceiling if ceiling else None}
    return {"ms": ms, "rate": rate}


def _against_eager(times: dict[str, list[float]], name: str, undisturbed: bool) -> Row:
    """eager / provider, round by round, so that slow phases of the machine cancel: median and quartiles. `steady` is
    False where other processes disturbed the rounds or either one's times are too scattered for a ratio."""
    if "eager" not in times:
        return {}
    ratios = [a / b for a, b in zip(times["eager"], times[name], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    steady = undisturbed and _steady(times["eager"]) and _steady(times[name])
    return {"vs_eager": {"median": median, "q25": low, "q75": high, "steady": steady}}


def _steady(times: list[float]) -> bool:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high <= STEADY * low
