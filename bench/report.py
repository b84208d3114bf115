"""What the reader sees: a table per case, the verdicts on the targets, and the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bench.rows import Row
from bench.targets import Verdict


def table(rows: list[Row]) -> Table:
    """One case: a row per provider with a speed; the others, with their reasons, below."""
    shape = rows[0]["shape"]
    slow = [f"{row['provider']} {row['status']}: {row['reason']}" for row in rows if row["reason"]]
    slow += [f"{row['provider']}: {note}" for row in rows for note in (*row["notes"], *_kernels(row))]
    disturbed = next((row["disturbed_rounds"] for row in rows if row["ms"]), 0)
    if disturbed:
        slow.append(f"rounds dropped because other processes disturbed them: {disturbed}")
    made = Table(
        title=f"{rows[0]['case']}  (B={shape['batch']}, T={shape['length']})",
        title_justify="left",
        caption=escape("\n".join(slow)) or None,
        caption_justify="left",
    )
    made.add_column("provider")
    for name in (
        "ms",
        "quartiles",
        "cold ms",
        "quartiles",
        "wall ms",
        "first ms",
        "peak MiB",
        "rate",
        "of ceiling",
        "vs eager",
        "error / bar",
    ):
        made.add_column(name, justify="right")
    for row in rows:
        if row["reason"] is None:
            made.add_row(row["provider"], *_cells(row))
    return made


def _cells(row: Row) -> list[str]:
    ms, rate = row["ms"], row["rate"]
    speed = ["-", "-"] if ms is None else [f"{ms['median']:.4g}", f"{ms['q25']:.4g}-{ms['q75']:.4g}"]
    reached = ["-", "-"]
    if rate is not None:
        reached = [f"{rate['value']:.3g} {rate['unit']}", "-" if rate["share"] is None else f"{rate['share']:.0%}"]
    worst = "-" if row["errors"] is None else f"{max(e['error'] / e['bar'] for e in row['errors'].values()):.2f}"
    if row["status"] == "approximate":
        worst += " (approximate)"
    cold = row["cold_ms"]
    late = ["-", "-"] if cold is None else [f"{cold['median']:.4g}", f"{cold['q25']:.4g}-{cold['q75']:.4g}"]
    wall = _number((row["wall_ms"] or {}).get("median"))
    others = [wall, _number(row["first_ms"]), _number(row["peak_mib"])]
    return [*speed, *late, *others, *reached, _ratio(row["vs_eager"]), worst]


def _kernels(row: Row) -> Iterator[str]:
    """What the profiler saw of a short case."""
    for key, what in (("forward_kernels", "forward"), ("kernels", "the whole step")):
        found = row[key]
        if found:
            launches = f"{found['launches']} kernels and copies, {found['triton']} of them of Triton"
            yield f"{what} {1e3 * found['ms']:.3g} us in {launches}"


def verdict_table(verdicts: list[Verdict], where: str) -> Table:
    """`where`: what they were measured on."""
    made = Table(title=f"Targets for {where}", title_justify="left")
    for name in ("case", "wanted", "found", "met"):
        made.add_column(name)
    for verdict in verdicts:
        met = {True: "yes", False: "no", None: "-"}[verdict.met]
        made.add_row(verdict.case, verdict.wanted, verdict.found, met, style="yellow" if verdict.met is False else None)
    return made


def _ratio(found: dict[str, Any] | None) -> str:
    """The speed-up with its quartiles, or that the times are too scattered for one."""
    if found is None:
        return "-"
    return f"{found['median']:.2f}x ({found['q25']:.2f}-{found['q75']:.2f})" if found["steady"] else "unsteady"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def write(path: Path, document: dict[str, Any]) -> None:
    """The JSON, replaced as a whole so that an interrupted run leaves a readable one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)
