"""The TRL adapter from hidden states where DeepSpeed's ZeRO-3 holds the head in parts: on a stand-in of such a parameter, and,
where deepspeed is installed, with the real one."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
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

from test_distributed import Partitioned, deepspeed  # noqa: E402, F401 - a fixture
from trl_common import differences, grpo_batch, model, run, trainer  # noqa: E402
from trl_training_cases import differing, save_model  # noqa: E402

from fastrl.adapters.trl import use_fastrl  # noqa: E402


@pytest.fixture
def stand_in(deepspeed):  # noqa: F811 - it is the fixture
    """With what accelerate asks for when it unwraps a model."""
    module = sys.modules["deepspeed"]
    module.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    module.DeepSpeedEngine = type("DeepSpeedEngine", (), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("stand_in")
def test_a_partitioned_head_is_gathered(dtype):
    """Of the dtype of the body, or another, as PEFT keeps a trained copy of the head in float32."""
    policy = model("Phi").to(dtype)
    policy.lm_head.float()
    it = trainer(trl.GRPOTrainer, policy, loss_type="dapo", entropy_coef=0.1)
    inputs = grpo_batch(it)
    theirs = run(it, inputs)
    for name, parameter in list(policy.lm_head.named_parameters()):
        setattr(policy.lm_head, name, Partitioned.of(parameter.detach()))
    use_fastrl(it)
    ours = run(it, inputs)
    assert differences(theirs, ours, rtol=2e-5 if dtype == torch.float32 else 3e-2) == []
    assert ours.gradients["lm_head.weight"].shape == policy.lm_head.weight.ds_shape


def two_processes(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "trl_zero3.py"
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
        env |= {name: str(value) for name, value in place.items()}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_training_with_the_real_one(tmp_path):
    """Two processes, the model partitioned while it is loaded, a reference, a gradient over two micro-batches, an evaluation."""
    save_model(tmp_path / "model")
    logs = {}
    for loss in ("trl", "hidden"):
        two_processes(tmp_path / "model", loss, tmp_path / f"{loss}.json")
        logs[loss] = json.loads((tmp_path / f"{loss}.json").read_text())
    theirs, ours = ([entry for entry in logs[loss] if "entropy" in entry] for loss in ("trl", "hidden"))
    assert len(theirs) == 4 and differing(theirs, ours) == {}
    evaluated, evaluation = ([entry for entry in logs[loss] if "eval_loss" in entry] for loss in ("trl", "hidden"))
    assert (
        len(evaluated) == 1
        and differing(evaluated, [{k: v for k, v in evaluation[0].items() if "fastrl" not in k}]) == {}
    )
