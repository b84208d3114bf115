"""Training with TRL's trainers: the curves of TRL's loss and of ours are the same, and two processes are one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
transformers = pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

import trl_common  # noqa: E402
import trl_two_processes  # noqa: E402

from fastrl.adapters.trl import GRPOTrainer, RLOOTrainer  # noqa: E402

STEPS = 50
RUNS = {
    "dapo-kl-entropy": (
        "GRPO",
        {
            "beta": 0.05,
            "num_iterations": 2,
            "gradient_accumulation_steps": 2,
            "use_adaptive_entropy": True,
            "entropy_coef": 0.02,
            "entropy_target": 2.5,
        },
    ),
    "gspo-old-samples": (
        "GRPO",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 3, "epsilon": 0.02},
    ),
    "lora-kl": ("GRPO", {"beta": 0.05, "num_iterations": 2, "learning_rate": 3e-2, "lora": True}),
    "rloo": ("RLOO", {"beta": 0.05, "num_iterations": 2}),
}
OURS = {"GRPO": GRPOTrainer, "RLOO": RLOOTrainer}
THEIRS = {"GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}
CURVES = (
    "loss",
    "grad_norm",
    "reward",
    "entropy",
    "kl",
    "policy_loss",
    "entropy_coef",
    "clip_ratio/region_mean",
    "clip_ratio/high_max",
)


def even_tokens(completion_ids, **_):
    """The share of even ids among the first four."""
    return [sum(i % 2 == 0 for i in ids[:4]) / 4 for ids in completion_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model on disk, from which a trainer can load its reference."""
    path = tmp_path_factory.mktemp("model")
    trl_common.model("Qwen2").save_pretrained(path)
    return path


def train(cls, folder, **options):
    policy = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if options.pop("lora", False):  # whose reference is the model without its adapter
        peft = pytest.importorskip("peft", reason="needs peft")
        targets = ["q_proj", "o_proj", "down_proj"]
        options["peft_config"] = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    settings = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3, "top_k": 0, "seed": 3}
    it = trl_common.trainer(cls, policy, reward=even_tokens, rows=64, **settings | options)
    it.train()
    log = [entry for entry in it.state.log_history if "entropy" in entry]
    torch.manual_seed(4)
    it.evaluate()
    return log, it.state.log_history[-1]


@pytest.mark.parametrize("name", RUNS)
def test_same_curves(name, folder):
    kind, options = RUNS[name]
    theirs, evaluated = train(THEIRS[kind], folder, **options)
    ours, evaluation = train(OURS[kind], folder, **options)
    assert len(theirs) == len(ours) == STEPS
    assert [entry.keys() for entry in theirs] == [
        {key for key in entry if not key.startswith("fastrl/")} for entry in ours
    ]
    for curve in CURVES:
        pairs = [(a[curve], b[curve]) for a, b in zip(theirs, ours, strict=True) if curve in a]
        scale = max((abs(a) for a, _ in pairs), default=0)
        worst = max((abs(a - b) for a, b in pairs), default=0)
        assert worst <= 1e-4 * max(scale, 1e-2), (curve, worst, scale)
    assert max(entry["clip_ratio/region_mean"] for entry in ours) > 0.01
    rewards = [entry["reward"] for entry in ours if "reward" in entry]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5, "the task is learnt"
    for metric in ("eval_loss", "eval_entropy", "eval_reward", *(["eval_kl"] if "eval_kl" in evaluated else [])):
        assert evaluation[metric] == pytest.approx(evaluated[metric], rel=1e-4, abs=1e-6), metric


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_under_torch_compile(level, folder):
    """The backbone is one graph, compiled once, and the curve stays."""
    options = {"max_steps": 8, "num_iterations": 2, "level": level}
    eager, _ = train(GRPOTrainer, folder, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, _ = train(GRPOTrainer, folder, torch_compile=True, torch_compile_backend="eager", **options)
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
