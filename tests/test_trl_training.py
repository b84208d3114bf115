"""Training with TRL's trainers: a compiled backbone changes nothing, and two processes are one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

import trl_common  # noqa: E402
import trl_two_processes  # noqa: E402
from trl_training_cases import save_model, train  # noqa: E402

from fastrl.adapters.trl import GRPOTrainer  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("level", "backend"), [("hidden", "eager"), ("logits", "eager"), ("hidden", "inductor")])
def test_under_torch_compile(level, backend, folder):
    """The backbone is one graph, compiled once, and the curve stays."""
    options = {"max_steps": 8, "num_iterations": 2, "level": level}
    eager, _ = train(GRPOTrainer, folder, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, _ = train(GRPOTrainer, folder, torch_compile=True, torch_compile_backend=backend, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for a, b in zip(eager, compiled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4, abs=1e-6)
        assert b["fastrl/ratio_max"] == pytest.approx(a["fastrl/ratio_max"], rel=1e-4)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """(findings, gradients and metrics) of both ranks, over gloo on the CPU."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "trl_two_processes.py"
    paths = os.pathsep.join(map(str, (script.parent, script.parents[1], script.parents[1] / "kernels")))
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}}
        command = [sys.executable, "-W", "ignore", str(script), str(folder)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_train_as_with_trls_loss(two_processes):
    for findings, _ in two_processes:
        assert findings == {name: [] for name in findings} and len(findings) == 3 * len(trl_two_processes.OPTIONS) + 2


@pytest.mark.parametrize("name", trl_two_processes.INDEPENDENT)
def test_two_processes_are_one(name, two_processes):
    """The averaged gradient, and the metrics, are those of one process on the whole batch."""
    (_, ranks), (_, others) = two_processes
    it = trl_two_processes.build(name)
    _, whole = trl_common.both(it, trl_two_processes.batch(name, it))
    gradients, metrics = ranks[name]
    scale = max(g.abs().max() for g in whole.gradients.values())
    for parameter, gradient in whole.gradients.items():
        assert (gradients[parameter] - gradient).abs().max() <= 2e-5 * scale, parameter
        assert torch.equal(gradients[parameter], others[name][0][parameter])
    for metric, value in whole.metrics.items():
        assert metrics[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
