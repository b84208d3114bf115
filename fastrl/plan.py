"""Which way the steps A, B, C are taken: one function of the spec, that can say why."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from fastrl.spec import LossSpec, RatioLevel


class PlanKind(str, Enum):
    FUSED = "fused"
    """One kernel takes A, B's derivative and C."""
    ROWS = "rows"
    """A, B, C one after the other, on any grouping of rows."""
    SEQUENCES = "sequences"
    """A, B, C one after the other, on groups of whole sequences."""


class Plan(NamedTuple):
    kind: PlanKind
    why: str


def plan(spec: LossSpec, fuses_objectives: bool) -> Plan:
    """The plan for a spec on a backend that has, or has not, the one-pass kernel."""
    if spec.ratio_level == RatioLevel.SEQUENCE:
        return Plan(PlanKind.SEQUENCES, "a token's coefficient depends on its whole sequence (ratio_level='sequence')")
    if spec.is_custom:
        return Plan(PlanKind.ROWS, "the objective is a Python function, which runs in torch between the two row passes")
    if not fuses_objectives:
        return Plan(PlanKind.ROWS, "the torch backend has no one-pass kernel")
    return Plan(PlanKind.FUSED, "a token's coefficient depends on its own row alone")
