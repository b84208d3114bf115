"""TRL's own `_compute_loss` and ours on the same batch: value and gradients. The mapping is in `trl_cases.py`."""

from __future__ import annotations

import pytest
from common import BACKENDS

pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("datasets", reason="needs datasets")

from parity.trl_cases import CASES


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_loss(name, engine):
    case = CASES[name]
    batch = case.make_batch()
    distance = case.ours(batch, engine).distance(case.theirs(batch))
    assert distance <= (case.rtol if engine[0] == "torch" else 2e-5), f"{distance:.3g}"
