"""Our loss reaches the process in which AReaL calls it: its own actor, engine and controller classes around it."""

from __future__ import annotations

import functools
import logging
import sys

import pytest
import torch
from frameworks import real
from frameworks.batches import scored
from frameworks.test_areal import packed

from fastrl.adapters import areal

pytestmark = pytest.mark.filterwarnings("ignore")  # AReaL's own


@pytest.fixture
def theirs(monkeypatch):
    """AReaL's modules, as far as they are needed; what is built of them is forgotten afterwards."""
    found = real.areal()
    for name, module in found.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield found
    areal.__dict__.pop("FSDPPPOActor", None)


def update_batch():
    """A batch as ppo_update gets it; the log-probs of the policy are in it."""
    data, logps = packed(scored(seed=1))
    shape = data["loss_mask"].shape
    more = dict.fromkeys(("attention_mask", "rewards", "kl_rewards", "tot_rewards"), torch.ones(shape))
    return {**data, **more, "loss_mask": data["loss_mask"].bool(), "x": logps}


def test_in_the_worker(theirs):
    """AReaL's PPOActor takes our loss from our engine, with its arguments, and its own again afterwards."""
    config = theirs.PPOActorConfig(use_decoupled_loss=True, eps_clip=0.1)
    engine = areal.FSDPPPOActor(config)
    engine.ppo_update([update_batch()])
    assert theirs.modules["areal.trainer.ppo.actor"].grpo_loss_fn is theirs.grpo_loss_fn
    own = theirs.FSDPPPOActor(config)
    own.ppo_update([update_batch()])
    assert type(own) is not type(engine) and issubclass(type(engine), type(own))
    data = update_batch()
    want = areal.grpo_loss_fn(data["x"], data["x"], data, eps_clip=0.1, use_decoupled_loss=True)
    assert torch.equal(engine.losses[0], want)
    torch.testing.assert_close(own.losses[0], want, rtol=1e-9, atol=0)


def test_a_worker_finds_our_engine(theirs):
    """The controller sends the path of the class, and the worker, another process, imports it."""
    ours = areal.FSDPPPOActor
    controller = ours.as_controller(theirs.PPOActorConfig(), scheduler=None)
    assert controller.path == "fastrl.adapters.areal.FSDPPPOActor"
    del areal.__dict__["FSDPPPOActor"]
    in_worker = theirs.import_from_string(controller.path)
    assert in_worker is not ours and in_worker.ppo_update is not theirs.FSDPPPOActor.ppo_update
    in_worker(theirs.PPOActorConfig()).ppo_update([update_batch()])  # with our loss, as test_in_the_worker shows


def test_a_config_is_checked_before_training(theirs):
    """In the launcher, and where the engine is built."""
    config = theirs.PPOActorConfig(prox_logp_method="loglinear")
    with pytest.raises(ValueError, match="^use_cispo_loss: "):  # of a newer AReaL
        areal.FSDPPPOActor({"use_cispo_loss": True})
    in_launcher = functools.partial(areal.FSDPPPOActor.as_controller, scheduler=None)
    for build in (in_launcher, areal.FSDPPPOActor):
        with pytest.raises(ValueError, match="^prox_logp_method: "):
            build(config)


def test_the_loss_is_put_back_after_an_error(theirs):
    engine = areal.FSDPPPOActor(theirs.PPOActorConfig())
    with pytest.raises(ValueError, match="^teacher_logp: "):
        engine.ppo_update([{**update_batch(), "teacher_logp": torch.zeros(3)}])
    assert theirs.modules["areal.trainer.ppo.actor"].grpo_loss_fn is theirs.grpo_loss_fn


@pytest.mark.parametrize(("name", "module"), areal.ENGINES.items())
def test_every_engine_of_areal(name, module):
    """Named as AReaL's trainer names it, defined where AReaL defines it."""
    real.need("areal")
    source = (real.FOLDER / module.replace(".", "/")).with_suffix(".py").read_text()
    assert (
        f"class {name}(" in source and f"import {name}\n" in (real.FOLDER / "areal/trainer/rl_trainer.py").read_text()
    )


def test_no_other_engine():
    with pytest.raises(AttributeError, match="CriticEngine"):
        areal.CriticEngine  # noqa: B018


def test_the_first_call_is_logged(caplog):
    """Once in a process: without it, another loss is what trains."""
    areal._started.cache_clear()
    data, logps = packed(scored())
    with caplog.at_level(logging.INFO, logger="fastrl"):
        for _ in range(2):
            areal.grpo_loss_fn(logps, logps, data)
    assert [r.getMessage().split(" of ")[0] for r in caplog.records if r.levelno == logging.INFO] == [
        "fastrl.adapters.areal.grpo_loss_fn is the loss"
    ]
