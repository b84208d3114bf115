"""OpenRLHF's own critic and reward-model trainers with fastrl's `ValueLoss`, `PairWiseLoss` and `LogExpLoss` in place of its:
the same curves of all that they log, and the same weights."""

from __future__ import annotations

import pytest
import torch
from parity import peers

from fastrl.adapters import openrlhf as adapter

peers.openrlhf_trainers()
from parity.openrlhf_values import critic_experience, critic_trainer, reward_trainer  # noqa: E402
from parity.tiny import one_thread  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def pair(build, name):
    """(a trainer with OpenRLHF's loss, one with ours): built by the trainer itself, under `install()`."""
    adapter.restore()
    trainers = [build()]
    adapter.install()
    try:
        trainers.append(build())
    finally:
        adapter.restore()
    modules = [type(getattr(trainer, name)).__module__ for trainer in trainers]
    assert modules == ["openrlhf.models.loss", adapter.__name__]
    return trainers


def same(curves, models):
    for want, got in zip(*curves, strict=True):
        assert want.keys() == got.keys()
        for metric, value in want.items():
            assert float(got[metric]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), metric
    for x, y in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_clip", [0.2, None])
def test_fifty_steps_of_its_critic(value_clip, folder):
    trainers = pair(lambda: critic_trainer(folder, value_clip), "critic_loss_fn")
    batches, curves = [critic_experience(seed) for seed in range(5)], ([], [])
    with one_thread():
        for step in range(50):
            for trainer, curve in zip(trainers, curves, strict=True):
                curve.append(trainer.training_step(batches[step % 5], step))
    same(curves, [trainer.critic for trainer in trainers])
    assert curves[0][0].keys() >= {"critic_loss", "values", "critic_grad_norm"}
    losses = [entry["critic_loss"] for entry in curves[1]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), "it learns"


def test_the_clip_of_the_critic_acts(folder):
    clipped, free = (critic_trainer(folder, clip).training_step(critic_experience(0), 0) for clip in (0.2, None))
    assert clipped["critic_loss"] > 1.01 * free["critic_loss"]


@pytest.mark.parametrize(("loss", "margins"), [("sigmoid", False), ("sigmoid", True), ("logexp", False)])
def test_two_epochs_of_its_reward_model(loss, margins, folder):
    trainers = pair(lambda: reward_trainer(folder, loss, margins), "loss_fn")
    with one_thread():
        for trainer in trainers:
            trainer.fit(trainer.args)
    curves = [trainer.strategy.log for trainer in trainers]
    assert len(curves[0]) == 24
    same(curves, [trainer.model for trainer in trainers])
    losses = [entry["loss"] for entry in curves[1]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), "it learns"
