"""What is collected: `pytest -m gpu` runs everything that runs on a GPU, and other packages' warnings end no session."""

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


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Another session, whose plugins may lie in `folder`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)


def test_what_runs_on_the_accelerator_is_chosen_by_its_gpu(tmp_path: Path) -> None:
    """Collected by a process that believes it has one."""
    (tmp_path / "pretend_gpu.py").write_text("import torch\n\ntorch.cuda.is_available = lambda: True\n")
    files = [str(TESTS / name) for name in ("test_schedules.py", "test_token_metrics.py")]
    done = pytest_in(tmp_path, "-p", "pretend_gpu", "--collect-only", "-m", "gpu", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_scoring[17]", "test_one_pass_loss[tiles-grpo]", "test_tickets_on_a_gpu", "[triton-grpo]"):
        assert name in done.stdout
    names = [line for line in done.stdout.splitlines() if "::" in line]
    tickets = [name for name in names if "tickets" in name]
    assert len(tickets) == 6 and names[-6:] == tickets  # a hang can lose no other result
    assert "[torch-cuda-grpo]" in done.stdout
    assert "[torch-grpo]" not in done.stdout and "test_row_configurations" not in done.stdout


def test_a_warning_of_an_import_is_shown_and_that_of_a_test_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("import warnings\n\nwarnings.warn('of theirs', FutureWarning)\n")
    text = "import theirs\n\n\ndef test_one():\n    pass\n\n\ndef test_two():\n    theirs.warnings.warn('of a test')\n"
    (tmp_path / "test_it.py").write_text(text)
    settings = ("-c", str(TESTS.parent / "pyproject.toml"), "-p", "conftest")
    done = pytest_in(tmp_path, *settings, str(tmp_path / "test_it.py"))
    assert "1 failed, 1 passed, 1 warning" in done.stdout, done.stdout + done.stderr
    assert "FutureWarning: of theirs" in done.stdout and "UserWarning: of a test" in done.stdout
