"""`pytest -m gpu` runs everything that runs on a GPU, the kernels first of all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from common import ACCELERATOR

TESTS = Path(__file__).parent


def test_every_case_of_triton_is_marked(request: pytest.FixtureRequest) -> None:
    """Among what this session collected."""
    unmarked = [
        item.nodeid
        for item in request.session.items
        if ("triton", ACCELERATOR) in getattr(getattr(item, "callspec", None), "params", {}).values()
        and item.get_closest_marker("accelerator") is None
    ]
    assert not unmarked


def test_what_runs_on_the_accelerator_is_chosen_by_its_gpu(tmp_path: Path) -> None:
    """Collected by a process that believes it has one."""
    (tmp_path / "pretend_gpu.py").write_text("import torch\n\ntorch.cuda.is_available = lambda: True\n")
    command = [sys.executable, "-m", "pytest", "-p", "pretend_gpu", "-p", "no:cacheprovider", "--collect-only", "-q"]
    command += ["-m", "gpu", str(TESTS / "test_schedules.py"), str(TESTS / "test_token_metrics.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_scoring[17]", "test_one_pass_loss[tiles-grpo]", "test_tickets_on_a_gpu", "[triton-grpo]"):
        assert name in done.stdout
    assert "[torch-cuda-grpo]" in done.stdout
    assert "[torch-grpo]" not in done.stdout and "test_row_configurations" not in done.stdout
