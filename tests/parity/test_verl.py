"""verl's own losses and ours on the same batch: value and gradients. The mapping is in `verl_cases.py`
and `verl_rollout_cases.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from parity import peers, verl_cases, verl_rollout_cases
from parity.batches import Case, everywhere
from parity.verl_cases import VANILLA, verl_loss

import fastrl

peers.verl()
CASES = verl_cases.CASES | verl_rollout_cases.CASES


@pytest.mark.parametrize(("case", "engine"), everywhere(CASES))
def test_policy_loss(case, engine):
    case.check(engine)


def test_gspo_clamp_differs():
    """verl holds the sequence's log-ratio to at most 10, ours to ±20: log_ratio_clamp=10 is the same above, and holds
    what is below −10 as well."""
    case = CASES["gspo"]
    batch = case.make_batch()
    steep, spec = batch.old.clone(), case.loss_spec()
    steep[1] -= 12  # log s = 11.6 with A < 0: not clipped
    batch = dataclasses.replace(batch, old=steep)
    theirs, ours = case.theirs(batch), case.ours(batch, spec=spec)
    held = case.ours(batch, spec=spec.replace(log_ratio_clamp=10.0))
    assert held.distance(theirs) <= case.rtol
    assert not theirs.dlogps[1].any() and ours.dlogps[1].any()
    assert ours.loss / theirs.loss == pytest.approx(4.8, rel=0.01)  # e^(11.6 − 10)


def test_garbage_under_the_mask_differs():
    """A NaN under verl's mask stays out of its token modes; the modes by sequence multiply it by 0 into the loss."""
    for name, finite in (("vanilla-token-mean", True), ("vanilla-seq-mean-token-sum", False)):
        case = CASES[name]
        batch = case.make_batch()
        batch = dataclasses.replace(batch, old=batch.old.masked_fill(batch.mask == 0, torch.nan))
        assert case.theirs(batch).loss.isfinite() == finite
        assert case.ours(batch).distance(case.expected) <= case.rtol


def test_an_unscored_token_differs():
    """A token without a rollout log-prob: its weight is NaN in verl, 1 with us and in TRL."""
    case = CASES["rollout-token-truncate"]
    batch = dataclasses.replace(case, batch={"nan": True}).make_batch()
    assert case.theirs(batch).loss.isnan()
    filled = torch.where(batch.rollout.isnan(), batch.old, batch.rollout)
    assert case.ours(batch).distance(case.theirs(dataclasses.replace(batch, rollout=filled))) <= case.rtol


def test_the_draw_of_clip_cov_differs():
    """verl draws with the global generator, ours from a seed: as many tokens, of the same candidates."""
    numbers = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.01, "clip_cov_ub": 5.0}
    spec = {"clip_cov_fraction": 0.2, "clip_cov_low": 0.01, "clip_cov_high": 5.0}
    case = Case(verl_loss("clip_cov", **numbers), {"objective": "clip_cov", "seed": 3, "log_ratio_clamp": None, **spec})
    batch = case.make_batch()
    plain = verl_loss("vanilla", clip_ratio_c=1e12)(batch)

    def dropped(result) -> set[int]:
        return set(((result.dlogps == 0) & (plain.dlogps != 0)).flatten().nonzero().flatten().tolist())

    every = dropped(verl_loss("clip_cov", **{**numbers, "clip_cov_ratio": 1.0})(batch))
    draws = [dropped(case.theirs(batch)) for _ in range(5)]
    draws += [dropped(case.ours(batch, spec=case.loss_spec().replace(seed=seed))) for seed in range(5)]
    assert all(len(draw) == int(0.2 * batch.tokens) and draw < every for draw in draws)
    assert len(set(map(frozenset, draws[5:]))) > 1


def test_rejection_in_bypass_mode_differs():
    """verl's bypass PPO rejects by π/π_rollout of the current policy; our rejections are data, by π_old/π_rollout, and
    with old = rollout there is nothing to reject. The same loss is ours with verl's mask."""
    reject = {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.4"}
    case = Case(verl_loss("bypass_mode", rollout_correction={"loss_type": "ppo_clip", **reject}), VANILLA)
    batch = dataclasses.replace(case, batch={"old": "rollout"}).make_batch()
    _, mask, _ = peers.verl().rollout.compute_rollout_correction_and_rejection_mask(
        batch.logps, batch.rollout, batch.mask, **reject
    )
    theirs = case.theirs(batch)
    assert case.ours(dataclasses.replace(batch, tools=mask)).distance(theirs) <= case.rtol
    spec = fastrl.LossSpec(
        **VANILLA,
        rollout=fastrl.RolloutCorrection(level=None, reject="k1", reject_lower=-0.5, rejected_in_denominator=False),
    )
    assert dataclasses.replace(case, sampler=True).ours(batch, spec=spec).distance(theirs) > 0.1
