"""OpenRLHF's own trainers with fastrl's losses in place of its: the names that they read, and fifty steps of its actor."""

from __future__ import annotations

import pytest
import torch
from parity import peers

from fastrl.adapters import openrlhf as adapter

peers.openrlhf_trainers()
from parity.openrlhf_trainer import actor_trainer, experience  # noqa: E402
from parity.tiny import one_thread  # noqa: E402


def test_install_and_restore():
    """Names in `openrlhf.models` and in the trainers that imported them before; twice is as once."""
    trainers = peers.openrlhf_trainers()
    places = [
        (trainers.models, ("PolicyLoss", "ValueLoss", "PairWiseLoss", "LogExpLoss")),
        (trainers.models.loss, ("PolicyLoss", "ValueLoss", "PairWiseLoss", "LogExpLoss")),
        (trainers.actor, ("PolicyLoss",)),
        (trainers.critic, ("ValueLoss",)),
        (trainers.reward, ("PairWiseLoss", "LogExpLoss")),
    ]
    before = [dict(vars(module)) for module, _ in places]
    adapter.install()
    adapter.install()
    for module, names in places:
        assert all(getattr(module, name) is getattr(adapter, name) for name in names)
    adapter.restore()
    adapter.restore()
    assert before == [dict(vars(module)) for module, _ in places]


TRAINED = {
    "ppo": {},
    "ppo-token-mask": {"level": "token"},
    "ppo-seq-tv": {"level": "seq", "gating": "tv", "threshold": [0.0, 0.05], "loss_agg_mode": "seq-mean-token-mean"},
    "gspo-rollout": {"policy_loss_type": "gspo", "level": "token", "eps_clip_low_high": (0.02, 0.03)},
}


@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_of_its_own_trainer(name):
    """`ActorPPOTrainer.training_step` from the same weights, with OpenRLHF's loss and with ours: the same curves of all
    that it logs, and the same weights."""
    adapter.restore()
    trainers = [actor_trainer(**TRAINED[name])]
    adapter.install()
    try:
        trainers.append(actor_trainer(**TRAINED[name]))
    finally:
        adapter.restore()
    assert [type(trainer.actor_loss_fn).__module__ for trainer in trainers] == [
        "openrlhf.models.loss",
        adapter.__name__,
    ]
    batches, curves = [experience(seed) for seed in range(5)], ([], [])
    with one_thread():
        for step in range(50):
            for trainer, curve in zip(trainers, curves, strict=True):
                curve.append(trainer.training_step(batches[step % 5], 0.1, step)["metrics"])
    assert curves[0][0]["policy_loss"] != curves[0][-1]["policy_loss"]
    for want, got in zip(*curves, strict=True):
        assert want.keys() == got.keys() >= {"policy_loss", "ppo_clip_ratio", "ppo_kl", "kl", "actor_grad_norm"}
        for metric, value in want.items():
            assert float(got[metric]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), metric
    weights = ([p.detach() for p in trainer.actor.parameters()] for trainer in trainers)
    for x, y in zip(*weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
