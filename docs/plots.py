"""Curves of every objective: value and gradient of one token's loss against its ratio, and their plots.

The curves come from `fastrl.policy_loss` in float64 and its gradient by autograd, on sequences of one token, where the
ratio of the sequence is that of the token.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fastrl
from fastrl.objectives import OBJECTIVES, bounds
from fastrl.spec import LossSpec

Neighbour = tuple[float, float]  # advantage and log-prob of another token in the batch, on-policy
Table = list[list[float]]  # ratios, values, gradients

STEP = 0.05
COLOURS = {1: "#1f6fb4", -1: "#d1622b"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fastrl",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """One token's loss for A = ±1, among the neighbours that decide whether it is picked."""

    label: str
    spec: LossSpec
    advantages: tuple[int, ...] = (1, -1)
    neighbours: Callable[[int], list[Neighbour]] = lambda advantage: []


@dataclass(frozen=True)
class Plot:
    """What is drawn of an objective."""

    lines: tuple[Line, ...]
    largest: float = 3.0
    old_probability: float = 0.3
    marks: tuple[float, ...] = ()
    """Bounds without a jump of the gradient; those with one are found."""
    note: str = ""


def _spec(objective: str) -> LossSpec:
    """The objective's first preset, summed over tokens so that a token weighs 1."""
    first = next((spec for spec in fastrl.presets.PRESETS.values() if spec.objective == objective), None)
    return (first or LossSpec(objective=objective)).replace(aggregation="token-sum", max_length=None)


def _drawn(advantage: int) -> list[Neighbour]:
    """A neighbour that gives the token a positive covariance, whatever its ratio."""
    return [(1.0, 0.0)] if advantage < 0 else [(-1.0, -10.0)]


def _passed_over(advantage: int) -> list[Neighbour]:
    """Neighbours with a higher covariance than the token."""
    return [(1.0, 0.0), (-1.0, -10.0)]


_DRAWN = "Solid: a token left alone. Dashed: a token drawn, which can only be one that the clip leaves alone."
_PICKED = "Solid: a token left alone. Dashed: a token picked, with `kl_cov_coef=1`."


def _plots() -> dict[str, Plot]:
    plots = {name: Plot((Line("", _spec(name)),)) for name in OBJECTIVES}
    ppo, clip_cov, kl_cov, cispo = (_spec(name) for name in ("ppo_clip", "clip_cov", "kl_cov", "cispo"))
    dual = Line("dual_clip = 2", ppo.replace(dual_clip=2.0), advantages=(-1,))
    plots["ppo_clip"] = Plot((Line("", ppo), dual), note="ε₋ = ε₊ = 0.2.")
    plots["cispo"] = Plot((Line("", cispo),), largest=6.0, old_probability=0.15, marks=(bounds(cispo)[1],))
    everyone = clip_cov.replace(clip_cov_fraction=1.0, clip_cov_low=1e-6, clip_cov_high=100.0)
    plots["clip_cov"] = Plot((Line("", clip_cov), Line("drawn", everyone, neighbours=_drawn)), note=_DRAWN)
    plots["kl_cov"] = Plot((Line("", kl_cov, neighbours=_passed_over), Line("picked", kl_cov)), note=_PICKED)
    return plots


PLOTS = _plots()


def loss_at(line: Line, advantage: int, ratio: float, old_probability: float) -> tuple[float, float]:
    """(ℓ, dℓ/dlog π) of the token at this ratio; its neighbours are in the batch, with weight 0 in the loss."""
    others = line.neighbours(advantage)
    old = math.log(old_probability)
    logps = torch.tensor([[old + math.log(ratio)], *([logp] for _, logp in others)], dtype=torch.float64)
    rollouts = fastrl.Rollouts(
        torch.zeros(logps.shape, dtype=torch.long),
        advantages=torch.tensor([advantage, *(a for a, _ in others)], dtype=torch.float64),
        old_logps=torch.tensor([[old], *([logp] for _, logp in others)], dtype=torch.float64),
        rollout_weights=torch.tensor([[1.0], *([0.0] for _ in others)], dtype=torch.float64),
    )
    logps.requires_grad_()
    loss = fastrl.policy_loss(logps, rollouts, line.spec, backend="torch").loss
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), gradient[0, 0].item()


def _jumps(at: Callable[[float], tuple[float, float]], ratios: list[float]) -> list[float]:
    """Ratios on both sides of every jump of the value or the gradient, less than 1e-6 apart."""

    def apart(a: float, b: float) -> float:
        return max(abs(x - y) for x, y in zip(at(a), at(b), strict=True))

    edges = []
    for low, high in itertools.pairwise(ratios):
        left, right = low, high
        if apart(left, right) < 0.3:
            continue
        while right - left > 1e-6:
            middle = (left + right) / 2
            left, right = (middle, right) if apart(low, middle) < apart(middle, high) else (left, middle)
        if apart(left, right) > 0.1:  # else it was steep, not a jump
            edges += [left, right]
    return edges


def curves(plot: Plot) -> dict[str, Table]:
    """For every line of the plot its ratios, values and gradients."""
    tables = {}
    for line in plot.lines:
        for advantage in line.advantages:

            @functools.cache
            def at(ratio: float, line: Line = line, advantage: int = advantage) -> tuple[float, float]:
                return loss_at(line, advantage, ratio, plot.old_probability)

            grid = [round(i * STEP, 6) for i in range(1, round(plot.largest / STEP) + 1)]
            ratios = sorted(grid + _jumps(at, grid))
            name = f"A = {'+' if advantage > 0 else '−'}1" + f", {line.label}" * bool(line.label)
            tables[name] = [ratios, *(list(column) for column in zip(*map(at, ratios), strict=True))]
    return tables


def _marks(tables: dict[str, Table], plot: Plot) -> list[float]:
    """Where a bound is: the jumps, and what the plot adds."""
    close = [(a + b) / 2 for ratios, *_ in tables.values() for a, b in itertools.pairwise(ratios) if b - a < 1e-5]
    return sorted({round(mark, 4) for mark in (*close, *plot.marks)})


def draw(name: str, tables: dict[str, Table], path: Path) -> None:
    """Write the plot as SVG, the same bytes on every run with the same matplotlib."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.7), layout="constrained")
        panels = figure.subplots(1, 2)
        titles = ("loss ℓ", "gradient dℓ / d log π")
        for panel, title, column in zip(panels, titles, (1, 2), strict=True):
            _panel(panel, tables, _marks(tables, PLOTS[name]), column)
            panel.set_title(title, fontsize=9)
            panel.set_xlabel("ratio r")
        panels[0].legend(fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panel(panel: Axes, tables: dict[str, Table], marks: list[float], column: int) -> None:
    panel.axhline(0, color="#999999", linewidth=0.6)
    panel.axvline(1, color="#cccccc", linewidth=0.6, linestyle=":")
    for mark in marks:
        panel.axvline(mark, color="#cccccc", linewidth=0.8)
    for label, table in tables.items():
        style = "--" if "," in label else "-"
        colour = COLOURS[1 if "+" in label else -1]
        panel.plot(table[0], table[column], style, color=colour, linewidth=1.4, label=label)
    largest = max(abs(v) for table in tables.values() for r, v in zip(table[0], table[column], strict=True) if r > 0.2)
    panel.set_ylim(-1.15 * largest, 1.15 * largest)
