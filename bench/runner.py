"""One runner for all cases: check every provider, time those that are right in turns, then what is measured beside."""

from __future__ import annotations

from bench import memory, rounds, sides
from bench import rows as every_row
from bench.budget import SECONDS_PER_CASE
from bench.case import Case, Run, unchanged
from bench.check import Oracle
from bench.rows import Row, Say, named, reason_for_failure, spread
from bench.timing import settled_heap

COLD_SECONDS = 2.0
"""A case whose providers take longer than this together has no cold rounds: its own data flushes the caches."""
PARTS = {"warm": 2.0, "cold": 1.0, "wall": 1.0}
"""How the seconds of a case are shared by the kinds of rounds that it has."""


def run_case(
    case: Case,
    names: list[str],
    ceilings: dict[str, float | None],
    quick: bool,
    say: Say,
    seconds: float = SECONDS_PER_CASE,
) -> list[Row]:
    """One row per provider. A provider that cannot run, fails or is wrong has a reason in its row and no speed. The
    rounds take about `seconds` of the wall clock, longer only where the fewest that make a median do."""
    rows = {name: every_row.new(case, name) for name in names if name in case.providers}
    with settled_heap():
        runs = _checked(case, rows, say)
        if not case.memory_only:
            _take_times(case, rows, runs, ceilings, quick, say, seconds)
        sides.take(case, rows, runs, quick, say)
    return list(rows.values())


def _take_times(
    case: Case,
    rows: dict[str, Row],
    runs: dict[str, Run],
    ceilings: dict[str, float | None],
    quick: bool,
    say: Say,
    seconds: float,
) -> None:
    """Warm, cold and, on a GPU, by the wall clock; on a CPU every clock is the wall's."""
    memory.touch(case)
    total = rounds.warm_up(case, rows, runs, seconds, say)
    guarded = case.shape.device == "cpu" and not quick
    kinds = ["warm", *["cold"] * (total < COLD_SECONDS), *["wall"] * (case.shape.device != "cpu")]
    each = seconds / sum(PARTS[kind] for kind in kinds)
    found = {kind: rounds.run(case, rows, runs, kind, PARTS[kind] * each, guarded, say) for kind in kinds}
    times, dropped = found["warm"]
    for name in runs:
        rows[name] |= every_row.speed(case, times[name], ceilings)
        rows[name]["disturbed_rounds"] = every_row.UNQUIET if dropped is None else dropped
        for kind in kinds[1:]:
            rows[name][f"{kind}_ms"] = spread(found[kind][0][name])
        if case.providers[name].timed is not unchanged:  # the least work was counted for other inputs
            rows[name]["rate"] = None
    for name in runs:
        rows[name]["vs_eager"] = every_row.against_eager(rows, name)


def _checked(case: Case, rows: dict[str, Row], say: Say) -> dict[str, Run]:
    """The providers whose values and gradients are right, and the floor."""
    say(f"{case.name}: float64 oracle")
    try:
        oracle = Oracle(case)
    except Exception as error:  # typically out of memory; the other cases must still run
        for row in rows.values():
            row |= {"status": "failed", "reason": f"the oracle failed, {named(error)}"}
            every_row.free_memory(row)
        return {}
    runs: dict[str, Run] = {}
    for name, row in rows.items():
        say(f"{case.name}: checking {name}")
        with reason_for_failure(row, runs):
            run = case.providers[name].load(case.shape)
            if case.providers[name].floor:
                row["status"] = "floor"
                runs[name] = run
            elif _check(case, name, run, oracle, row):
                runs[name] = run
    return runs


def _check(case: Case, name: str, run: Run, oracle: Oracle, row: Row) -> bool:
    """Whether the provider may be timed; its errors go to the row."""
    found = oracle.check(case.providers[name], run)
    row["checked_rows"] = oracle.shape.rows
    row["errors"] = {key: e._asdict() for key, e in found.errors.items()}
    row["measured"] = found.measured or None
    wrong = [f"{key} is off by {e.error:.2e}, allowed {e.bar:.2e}" for key, e in found.errors.items() if not e.ok]
    if case.providers[name].approximate:
        row["status"] = "approximate"
    elif wrong:
        row |= {"status": "wrong", "reason": "; ".join(wrong)}
        return False
    return True
