"""The gate of the benchmarks: what it calls wrong, and what it must not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="needs rich")

from bench import plain, tokens
from bench.case import Case, Inputs, Provider, Run, Shape
from bench.check import Oracle
from bench.inputs import token_inputs


def at_a_bound(shape: Shape, ragged: bool) -> Inputs:
    """One token whose ratio is the lower bound, to what float32 rounds, and whose advantage is small and negative."""
    inputs = token_inputs(shape, ragged)
    inputs["advantages"][0] = -0.1
    inputs["old"][0, 0] = inputs["logps"][0, 0].detach() + 0.22314355
    return inputs


def loss(shape: Shape, *, shift: float = 0.0, scale: float = 1.0) -> Run:
    """Plain torch. `shift` is what another order of a sum makes of that token's log-prob, `scale` an error."""
    moved = torch.zeros(shape.batch, shape.length)
    moved[0, 0] = shift
    return lambda inputs: {"loss": scale * plain.grpo(inputs["logps"] + moved, inputs)}


def holds(**options: float) -> dict[str, bool]:
    case = Case(
        name="token-policy",
        suite="token",
        shape=Shape(8, 16, vocab=1000),
        make_inputs=at_a_bound,
        providers={"eager": Provider(loss)},
        oracle=tokens._oracle,
    )
    checked = Oracle(case).check(Provider(loss), partial(loss, **options)(case.shape))
    return {name: error.ok for name, error in checked.errors.items()}


@pytest.mark.parametrize("shift", [-2e-6, 2e-6])
def test_a_ratio_at_a_bound_decides_nothing(shift: float) -> None:
    """Rounding puts it on one side or the other, where the gradient is −A·r or 0."""
    assert holds(shift=shift) == {"loss": True, "dlogps": True}


def test_an_error_is_wrong() -> None:
    assert holds(scale=1 + 1e-5) == {"loss": False, "dlogps": False}
