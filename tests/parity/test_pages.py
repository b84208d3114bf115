"""The code of the pages on verl and OpenRLHF runs as it stands there, against the real packages; Ray alone is stood in for."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
import types

from parity import peers
from parity.verl_cases import config
from test_docs_pages import DOCS, run

from fastrl.adapters import openrlhf
from fastrl.adapters import verl as verl_adapter


def test_verl(capsys):
    verl = peers.verl()
    verl_adapter.register()
    theirs = verl.core.compute_policy_loss_vanilla
    ran = run("verl.md", {"actor_config": config(loss_mode="fastrl_gspo", clip_ratio_low=0.1)})
    assert "'sequence_token'" in capsys.readouterr().out and ran["verl"] is verl_adapter
    assert verl.core.compute_policy_loss_vanilla is theirs, "restored"


def test_the_names_of_the_verl_page_are_registered():
    """Every `fastrl_*` of the page is a loss or an estimator, and every one of those is on it."""
    peers.verl()
    verl_adapter.register()
    named = set(re.findall(r"\bfastrl_\w+", (DOCS / "verl.md").read_text()))
    assert named == {*verl_adapter.POLICY_LOSSES, *verl_adapter.ADVANTAGE_ESTIMATORS}


def test_openrlhf(monkeypatch):
    """`ray.init` gets a hook that Ray imports by its name in each worker; OpenRLHF's script starts with the arguments of
    the command line."""
    trainers, called = peers.openrlhf_trainers(), []
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=lambda **options: called.append(options)))
    monkeypatch.setattr(runpy, "run_module", lambda name, run_name: called.append((name, run_name)))
    ran = run("openrlhf.md", {})
    assert ran["PolicyLoss"] is openrlhf.PolicyLoss and ran["ValueLoss"] is openrlhf.ValueLoss
    (options, (script, run_name)) = called
    assert run_name == "__main__" and (peers.FOLDER / f"{script.replace('.', '/')}.py").exists()
    module, _, name = options["runtime_env"]["worker_process_setup_hook"].rpartition(".")
    theirs = trainers.actor.PolicyLoss
    getattr(importlib.import_module(module), name)()
    try:
        assert trainers.actor.PolicyLoss is trainers.models.PolicyLoss is openrlhf.PolicyLoss
    finally:
        openrlhf.restore()
    assert trainers.actor.PolicyLoss is theirs
