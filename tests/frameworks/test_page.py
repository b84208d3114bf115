"""The blocks of docs/frameworks.md, as they stand there, with the frameworks' own code or stand-ins around them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from frameworks import real
from frameworks import test_nemo_rl as nemo_rl_cases
from frameworks import test_prime_rl as prime_rl_cases
from frameworks import test_roll as roll_cases
from frameworks import test_slime as slime_cases
from frameworks import test_torchtitan as torchtitan_cases
from frameworks.batches import scored
from frameworks.test_areal_engine import update_batch

PAGE = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}


def fenced(section: str) -> list[tuple[str, str]]:
    """Language and text of each block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", SECTIONS[section], flags=re.S | re.M)


def blocks(section: str, language: str) -> list[str]:
    return [text for name, text in fenced(section) if name == language]


def run(section: str, **namespace: Any) -> dict[str, Any]:
    for block in blocks(section, "python"):
        exec(block, namespace)
    return namespace


def imported(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def module(monkeypatch):
    """Put a stand-in module where the page's code imports it."""

    def add(name: str, **values: Any) -> ModuleType:
        stand_in = ModuleType(name)
        vars(stand_in).update(values)
        monkeypatch.setitem(sys.modules, name, stand_in)
        return stand_in

    return add


def test_every_block_is_run_here():
    """A new block, or one in another language, needs a test."""
    assert {section: [language for language, _ in fenced(section)] for section in SECTIONS} == {
        "torchtitan": ["python"], "SkyRL": ["python", ""], "AReaL": ["python"], "prime-rl": ["toml"],
        "NeMo-RL": ["python"], "slime": [""], "ROLL": ["yaml"],
    }  # fmt: skip


@dataclasses.dataclass
class TrainerConfig:
    loss: Any


@pytest.mark.filterwarnings("ignore")
def test_torchtitan():
    config = run("torchtitan", PolicyTrainer=SimpleNamespace(Config=TrainerConfig))["trainer"].loss
    batch = torchtitan_cases.microbatch()
    loss, _ = torchtitan_cases.call(config.build(), batch, batch.logits, 17)
    torch.testing.assert_close(
        loss, torchtitan_cases.transcribed(batch, batch.logits, 0.2, 0.28, 17), rtol=1e-9, atol=0
    )


@pytest.mark.filterwarnings("ignore")
def test_torchtitans_chunks():
    (expression,) = re.findall(r"`(ChunkedLossWrapper\.Config\([^`]*)`", SECTIONS["torchtitan"])
    from fastrl.adapters.torchtitan import DAPOLoss

    wrapper = real.torchtitan().ChunkedLossWrapper
    config = eval(expression, {"ChunkedLossWrapper": wrapper, "DAPOLoss": DAPOLoss})
    assert config.num_chunks == 8 and isinstance(wrapper(config).loss_fn, DAPOLoss)


def test_skyrl(module):
    table: dict[str, Any] = {}
    registry = SimpleNamespace(register=table.__setitem__)
    module("skyrl.backends.skyrl_train.utils.ppo_utils", PolicyLossRegistry=registry)
    (flag,) = blocks("SkyRL", "")
    name, value = flag.strip().split("=")
    assert name == "trainer.algorithm.policy_loss_type"
    algorithm = {"policy_loss_type": value}
    run("SkyRL", cfg=SimpleNamespace(trainer={"algorithm": algorithm, "fully_async": {"enabled": False}}))
    assert value in table


@pytest.mark.filterwarnings("ignore")
def test_areal(module, monkeypatch):
    """In the launcher AReaL's trainer then takes our class by AReaL's name, in both of its modes."""
    from fastrl.adapters import areal

    theirs = real.areal()
    for name, stand_in in theirs.modules.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    module("areal", engine=module("areal.engine", FSDPPPOActor=theirs.FSDPPPOActor))
    allocation = SimpleNamespace(backend="fsdp", parallel=None)

    def engine(single_controller: bool) -> Any:
        create = theirs.PPOTrainer._create_train_engine
        monkeypatch.setitem(create.__globals__, "is_single_controller", lambda: single_controller)
        return create(SimpleNamespace(scheduler=None), theirs.PPOActorConfig(), allocation)

    try:
        run("AReaL")
        assert engine(single_controller=True).path == "fastrl.adapters.areal.FSDPPPOActor"
        actor = engine(single_controller=False)
        actor.ppo_update([update_batch()])
        data = update_batch()
        assert torch.equal(actor.losses[0], areal.grpo_loss_fn(data["x"], data["x"], data))
    finally:
        areal.__dict__.pop("FSDPPPOActor", None)


def test_prime_rl():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    (text,) = blocks("prime-rl", "toml")
    config = tomllib.loads(text)["trainer"]["loss"]
    assert config["type"] == "custom"
    b = scored()
    out = imported(config["import_path"])(prime_rl_cases.inputs(b, 0, b.logps[0]), **config["kwargs"])
    want = torch.where(b.mask, prime_rl_cases.ipo(b.logps, b, 0.3, 1e4), 0.0)[0].sum()
    torch.testing.assert_close(out.loss, want, rtol=1e-9, atol=0)


def test_nemo_rl():
    fields = {"ratio_clip_max": 0.5, "reference_policy_kl_penalty": 0.0}
    loss_fn = run("NeMo-RL", master_config={"loss_fn": fields})["loss_fn"]
    b = scored()
    data, counts = nemo_rl_cases.data_of(b), (torch.tensor(3.0), torch.tensor(20.0))
    want = nemo_rl_cases.transcribed(fields, b.logps, data, *counts)
    torch.testing.assert_close(loss_fn(b.logps, data, *counts)[0], want, rtol=1e-7, atol=0)


def test_slime():
    (flags,) = blocks("slime", "")
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss-type", choices=["policy_loss", "sft_loss", "custom_loss"])
    parser.add_argument("--custom-loss-function-path")
    args = parser.parse_args(shlex.split(flags))
    assert args.loss_type == "custom_loss"
    batch, logits = slime_cases.batch_of()
    reduce = slime_cases.reducer(batch, False)
    loss, _ = imported(args.custom_loss_function_path)(slime_cases.args_of(**vars(args)), batch, logits, reduce)
    torch.testing.assert_close(loss, slime_cases.transcribed(logits, batch), rtol=1e-9, atol=0)


def test_roll(module):
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    from fastrl.adapters import roll

    class ActorWorker(roll_cases.Worker):
        def initialize(self, pipeline_config):
            self.pipeline_config = pipeline_config

    module("roll.pipeline.rlvr.actor_worker", ActorWorker=ActorWorker)
    (text,) = blocks("ROLL", "yaml")
    try:
        worker = imported(yaml.safe_load(text)["actor_train"]["worker_cls"])({})
        worker.initialize({"pg_clip": 0.1})
        assert isinstance(worker, ActorWorker) and type(worker).loss_func is roll.loss_func
    finally:
        roll.__dict__.pop("ActorWorker", None)
