"""A provider's row in the JSON: what it holds, and how its figures follow from the rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.case import Case, Run, Unavailable

STEADY = 1.5
"""A provider whose quartiles are further apart than this factor has no speed-up worth printing."""
UNQUIET = "none, too few were quiet"
"""Instead of the number of dropped rounds, where all of them were kept although others disturbed them."""

Row = dict[str, Any]
Say = Callable[[str], None]
"""How the long-running parts tell what they are at."""


def new(case: Case, name: str) -> Row:
    return {
        "case": case.name,
        "suite": case.suite,
        "target": case.target,
        "shape": dataclasses.asdict(case.shape) | {"rows": case.shape.rows},
        "provider": name,
        "status": "ok",
        "reason": None,
        "notes": [],
        "errors": None,
        "checked_rows": None,
        "measured": None,
        "ms": None,
        "cold_ms": None,
        "wall_ms": None,
        "kernels": None,
        "forward_kernels": None,
        "first_ms": None,
        "peak_mib": None,
        "first_peak_mib": None,
        "rate": None,
        "vs_eager": None,
        "disturbed_rounds": None,
    }


def skipped(case: Case, names: list[str], reason: str) -> list[Row]:
    """The rows of a case that was not run at all."""
    return [new(case, name) | {"status": "skipped", "reason": reason} for name in names if name in case.providers]


@contextlib.contextmanager
def reason_for_failure(row: Row, runs: dict[str, Run]) -> Iterator[None]:
    """If the block fails, note why in the row and leave the provider out from then on."""
    try:
        yield
    except Unavailable as error:
        row |= {"status": "unavailable", "reason": tidy(str(error))}
        runs.pop(row["provider"], None)
    except Exception as error:  # other people's code may raise anything, and the other providers must still run
        row |= {"status": "failed", "reason": named(error)}
        runs.pop(row["provider"], None)
        free_memory(row)


def free_memory(row: Row) -> None:
    """After a failure, typically for want of it. After an illegal access every call of the driver fails, this one as
    well: the row says why already, and must still be written."""
    if row["shape"]["device"] != "cpu":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def named(error: Exception) -> str:
    return tidy(f"{type(error).__name__}: {error}")


def tidy(message: str) -> str:
    """The first line of a message, without paths."""
    first = (message.strip().splitlines() or [""])[0]
    return re.sub(r"(?:/[\w.+-]+){2,}", "...", first)[:300]


def speed(case: Case, times: list[float], ceilings: dict[str, float | None]) -> Row:
    """Median, spread, and the share of the ceiling that the least possible bytes or FLOP make of it."""
    ms = spread(times)
    median = ms["median"]
    if case.least_flops is not None:
        flops = case.least_flops(case.shape)
        achieved, ceiling, unit = flops / median / 1e9, ceilings[f"gemm_{case.shape.dtype}_tflops"], "TFLOP/s"
        rate = {"least_flops": flops}
    else:
        assert case.least_bytes is not None
        moved = case.least_bytes(case.shape)
        achieved, ceiling, unit = moved / median / 1e6, ceilings["copy_gbs"], "GB/s"
        rate = {"least_bytes": moved}
    rate |= {"value": achieved, "unit": unit, "ceiling": ceiling, "share": achieved / ceiling if ceiling else None}
    return {"ms": ms, "rate": rate}


def spread(times: list[float]) -> Row:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "q25": low, "q75": high, "min": min(times), "max": max(times), "samples": times}


def steady(row: Row) -> bool:
    """Whether a provider's times are worth a figure: by its own spread, whatever became of the others."""
    ms = row["ms"]
    return bool(ms) and row["disturbed_rounds"] != UNQUIET and ms["q75"] <= STEADY * ms["q25"]


def against_eager(rows: dict[str, Row], name: str) -> Row | None:
    """eager / provider, round by round, so that slow phases of the machine cancel: median and quartiles. `steady` is
    False where other processes disturbed the rounds or either one's times are too scattered for a ratio."""
    eager = rows.get("eager")
    if eager is None or not eager["ms"]:
        return None
    pairs = zip(eager["ms"]["samples"], rows[name]["ms"]["samples"], strict=True)
    low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    return {"median": median, "q25": low, "q75": high, "steady": steady(eager) and steady(rows[name])}
