"""Plots of a run: time against the floor, peak memory and speed-up per case; memory and time as N, V and H grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw(path: Path, rows: list[Row], title: str) -> Iterator[Path]:
    """Write NAME.png for the timed cases and NAME-growth.png for curves over sizes beside NAME.json; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    made = (
        (path.with_suffix(".png"), _bars([row for row in rows if row["ms"]], title)),
        (path.with_name(f"{path.stem}-growth.png"), _growth(rows, title)),
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


VALUES = {"peak_mib": "peak memory beyond the inputs, MiB", "ms": "ms, median"}
AXES = {"rows": "N", "vocab": "V", "hidden": "H"}


def _growth(rows: list[Row], title: str) -> Any:
    """Memory and time of each level over N, V and H, one of them at a time, wherever there are three sizes."""
    from matplotlib import pyplot as plt

    panels = list(growth_panels(rows))
    if not panels:
        return None
    lines = -(-len(panels) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(15, 4 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (level, value, key, at, points) in zip(axes.flat, panels, strict=False):
        for provider, (x, y) in points.items():
            axis.plot(x, y, marker="o", label=provider, linewidth=2.5 if provider.startswith("fastrl") else 1)
        axis.set(xscale="log", yscale="log", ylabel=VALUES[value])
        fixed = ", ".join(f"{AXES[name]} = {size}" for name, size in at.items() if size)
        axis.set_xlabel(f"{AXES[key]}, at {fixed}")
        axis.set_title(level, fontsize=9, loc="left")
        axis.legend(fontsize=8)
    figure.suptitle(title)
    return figure


Points = dict[str, tuple[list[int], list[float]]]


def growth_panels(rows: list[Row]) -> Iterator[tuple[str, str, str, dict[str, int], Points]]:
    """(level, value, key, sizes that stay, points by provider) of every curve with three points."""
    for level in dict.fromkeys(_level(row) for row in rows):
        of_level = [row for row in rows if _level(row) == level]
        for value in VALUES:
            for key in AXES:
                at, points = curve(of_level, key, value)
                points = {provider: xy for provider, xy in points.items() if len(xy[0]) >= 3}
                if points:
                    yield level, value, key, at, points


def _level(row: Row) -> str:
    return row["case"].split("-N")[0]


def curve(rows: list[Row], key: str, value: str = "peak_mib") -> tuple[dict[str, int], Points]:
    """A value over one size by provider, where the other sizes have the values that come with most different ones."""
    fixed = [name for name in AXES if name != key]
    measured = [row for row in rows if row[value] is not None]
    sizes: dict[tuple[int, ...], set[int]] = {}
    for row in measured:
        sizes.setdefault(tuple(row["shape"].get(name, 0) for name in fixed), set()).add(row["shape"].get(key, 0))
    if not sizes:
        return {}, {}
    at = max(sorted(sizes), key=lambda others: len(sizes[others]))
    found: Points = {}
    for row in sorted(measured, key=lambda row: row["shape"].get(key, 0)):
        if tuple(row["shape"].get(name, 0) for name in fixed) == at:
            x, y = found.setdefault(row["provider"], ([], []))
            x.append(row["shape"].get(key, 0))
            y.append(row[value] if value == "peak_mib" else row[value]["median"])
    return dict(zip(fixed, at, strict=True)), found
