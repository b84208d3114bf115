"""verl's own losses and ours on the same batch: value and gradients. The mapping is in `verl_cases.py`."""

from __future__ import annotations

import pytest
from common import BACKENDS
from parity import peers
from parity.verl_cases import CASES

peers.verl()


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_policy_loss(name, engine):
    case = CASES[name]
    batch = case.make_batch()
    distance = case.ours(batch, engine).distance(case.theirs(batch))
    assert distance <= (case.rtol if engine[0] == "torch" else 2e-5), f"{distance:.3g}"
