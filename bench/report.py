"""What the reader sees: a table per case, the JSON, and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bench.runner import Row


def table(rows: list[Row]) -> Table:
    """One case: a row per provider with a speed; the others, with their reasons, below."""
    shape = rows[0]["shape"]
    slow = [f"{row['provider']} {row['status']}: {row['reason']}" for row in rows if row["ms"] is None]
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
    for name in ("ms", "quartiles", "first ms", "peak MiB", "rate", "of ceiling", "vs eager", "error / bar"):
        made.add_column(name, justify="right")
    for row in rows:
        if row["ms"] is None:
            continue
        ms, rate = row["ms"], row["rate"]
        worst = max(e["error"] / e["bar"] for e in row["errors"].values())
        made.add_row(
            row["provider"],
            f"{ms['median']:.4g}",
            f"{ms['q25']:.4g}-{ms['q75']:.4g}",
            _number(row["first_ms"]),
            _number(row["peak_mib"]),
            f"{rate['value']:.3g} {rate['unit']}",
            "-" if rate["share"] is None else f"{rate['share']:.0%}",
            _ratio(row["vs_eager"]),
            f"{worst:.2f}",
        )
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


def _unsteady(row: Row) -> bool:
    return row["vs_eager"] is not None and not row["vs_eager"]["steady"]


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Bars of time and peak memory, a line of axes per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["case"] for row in rows if row["ms"]))
    if not names:
        return
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 1 + 1.7 * len(names)), squeeze=False, layout="constrained")
    for (left, right), name in zip(axes, names, strict=True):
        shown = [row for row in rows if row["case"] == name and row["ms"]][::-1]
        providers = [row["provider"] for row in shown]
        colors = ["tab:orange" if p.startswith("fastrl") else "tab:gray" for p in providers]
        providers = [p + " (unsteady)" * _unsteady(row) for p, row in zip(providers, shown, strict=True)]
        bars = left.barh(providers, [row["ms"]["median"] for row in shown], color=colors)
        left.bar_label(bars, fmt="%.4g", padding=2, fontsize=8)
        left.set_title(name, fontsize=9, loc="left")
        bars = right.barh(providers, [row["peak_mib"] or 0 for row in shown], color=colors)
        right.bar_label(bars, fmt="%.4g", padding=2, fontsize=8)
        for axis in (left, right):
            axis.margins(x=0.15)
            axis.tick_params(labelsize=8)
    axes[-1][0].set_xlabel("ms, median (less is better)")
    axes[-1][1].set_xlabel("peak memory beyond the inputs, MiB")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
