"""Liger's own Triton loss and ours on the same logits: value and gradients. The mapping is in `liger_cases.py`."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")

from parity.batches import LENGTHS, B, T, everywhere
from parity.liger_cases import CASES, SINGLE, FromLogits, is_representative, liger_loss


@pytest.mark.parametrize(
    ("case", "engine"),
    everywhere(CASES, is_representative),
)
def test_loss(case, engine):
    case.check(engine)


def test_luspo_differs():
    """Liger's "luspo" is the mean over B·T of length·ℓ; TRL's and ours is the mean over B of Σ ℓ. So each sequence
    weighs length/T of ours; but its backward reads a (B, 1) weight as if it were (B, T): token t of sequence i gets the
    weight of sequence i + t."""
    spec = {"aggregation": "seq-mean-token-sum", "log_ratio_clamp": None}
    case = FromLogits(liger_loss(loss_type="luspo"), spec, normalizer=lambda _: B, batch={"tools": False})
    batch = case.make_batch()
    share = torch.tensor(LENGTHS).double() / T
    scaled = case.ours(dataclasses.replace(batch, advantages=batch.advantages * share))
    ours, theirs = case.ours(batch), case.theirs(batch)
    torch.testing.assert_close(theirs.loss.cpu().double(), scaled.loss, rtol=SINGLE, atol=0)
    assert abs(theirs.loss / ours.loss - 1) > 0.5
    assert scaled.distance(theirs) > 0.1  # the gradient of that loss is another
    taken = torch.tensor(LENGTHS).clamp(min=1).double() / T
    for i, t in itertools.product(range(B), range(T)):
        if i + t < B:
            torch.testing.assert_close(theirs.dlogps[i, t], ours.dlogps[i, t] * taken[i + t], rtol=1e-5, atol=1e-7)
