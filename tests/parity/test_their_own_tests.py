"""The peers' own tests of their losses, with fastrl's in place of theirs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from parity import peers

ROOT = Path(__file__).parents[2]
VERL = [
    f"tests/trainer/ppo/test_{name}.py"
    for name in (
        "core_algos_on_cpu", "reinforce_pp_multiturn_on_cpu", "loss_aggregation_on_cpu", "dynamic_policy_losses_on_cpu",
        "rollout_corr", "rollout_corr_integration",
    )
]  # fmt: skip
OPENRLHF = ["tests/test_loss_aggregation.py"]
CALLED = {
    "verl": {"fastrl_vanilla", "fastrl_dro", "fastrl_grpo", "fastrl_rloo", "fastrl_gae", "fastrl_reinforce_plus_plus"},
    "openrlhf": {"PolicyLoss"},
}


@pytest.mark.parametrize(("package", "files", "number"), [("verl", VERL, 66), ("openrlhf", OPENRLHF, 14)])
def test_pass_with_ours(package, files, number):
    missing = [name for name in [package, *files] if not (peers.FOLDER / name).exists()]
    if missing:
        pytest.skip(f"needs {missing[0]} in {peers.FOLDER} (`make test` puts it there)")
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "parity.standing_in", *files],
        cwd=peers.FOLDER,
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{number} passed" in done.stdout
    called = set(re.search(r"CALLS (.*)", done.stdout)[1].split())
    assert called >= CALLED[package]
