"""Which way the steps A, B, C are taken: one function of the spec, that can say why."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from fastrl.spec import LossSpec


class PlanKind(str, Enum):
    FUSED = "fused"
    """One kernel takes A, B's derivative and C."""
    ROWS = "rows"
    """A, B, C one after the other, on any grouping of rows."""
    SEQUENCES = "sequences"
    """A, B, C one after the other, on groups of whole sequences."""
    BATCH = "batch"
    """A over all rows, then B, then C over all rows."""


class Plan(NamedTuple):
    kind: PlanKind
    why: str


def plan(spec: LossSpec, fuses_objectives: bool) -> Plan:
    """The plan for a spec on a backend that has, or has not, the one-pass kernel."""
    if spec.by_batch:
        return Plan(PlanKind.BATCH, "a token's coefficient depends on the entropies or log-probs of the whole batch")
    if spec.by_sequence:
        return Plan(PlanKind.SEQUENCES, "a token's coefficient depends on its whole sequence")
    if spec.is_custom:
        return Plan(PlanKind.ROWS, "the objective is a Python function, which runs in torch between the two row passes")
    if not fuses_objectives:
        return Plan(PlanKind.ROWS, "the torch backend has no one-pass kernel")
    return Plan(PlanKind.FUSED, "a token's coefficient depends on its own row alone")
