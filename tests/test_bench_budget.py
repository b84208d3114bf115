"""What a run of the benchmarks may take: rounds and cases against a clock that the tests move."""

from __future__ import annotations

import argparse
import gc
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs rich")

from bench import __main__ as command
from bench import budget, quiet, rounds, runner, sides, suites
from bench import rows as every_row
from bench.case import Case, Inputs


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (budget, rounds):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made))
    monkeypatch.setattr(quiet.Neighbours, "disturbed", lambda _: False)
    return made


@pytest.fixture
def case() -> Case:
    return suites.cases("scan", "cpu", quick=True)[0]


def steps_that_take(seconds: float, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every step takes so many seconds of the wall clock, inputs included, and a microsecond by its own; the kinds of
    all steps."""
    seen: list[str] = []

    def step(case: Case, provider: Any, run: Any, how: str = "warm") -> float:
        seen.append(how)
        clock.now += seconds
        return 1e-3

    monkeypatch.setattr(rounds, "time_step", step)
    return seen


def run_for(seconds: float, case: Case, monkeypatch: pytest.MonkeyPatch, quick: bool = True) -> list[dict[str, Any]]:
    monkeypatch.setattr(sides, "take", lambda *_: None)
    return runner.run_case(case, ["eager", "fastrl"], {"copy_gbs": 1.0}, quick, lambda _: None, seconds)


@pytest.mark.parametrize("seconds", [1.0, 12.0])
def test_a_case_ends_by_the_wall_clock(
    seconds: float, case: Case, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a microsecond whose inputs take 50 ms: by its own clock it could have all rounds."""
    steps_that_take(0.05, clock, monkeypatch)
    rows = run_for(seconds, case, monkeypatch)
    least = 0.05 * 2 * (2 + rounds.MIN_ROUNDS + rounds.MIN_SIDE_ROUNDS)
    assert clock.now - 100 <= max(least, (1 + rounds.WARM_UP_SHARE) * seconds + 4 * 0.05)
    counts = {len(row["ms"]["samples"]) for row in rows}
    assert counts == ({rounds.MAX_ROUNDS} if seconds == 12.0 else {6})


def test_the_least_rounds_are_run_however_long_they_take(
    case: Case, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = steps_that_take(0.9, clock, monkeypatch)
    (row, _) = run_for(1.0, case, monkeypatch)
    assert len(row["ms"]["samples"]) == rounds.MIN_ROUNDS and "cold" in seen
    seen = steps_that_take(1.5, clock, monkeypatch)  # two of them flush the caches themselves
    (row, _) = run_for(1.0, case, monkeypatch)
    assert "cold" not in seen and row["cold_ms"] is None


def test_disturbed_rounds_are_replaced_for_so_long(case: Case, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits minutes for quiet when a case has a second; what is kept then says that it was disturbed."""
    steps_that_take(0.01, clock, monkeypatch)
    monkeypatch.setattr(quiet.Neighbours, "disturbed", lambda _: True)
    waits = []
    monkeypatch.setattr(rounds, "wait_for_quiet", lambda seconds: waits.append(seconds) or min(seconds, 0.5))
    (row, _) = run_for(1.0, case, monkeypatch, quick=False)
    assert row["disturbed_rounds"] == every_row.UNQUIET and not every_row.steady(row)
    assert max(waits) <= rounds.PATIENCE and len(row["ms"]["samples"]) == 2 * rounds.MAX_ROUNDS


@pytest.mark.parametrize(
    ("quiet_rounds", "every", "spent", "done"),
    [
        (0, 0, 0.0, False),
        (4, 4, 99.0, False),  # too few for quartiles
        (5, 5, 8.0, False),  # a sixth ends at 9.6
        (5, 5, 9.0, True),  # a sixth would end at 10.8
        (25, 25, 0.1, True),
        (4, 9, 61.0, True),  # others never let it be
        (4, 50, 0.1, True),
    ],
)
def test_when_rounds_are_enough(quiet_rounds: int, every: int, spent: float, done: bool) -> None:
    assert rounds.finished(quiet_rounds, every, spent, 10.0, rounds.MIN_ROUNDS) is done


def test_rounds_start_with_another_provider_each_time() -> None:
    names = ["a", "b", "c"]
    orders = [rounds.rotated(names, i) for i in range(3)]
    assert [order[0] for order in orders] == names and all(sorted(order) == names for order in orders)


def test_a_tiny_case_ends_within_its_seconds(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the true clock, with room for a busy machine."""
    start = time.monotonic()
    rows = run_for(1.0, case, monkeypatch)
    assert time.monotonic() - start < 20.0
    assert all(len(row["ms"]["samples"]) >= rounds.MIN_ROUNDS for row in rows)


def test_the_collector_sees_only_what_is_new(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection per step took 0.1 to 0.25 s. Inside the rounds the heap of before is out of its sight."""
    seen = []

    def watched(shape: Any, ragged: bool) -> Inputs:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 10 * len(gc.get_objects())))
        return case.make_inputs(shape, ragged)

    import dataclasses

    run_for(0.1, dataclasses.replace(case, make_inputs=watched), monkeypatch)
    assert len(seen) > 10 and set(seen) == {(False, True)}
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_budget_is_shared_by_the_cases_left(clock: Clock) -> None:
    assert budget.Budget(None).share(4) == budget.SECONDS_PER_CASE
    assert budget.Budget(480.0).share(4) == budget.SECONDS_PER_CASE
    made = budget.Budget(16.0)
    assert made.share(4) == 2.0
    clock.now += 8.0
    assert made.share(4) == 1.0


def test_no_case_starts_that_would_not_fit(clock: Clock) -> None:
    """It is taken to need as long as the one before, and never less than the least."""
    made = budget.Budget(20.0)
    made.took(9.0)
    clock.now += 10.0
    assert made.share(1) == 5.0
    clock.now += 2.0
    assert made.share(1) is None
    made.took(1.0)
    assert made.share(1) == 4.0
    clock.now += 8.0 - budget.LEAST_SECONDS + 0.1
    assert made.share(1) is None


def options(seconds: float | None) -> argparse.Namespace:
    return argparse.Namespace(budget=seconds, providers=["eager", "fastrl"], quick=True)


def test_a_spent_budget_skips_with_a_note(case: Case, clock: Clock) -> None:
    made = budget.Budget(3.0)
    clock.now += 3.1
    found = command._rows(case, options(3.0), {}, made, 4, print)
    assert [r["status"] for r in found] == ["skipped", "skipped"]
    assert all(r["reason"] == "the budget of 3 s was spent" and r["ms"] is None for r in found)


def test_a_case_reports_what_it_took(case: Case, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=clock))
    shares = []

    def run(*arguments: Any) -> list[dict[str, Any]]:
        shares.append(arguments[-1])
        clock.now += 9.0
        return []

    monkeypatch.setattr(runner, "run_case", run)
    made = budget.Budget(20.0)
    assert command._rows(case, options(20.0), {}, made, 2, print) == [] and shares == [5.0]
    assert command._rows(case, options(20.0), {}, made, 1, print) == [] and shares == [5.0, 5.5]
    assert command._rows(case, options(20.0), {}, made, 1, print)[0]["status"] == "skipped"


@pytest.mark.parametrize(("device", "quick", "tries"), [("cpu", False, 10), ("cpu", True, 1), ("cuda", False, 1)])
def test_only_a_cpu_waits_for_quiet(
    device: str, quick: bool, tries: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates of a GPU do not wait for a quiet processor: ten times ten seconds would be a third of the budget."""
    seen = []
    monkeypatch.setattr(command, "undisturbed", lambda measure, tries: (seen.append(tries) or 5.0, False))
    found = command._ceilings([case], device, quick)
    assert seen == [tries] and found == {"copy_gbs": None if tries > 1 else 5.0}


def test_every_target_comes_early() -> None:
    """One case of each before the second of any long one: a budget that ends early leaves no target without."""
    targets = [case.target for case in suites.cases("targets", "cuda", quick=False) if case.least_flops]
    kinds = set(targets)
    assert len(kinds) >= 5 and set(targets[: len(kinds)]) == kinds
