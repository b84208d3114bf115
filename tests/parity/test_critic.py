"""The losses of a critic and of a reward model: the peers' own and ours, value and gradients."""

from __future__ import annotations

import pytest
import torch
from parity import peers
from parity.batches import B, T, make_batch
from torch import Tensor

import fastrl

LENGTH = 3e-8
"""verl and OpenRLHF add 1e-8 to the length of a sequence before dividing by it."""


def scene() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, values at sampling time, returns and a mask with holes and an empty row."""
    g = torch.Generator().manual_seed(5)
    values, old, returns = (torch.randn(B, T, generator=g).double() for _ in range(3))
    return values, old, returns, make_batch().mask


def same(ours, theirs, values: Tensor, mask: Tensor, rtol: float) -> None:
    """The loss and its derivative by the values, `ours` with garbage under the mask."""
    leaf, garbage = values.clone().requires_grad_(), torch.where(mask.bool(), values, torch.nan).requires_grad_()
    want, got = theirs(leaf), ours(garbage)
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)
    gradients = torch.autograd.grad(got, garbage)[0], torch.autograd.grad(want, leaf)[0]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean", "token-sum"]
)
def test_value_loss_of_verl(aggregation, ranks):
    values, old, returns, mask = scene()
    counts = {} if ranks == 1 else {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 11}
    options = {"max_length": T} if aggregation.endswith("norm") else {}
    if ranks == 2:
        if aggregation == "token-sum":  # has no denominator
            return
        options["normalizer"] = (61 if aggregation == "token-mean" else 11) / 2

    def theirs(v: Tensor) -> Tensor:
        return peers.verl().core.compute_value_loss(v, returns, old, mask, 0.5, loss_agg_mode=aggregation, **counts)[0]

    def ours(v: Tensor) -> Tensor:
        return fastrl.value_loss(v, returns, old_values=old, clip=0.5, mask=mask, aggregation=aggregation, **options)

    same(ours, theirs, values, mask, LENGTH if aggregation == "seq-mean-token-mean" else 1e-12)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("by_token", [True, False])
def test_value_loss_of_openrlhf(by_token, clip):
    values, old, returns, mask = scene()
    theirs = peers.openrlhf().loss.ValueLoss(clip, token_level_loss=by_token)
    clipping = {} if clip is None else {"old_values": old, "clip": clip}
    aggregation = "token-mean" if by_token else "seq-mean-token-mean"

    def ours(v: Tensor) -> Tensor:
        return fastrl.value_loss(v, returns, mask=mask, aggregation=aggregation, **clipping)

    same(ours, lambda v: theirs(v, old, returns, mask), values, mask, 1e-12 if by_token else LENGTH)


def test_value_clip_fraction():
    values, old, returns, mask = scene()
    _, theirs = peers.verl().core.compute_value_loss(values, returns, old, mask, 0.5)
    ours = fastrl.value_metrics(values, returns, old_values=old, clip=0.5, mask=mask)["value_clip_fraction"]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6) and 0 < ours < 1


@pytest.mark.parametrize("margin", [None, 0.4])
def test_pairwise_loss_of_openrlhf(margin):
    values = scene()[0]
    chosen, rejected = values[:, 0], values[:, 1]
    margins = None if margin is None else torch.linspace(0, margin, B).double()
    every = torch.ones(2, B)

    def theirs(pair: Tensor) -> Tensor:
        return peers.openrlhf().loss.PairWiseLoss()(*pair, margins)

    def ours(pair: Tensor) -> Tensor:
        return fastrl.reward_model_loss(*pair, margin=margins)

    same(ours, theirs, torch.stack([chosen, rejected]), every, 1e-12)


def test_log_exp_loss_of_openrlhf_differs():
    """The same number by log(1 + eˣ), which overflows where ours is finite."""
    pair = scene()[0][:2, :6]
    theirs = peers.openrlhf().loss.LogExpLoss()
    same(lambda x: fastrl.reward_model_loss(*x), lambda x: theirs(*x), pair, torch.ones(2, 6), 1e-10)
    far = torch.tensor([-400.0]), torch.tensor([400.0])
    assert theirs(*far) == torch.inf
    assert fastrl.reward_model_loss(*far) == 800
