"""What is measured beside the time: memory, kernels, a first call. If one fails, the others and the time stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from bench import kernels, memory
from bench.case import Case, Run
from bench.rows import Row, Say, free_memory, named


def take(case: Case, rows: dict[str, Row], runs: dict[str, Run], quick: bool, say: Say) -> None:
    """Fill the rows; what failed becomes a note, and a failure where there is nothing else to measure."""
    for name, run in runs.items():
        row = rows[name]
        for what, measure in measures(case, name, run, quick):
            say(f"{case.name}: {what} of {name}")
            try:
                row |= measure()
            except Exception as error:  # out of memory, a profiler that is not allowed, a child process that died
                row["notes"].append(f"no {what}, {named(error)}")
                if case.memory_only:
                    row |= {"status": "failed", "reason": named(error)}
                free_memory(row)


def measures(case: Case, name: str, run: Run, quick: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(what, how to take it). Kernels and the first call are fastrl's only: a loop over T has 70,000 kernels."""
    provider = case.providers[name]
    if case.shape.device == "cpu":
        if not provider.floor:  # a fresh process for what nobody compares with
            yield "memory", partial(memory.in_fresh_process, case, name, quick)
        return
    yield "memory", lambda: {"peak_mib": memory.gpu_peak(case, provider, run)}
    if name != "fastrl":
        return
    if case.short:
        yield "kernels", lambda: {"kernels": kernels.of_step(case, provider, run)}
        yield "forward kernels", lambda: {"forward_kernels": kernels.of_forward(case, provider, run)}
    if case.first_call:
        yield "first call", partial(memory.first_call, case, name, quick)
