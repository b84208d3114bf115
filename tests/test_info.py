"""`info()` and `python -m fastrl`; what the logger `fastrl` says, once per reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fastrl
from fastrl import __main__ as command
from fastrl import backend


@pytest.fixture
def fresh_warnings():
    backend._warn_fallback.cache_clear()
    yield
    backend._warn_fallback.cache_clear()


def test_info_names_versions_devices_and_reasons(caplog):
    found = fastrl.info()
    assert set(found) == {"versions", "location", "platform", "devices", "environment", "backends"}
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"] == sys.version.split()[0]
    assert {"triton", "transformers", "trl", "verl", "openrlhf", "kernels"} <= set(found["versions"])
    assert (
        "cpu" in found["devices"]
        and found["backends"]["cpu float32"] == "torch: tensors are on cpu, not on an accelerator"
    )
    assert json.loads(json.dumps(found)) == found
    assert not caplog.records


def test_a_fallback_is_logged_once_per_reason(fresh_warnings, caplog, monkeypatch):
    device = torch.device("cuda")
    backend.choose(device, torch.float64, warn=False)
    assert not caplog.records
    for _ in range(3):
        assert backend.choose(device, torch.float64).name == "torch"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    for _ in range(3):
        assert backend.choose(device, torch.float32) == ("torch", "triton not installed")
    assert [(record.name, record.levelname) for record in caplog.records] == 2 * [("fastrl", "WARNING")]
    assert "float64" in caplog.messages[0] and "triton not installed" in caplog.messages[1]
    backend.choose(torch.device("cpu"), torch.float32)
    backend.choose(device, torch.float32, "torch")
    assert len(caplog.records) == 2


def test_the_command_prints_what_info_says(capsys):
    command.main(["--json"])
    assert json.loads(capsys.readouterr().out) == fastrl.info()
    command.main([])
    printed = capsys.readouterr().out
    for part in ("versions:", "devices:", "backends:", torch.__version__, "not set", "tensors are on cpu"):
        assert part in printed
    missing = {"versions": {"a": None, "bcd": "1.0"}, "location": "here", "environment": {"X": None}}
    assert (
        command.text(missing)
        == "versions:\n  a    not installed\n  bcd  1.0\nlocation: here\nenvironment:\n  X  not set"
    )


@pytest.mark.slow
def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "fastrl", "--json"], capture_output=True, text=True, check=True)
    assert "backends" in json.loads(done.stdout) and done.stderr == ""
