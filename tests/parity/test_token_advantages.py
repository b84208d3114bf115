"""Advantages and returns per token: verl's own estimators and ours on the same rewards, values and holes."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS
from parity import peers
from parity.batches import B, T, make_batch
from parity.test_advantages import GROUPS, REWARDS, close
from torch import Tensor

import fastrl

WHITENED = 3e-8
"""verl's masked mean divides by n + 1e-8."""
ALONE = 5


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Token rewards and values, finite everywhere, and a mask with holes."""
    g = torch.Generator().manual_seed(3)
    rewards = torch.randn(B, T, generator=g).double()
    values = torch.randn(B, T, generator=g).double()
    return rewards, values, make_batch(empty=False).mask


def ours(x: Tensor, mask: Tensor, engine: tuple[str, str] = ("torch", "cpu")) -> Tensor:
    """With garbage under the mask, in the engine's dtype."""
    dtype = torch.float64 if engine[0] == "torch" else torch.float32
    return torch.where(mask.bool(), x, torch.nan).to(engine[1], dtype)


def estimator(name: str):
    return peers.verl().core.get_adv_estimator_fn(name)


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0)])
def test_gae(gamma, lam, engine):
    """verl hands out values also under the mask: the whitened carry, and that carry plus V."""
    rewards, values, mask = scene()
    advantages, returns = estimator("gae")(rewards, values, mask, gamma, lam)
    options = {"mask": mask.to(engine[1]), "gamma": gamma, "lam": lam, "whiten": True, "backend": engine[0]}
    got = fastrl.gae(ours(rewards, mask, engine), ours(values, mask, engine), **options)
    rtol = WHITENED if engine[0] == "torch" else 1e-5
    close(got[0].cpu(), advantages * mask, rtol)
    close(got[1].cpu(), returns * mask, rtol)
    assert (advantages * (1 - mask)).abs().max() > 0.1 and not got[0].cpu()[mask == 0].any()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(gamma):
    rewards, _, mask = scene()
    config = peers.verl().algorithm.AlgoConfig(gamma=gamma)
    advantages, returns = estimator("reinforce_plus_plus")(rewards, mask, config=config)
    close(fastrl.reinforce_plus_plus_advantages(ours(rewards, mask), mask=mask, gamma=gamma), advantages, WHITENED)
    close(fastrl.discounted_returns(ours(rewards, mask), mask=mask, gamma=gamma), returns)


def test_reinforce_plus_plus_baseline():
    """But for the group of one: verl whitens its reward, with us it is 0. Its whitened mean and std are the batch's,
    that reward included, so the others are compared without it."""
    mask = make_batch(empty=False).mask
    rewards, rows = REWARDS[:, 0], slice(0, ALONE)
    placed = rewards[:, None] * (torch.arange(T) == 0)
    theirs, _ = estimator("reinforce_plus_plus_baseline")(placed[rows], mask[rows], index=GROUPS[rows].numpy())
    options = {"mask": mask[rows], "group_ids": GROUPS[rows]}
    close(fastrl.reinforce_plus_plus_baseline_advantages(rewards[rows], **options), theirs, WHITENED)
    theirs, _ = estimator("reinforce_plus_plus_baseline")(placed, mask, index=GROUPS.numpy())
    got = fastrl.reinforce_plus_plus_baseline_advantages(rewards, mask=mask, group_ids=GROUPS)
    assert not got[ALONE].any() and theirs[ALONE, 0] < -0.5


def test_remax():
    """verl's return also stands under the mask."""
    rewards, _, mask = scene()
    greedy = REWARDS[:, 1]
    theirs, _ = estimator("remax")(rewards, greedy, mask)
    close(fastrl.remax_advantages(ours(rewards, mask), greedy, mask=mask), theirs * mask)
    assert (theirs * (1 - mask)).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_optimal_token_baseline(name, tail, weighted):
    """A group of one keeps its return in verl and is 0 with us. By position, verl finds the tail of the longest answer
    by the number of its valid tokens, which with holes is not where it stands: compared without holes. A tail without
    the rule is 0 with us, and G·1e-8/W in verl."""
    rewards, _, mask = scene()
    if name == "optimal_token_baseline":
        mask = make_batch(empty=False, tools=False).mask
    batch = make_batch(empty=False)
    squares = (2 * batch.old).exp() + 0.1
    weights = (batch.old - batch.rollout).exp().clamp(max=2) if weighted else None
    theirs, _ = estimator(name)(
        rewards, mask, GROUPS.numpy(), batch.old, squares, rollout_is_weights=weights, handle_zero_tail=tail
    )
    got = fastrl.optimal_token_baseline_advantages(
        ours(rewards, mask),
        ours(batch.old, mask),
        ours(squares, mask),
        mask=mask,
        group_ids=GROUPS,
        rollout_weights=None if weights is None else ours(weights, mask),
        align="position" if name == "optimal_token_baseline" else "token",
        keep_tail=tail,
    )
    close(got[:ALONE], theirs[:ALONE], 1e-10 if tail else 3e-8)
    returns = fastrl.discounted_returns(rewards, mask=mask)
    assert not got[ALONE].any()
    close(theirs[ALONE], returns[ALONE])


def test_kl_controller():
    controllers = peers.verl().core.AdaptiveKLController(0.2, 6.0, 100), fastrl.AdaptiveKLController(0.2, 6.0, 100)
    for kl in (1.0, 6.5, 40.0, 5.9):
        controllers[0].update(kl, 16)
        controllers[1].update(kl, 16)
        assert controllers[1].value == pytest.approx(controllers[0].value, rel=1e-12)
