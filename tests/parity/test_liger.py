"""Liger's own Triton loss and ours on the same logits: value and gradients. The mapping is in `liger_cases.py`."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS

pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")

from parity.batches import LENGTHS, B, T
from parity.liger_cases import CASES, FromLogits, liger_loss


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_loss(name, engine):
    case = CASES[name]
    batch = case.make_batch()
    distance = case.ours(batch, engine).distance(case.theirs(batch))
    assert distance <= (case.rtol if engine[0] == "torch" else 2e-5), f"{distance:.3g}"


def test_luspo_differs():
    """Liger's "luspo" is mean over B·T of length·ℓ; TRL's and ours is mean over B of Σ ℓ: length/T per sequence."""
    spec = {"aggregation": "seq-mean-token-sum", "log_ratio_clamp": None}
    case = FromLogits(liger_loss(loss_type="luspo"), spec, normalizer=lambda _: B, batch={"tools": False})
    batch = case.make_batch()
    ours, theirs = case.ours(batch), case.theirs(batch)
    share = torch.tensor(LENGTHS).double()[:, None, None] / T
    torch.testing.assert_close(theirs.dlogps, ours.dlogps * share, rtol=1e-5, atol=1e-7)
    assert ours.distance(theirs) > 0.1
