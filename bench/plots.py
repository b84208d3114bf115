"""Plots of a run: time against the floor, peak memory and speed-up per case; peak memory as N and V grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw(path: Path, rows: list[Row], title: str) -> Iterator[Path]:
    """Write NAME.png for the timed cases and NAME-growth.png for the growth curves beside NAME.json; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    made = (
        (path.with_suffix(".png"), _bars([row for row in rows if row["ms"]], title)),
        (path.with_name(f"{path.stem}-growth.png"), _growth([row for row in rows if row["suite"] == "memory"], title)),
    )
    for target, figure in made:
        if figure is not None:
            figure.savefig(target, dpi=120)
            yield target


def floor_ms(rows: list[Row]) -> float | None:
    """Milliseconds that the least bytes or FLOP of a case take at the measured ceiling."""
    return next(
        (row["ms"]["median"] * row["rate"]["share"] for row in rows if row["rate"] and row["rate"]["share"]), None
    )


def _bars(rows: list[Row], title: str) -> Any:
    """A line of three axes per case."""
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["case"] for row in rows))
    if not names:
        return None
    figure, axes = plt.subplots(len(names), 3, figsize=(15, 1 + 1.9 * len(names)), squeeze=False, layout="constrained")
    for line, name in zip(axes, names, strict=True):
        shown = [row for row in rows if row["case"] == name][::-1]
        _bar(line[0], shown, [row["ms"]["median"] for row in shown])
        floor = floor_ms(shown)
        if floor is not None:
            line[0].axvline(floor, color="tab:red", linewidth=1, linestyle="--")
        line[0].set_title(name, fontsize=9, loc="left")
        _bar(line[1], shown, [row["peak_mib"] or 0 for row in shown])
        _bar(line[2], shown, [_speed_up(row) for row in shown])
        line[2].axvline(1, color="tab:gray", linewidth=1)
    axes[-1][0].set_xlabel("ms, median; dashed: the floor at the measured ceiling")
    axes[-1][1].set_xlabel("peak memory beyond the inputs, MiB")
    axes[-1][2].set_xlabel("times as fast as eager; 0: times too scattered")
    figure.suptitle(title)
    return figure


def _bar(axis: Any, rows: list[Row], values: list[float]) -> None:
    bars = axis.barh([row["provider"] for row in rows], values, color=[_color(row["provider"]) for row in rows])
    axis.bar_label(bars, fmt="%.4g", padding=2, fontsize=8)
    axis.margins(x=0.15)
    axis.tick_params(labelsize=8)


def _color(provider: str) -> str:
    return "tab:orange" if provider.startswith("fastrl") else "tab:red" if provider == "floor" else "tab:gray"


def _speed_up(row: Row) -> float:
    found = row["vs_eager"]
    return found["median"] if found and found["steady"] else 0.0


def _growth(rows: list[Row], title: str) -> Any:
    """For each level, peak memory over N at the vocabulary of most sizes, and over V at the number of rows of most."""
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["peak_mib"] is not None]
    levels = list(dict.fromkeys(row["case"].split("-N")[0] for row in rows))
    if not levels:
        return None
    figure, axes = plt.subplots(len(levels), 2, figsize=(11, 4 * len(levels)), squeeze=False, layout="constrained")
    for line, level in zip(axes, levels, strict=True):
        of_level = [row for row in rows if row["case"].split("-N")[0] == level]
        for axis, key, fixed in zip(line, ("rows", "vocab"), ("vocab", "rows"), strict=True):
            at, points = curve(of_level, key, fixed)
            for provider, (x, y) in points.items():
                ours = provider.startswith("fastrl")
                axis.plot(x, y, marker="o", label=provider, linewidth=2.5 if ours else 1)
            axis.set(xscale="log", yscale="log", ylabel="peak memory beyond the inputs, MiB")
            axis.set_xlabel(f"{'N' if key == 'rows' else 'V'}, at {'V' if key == 'rows' else 'N'} = {at}")
            axis.set_title(level, fontsize=9, loc="left")
        line[1].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def curve(rows: list[Row], key: str, fixed: str) -> tuple[int, dict[str, tuple[list[int], list[float]]]]:
    """Peak MiB over `key` by provider, where `fixed` has the value that comes with most different `key`."""
    sizes = {(row["shape"][fixed], row["shape"][key]) for row in rows}
    values = sorted({value for value, _ in sizes})
    at = max(values, key=lambda value: sum(size[0] == value for size in sizes))
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["shape"][key]):
        if row["shape"][fixed] == at:
            x, y = found.setdefault(row["provider"], ([], []))
            x.append(row["shape"][key])
            y.append(row["peak_mib"])
    return at, found
