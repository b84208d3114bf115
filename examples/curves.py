"""The plot that the examples of training loops share."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(runs: dict[str, list[dict[str, float]]], titles: dict[str, str], path: Path, heading: str) -> None:
    """One panel per title, a curve of each run in it, smoothed over ten steps; written to `path`."""
    columns = -(-len(titles) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 6), sharex=True, layout="constrained")
    for axis, (key, title) in zip(axes.flat, titles.items(), strict=False):
        for style, (name, log) in zip(("-", "--"), runs.items(), strict=False):
            values = [entry[key] for entry in log]
            smooth = [
                sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(len(values))
            ]
            axis.plot(smooth, style, label=name, linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("batch of rollouts")
    axes.flat[0].legend()
    figure.suptitle(heading)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"curves: {path}")


def rose(log: list[dict[str, float]], by: float = 0.3) -> bool:
    """Print the mean reward of the first and the last ten batches; whether it rose by so much."""
    before, after = (sum(entry["reward"] for entry in part) / len(part) for part in (log[:10], log[-10:]))
    print(f"reward {before:.3f} before, {after:.3f} after {len(log)} batches of rollouts")
    return after > before + by
