"""OpenRLHF's own losses and ours on the same batch: value and gradients. The mapping is in `openrlhf_cases.py`."""

from __future__ import annotations

import pytest
from common import BACKENDS
from parity import peers
from parity.openrlhf_cases import CASES

peers.openrlhf()


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_policy_loss(name, engine):
    case = CASES[name]
    batch = case.make_batch()
    distance = case.ours(batch, engine).distance(case.theirs(batch))
    assert distance <= max(case.rtol, 0 if engine[0] == "torch" else 2e-5), f"{distance:.3g}"
