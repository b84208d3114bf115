"""OpenRLHF's own losses and ours on the same batch: value and gradients. The mapping is in `openrlhf_cases.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from parity import peers
from parity.batches import everywhere
from parity.openrlhf_cases import CASES, SINGLE, openrlhf_loss

peers.openrlhf()


@pytest.mark.parametrize(("case", "engine"), everywhere(CASES))
def test_policy_loss(case, engine):
    case.check(engine)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_weighted_kl_gradient_differs(estimator):
    """With the old log-probs, OpenRLHF's unbiased gradient is min(r, 10)·x at a token; ours, as verl's, is x."""
    case = CASES[f"kl-{estimator}-unbiased-gradient"]
    batch = dataclasses.replace(case, batch={}).make_batch()
    batch = dataclasses.replace(batch, old=torch.where(torch.arange(8) == 0, batch.logps - 3, batch.old))
    quiet = dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages))
    kl = {"kl_estimator": estimator, "unbiased_gradient": True}
    theirs, ours = openrlhf_loss(kl={**kl, "log_probs_old": batch.old})(quiet), case.ours(quiet)
    weight = (batch.logps - batch.old).exp().clamp(max=10)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=SINGLE, atol=SINGLE)
    torch.testing.assert_close(theirs.dlogps, weight * ours.dlogps, rtol=1e-5, atol=1e-7)
    assert weight[batch.mask == 1].max() == 10 and weight[batch.mask == 1].min() < 0.5


def test_garbage_under_the_mask_differs():
    """A NaN under OpenRLHF's mask is multiplied by 0 and makes its loss NaN."""
    case = CASES["ppo"]
    batch = case.make_batch()
    batch = dataclasses.replace(batch, old=batch.old.masked_fill(batch.mask == 0, torch.nan))
    assert case.theirs(batch).loss.isnan() and case.ours(batch).distance(case.expected) <= case.rtol
