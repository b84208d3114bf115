"""Every provider against a float64 oracle, before anything is timed: values and every gradient.

error = max|x − exact|. The bar is twice the error of plain torch in the same dtype plus a small absolute term:
4 (half precision: 1) units of the result's last place at the largest magnitude. For the loss that magnitude is taken
as 1, the size of the terms it is a mean of; they cancel, and its own size says nothing about their rounding.

At a bound of the clip the gradient jumps, and there rounding decides. So in float32 the check's batch has no ratio
within MARGIN of one: the old log-probs of such tokens are moved. In half precision plain torch errs there by itself.
"""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import Case, Inputs, Provider, Run, leaves, step
from bench.plain import EPSILON

CPU_BUDGET = 512 * 2**20
"""Bytes of float64 logits in a check on the CPU; an accelerator gives a sixteenth of its memory."""
ROWS_WITHOUT_VOCABULARY = 2**20
MARGIN, SHIFT = 1e-4, 0.05
"""Of ratios, above what float32 rounds (2e-5 in log-probs of peaked rows); and by how much the log of one is moved."""


class Error(NamedTuple):
    error: float
    """max|x − exact|."""
    bar: float
    relative: float
    """‖x − exact‖ / ‖exact‖; for an approximate provider the figure that means something."""

    @property
    def ok(self) -> bool:
        return self.error <= self.bar  # False for NaN


class Checked(NamedTuple):
    errors: dict[str, Error]
    measured: dict[str, float]
    """0-d outputs that plain torch has not, such as what a sparse gradient leaves out."""


def results(run: Run, inputs: Inputs) -> Inputs:
    """Outputs and, as "d" + name, the gradients of all leaves."""
    outputs = {name: value.detach() for name, value in step(run, inputs).items()}
    for name, leaf in leaves(inputs).items():
        if leaf.grad is None:
            raise RuntimeError(f"no gradient for {name}")
        outputs[f"d{name}"] = leaf.grad
    return outputs


class Oracle:
    """The exact results of a case on (possibly) fewer rows, and the error bars that follow."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.shape = case.shape.with_rows(_row_limit(case)) if case.check_rows else case.shape
        self._shift: Tensor | float = 0.0
        self._exact = self._solve()
        if "ratio" in self._exact and self.shape.dtype == "fp32":
            self._shift = _from_the_bounds(self._exact["ratio"])
            self._exact = self._solve()
        self._bars = self._baseline()
        gc.collect()

    def _inputs(self) -> Inputs:
        inputs = self._case.make_inputs(self.shape, True)
        return inputs | {name: value - self._shift for name, value in inputs.items() if name == "old"}

    def _solve(self) -> Inputs:
        return results(self._case.oracle, {name: _doubled(value) for name, value in self._inputs().items()})

    def _baseline(self) -> dict[str, float]:
        """2·(error of plain torch) + absolute term, per result."""
        eager = self._case.providers["eager"].load(self.shape)
        found = results(eager, self._inputs())
        return {name: 2 * self._error(name, x)[0] + self._absolute(name, x.dtype) for name, x in found.items()}

    def _error(self, name: str, x: Tensor) -> tuple[float, float]:
        """The largest, and the norm of all over that of the exact result."""
        exact = self._exact[name]
        # A provider may have been given more positions than count: they come last in each dimension.
        off = x[tuple(slice(0, size) for size in exact.shape)].double() - exact
        return off.abs().max().item(), (off.norm() / exact.norm()).item()

    def _absolute(self, name: str, dtype: torch.dtype) -> float:
        size = 1.0 if name == "loss" else self._exact[name].abs().max().item()
        return (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps * size

    def check(self, provider: Provider, run: Run) -> Checked:
        """The errors of a provider, by result, and what else it says of them."""
        inputs = provider.prepare(self._inputs())
        found = results(run, inputs)
        errors = {}
        for name, bar in self._bars.items():
            error, relative = self._error(name, found[name])
            errors[name] = Error(error, bar, relative)
        measured = {name: x.item() for name, x in found.items() if name not in self._bars and x.dim() == 0}
        del inputs, found
        gc.collect()
        return Checked(errors, measured)


def _from_the_bounds(ratio: Tensor) -> Tensor:
    """What the log of each ratio is to be moved by."""
    near = ((ratio - (1 - EPSILON)).abs() < MARGIN) | ((ratio - (1 + EPSILON)).abs() < MARGIN)
    return SHIFT * near.float()


def _row_limit(case: Case) -> int:
    """How many rows the oracle's memory allows."""
    if not case.shape.vocab or case.suite == "token":
        return ROWS_WITHOUT_VOCABULARY
    budget = CPU_BUDGET
    if case.shape.device != "cpu":
        budget = torch.cuda.get_device_properties(0).total_memory // 16
    return budget // (8 * case.shape.vocab)


def _doubled(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
