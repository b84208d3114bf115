"""verl's own plug-in mechanism: an entry point that is found while verl is imported, in a process of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from parity import peers

from fastrl.adapters import verl as adapter
from fastrl.adapters.verl import registry

ROOT = Path(__file__).parents[2]
CODE = """
from parity import peers
with peers._loading():
    import verl
    import sys
    core = sys.modules.get("verl.trainer.ppo.core_algos")
    print(sorted(name for name in core.POLICY_LOSS_REGISTRY if name.startswith("fastrl_")) if core else None)
    print(sorted(name for name in core.ADV_ESTIMATOR_REGISTRY if name.startswith("fastrl_")) if core else None)
    print(core.compute_grpo_outcome_advantage.__module__, core.POLICY_LOSS_REGISTRY["gspo"].__module__)
"""


def imported(path: list[Path], **environment: str) -> subprocess.CompletedProcess:
    places = [ROOT, ROOT / "kernels", ROOT / "tests", *path]
    variables = {"PYTHONPATH": ":".join(map(str, places)), "PATH": "/usr/bin:/bin", "HOME": "/tmp", **environment}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, env=variables)


@pytest.fixture
def entry_point(tmp_path):
    """An installed distribution with the entry point that this library's own declares."""
    if not (peers.FOLDER / "verl").exists():
        pytest.skip("needs verl (`make test` puts it there)")
    info = tmp_path / "plug_in-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nfastrl_test = fastrl.adapters.verl.plugin\n")
    return tmp_path


def test_entry_point(entry_point):
    done = imported([entry_point], VERL_USE_EXTERNAL_PLUGINS="fastrl_test")
    losses, estimators, theirs = done.stdout.splitlines()
    assert theirs.split() == ["verl.trainer.ppo.core_algos"] * 2
    assert losses == str(sorted(adapter.POLICY_LOSSES)) and estimators == str(sorted(adapter.ADVANTAGE_ESTIMATORS))


def test_external_module_stands_in_while_verl_is_imported():
    """By the variable alone, as the page has it: no entry point, no call."""
    if not (peers.FOLDER / "verl").exists():
        pytest.skip("needs verl (`make test` puts it there)")
    given = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "fastrl.adapters.verl.stand_in"}
    done = imported([], **given)
    assert done.stdout.splitlines()[-1].split() == [
        "fastrl.adapters.verl.outcome_advantages",
        "fastrl.adapters.verl.losses",
    ], done.stderr


def test_external_module_stands_in():
    """The module for VERL_USE_EXTERNAL_MODULES, which verl imports."""
    core = peers.verl().core
    theirs = core.compute_gae_advantage_return
    try:
        importlib.import_module("fastrl.adapters.verl.stand_in")
        assert core.POLICY_LOSS_REGISTRY["vanilla"] is adapter.POLICY_LOSSES["fastrl_vanilla"]
        assert core.compute_gae_advantage_return is adapter.ADVANTAGE_ESTIMATORS["fastrl_gae"]
    finally:
        adapter.restore()
    assert core.compute_gae_advantage_return is theirs


def test_a_failure_is_heard(monkeypatch, caplog):
    """verl logs it at debug level only, and training would then end with an unknown loss mode."""

    def fail():
        raise RuntimeError("no registry")

    monkeypatch.setattr(registry, "_core", fail)
    monkeypatch.delitem(sys.modules, "fastrl.adapters.verl.plugin", raising=False)  # verl imports it where installed
    with pytest.raises(RuntimeError, match="no registry"):
        importlib.import_module("fastrl.adapters.verl.plugin")
    assert "could not be registered with verl" in caplog.text and "no registry" in caplog.text
