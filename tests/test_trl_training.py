"""Training with TRL's trainers: the curves of TRL's loss and of ours are the same, and two processes are one."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
transformers = pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

import trl_common  # noqa: E402

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
    settings = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3, "top_k": 0, "seed": 3}
    it = trl_common.trainer(cls, policy, reward=even_tokens, rows=64, **settings | options)
    it.train()
    return [entry for entry in it.state.log_history if "entropy" in entry]


@pytest.mark.parametrize("name", RUNS)
def test_same_curves(name, folder):
    kind, options = RUNS[name]
    theirs, ours = train(THEIRS[kind], folder, **options), train(OURS[kind], folder, **options)
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
