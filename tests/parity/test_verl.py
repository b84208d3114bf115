"""verl's own losses and ours on the same batch: value and gradients. The mapping is in `verl_cases.py`."""

from __future__ import annotations

import pytest
from parity import peers
from parity.batches import everywhere
from parity.verl_cases import CASES

peers.verl()


@pytest.mark.parametrize(("case", "engine"), everywhere(CASES))
def test_policy_loss(case, engine):
    case.check(engine)
