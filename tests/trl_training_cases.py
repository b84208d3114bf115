"""A tiny task that TRL's trainers learn in 50 steps, trained twice from one seed, and what of the two logs differs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
import trl
import trl_common

from fastrl.adapters.trl import GRPOTrainer, RLOOTrainer

STEPS = 50
OURS = {"GRPO": GRPOTrainer, "RLOO": RLOOTrainer}
THEIRS = {"GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}
SETTINGS = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 3e-3, "top_k": 0, "seed": 3}
_CLOCKS = ("time", "runtime", "per_second")


def even_tokens(completion_ids, **_):
    """The share of even ids among the first four."""
    return [sum(i % 2 == 0 for i in ids[:4]) / 4 for ids in completion_ids]


def save_model(path: Any) -> Any:
    """A model on disk, from which a trainer can load its reference."""
    trl_common.model("Qwen2").save_pretrained(path)
    return path


def build(cls: Any, folder: Any, **options: Any) -> Any:
    """A trainer of the task. `lora` trains adapters alone, whose reference is the model without them."""
    policy = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if options.pop("lora", False):
        peft = pytest.importorskip("peft", reason="needs peft")
        targets = ["q_proj", "o_proj", "down_proj"]
        options["peft_config"] = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    return trl_common.trainer(cls, policy, reward=even_tokens, rows=64, **SETTINGS | options)


def train(cls: Any, folder: Any, **options: Any) -> tuple[list[dict], dict]:
    """(what was logged at each step, what an evaluation afterwards logged)."""
    return logged(build(cls, folder, **options))


def logged(it: Any) -> tuple[list[dict], dict]:
    """`train` of a trainer that was built elsewhere."""
    it.train()
    log = [entry for entry in it.state.log_history if "entropy" in entry]
    torch.manual_seed(4)
    it.evaluate()
    return log, it.state.log_history[-1]


def curves(log: list[dict]) -> dict[str, list[float]]:
    """Every number that is logged at each step, but for clocks and fastrl's own."""
    names = [n for n in log[0] if not n.startswith("fastrl/") and not any(clock in n for clock in _CLOCKS)]
    return {name: [float(entry[name]) for entry in log if entry.get(name) is not None] for name in names}


def differing(theirs: list[dict], ours: list[dict], rtol: float = 1e-4) -> dict[str, float]:
    """The curves that differ by more than `rtol` of their largest value, and by how much of it."""
    assert [entry.keys() for entry in theirs] == [
        {key for key in entry if not key.startswith("fastrl/")} for entry in ours
    ]
    found, own = {}, curves(ours)
    for name, values in curves(theirs).items():
        assert len(values) == len(own[name]), name
        scale = max([1e-2, *(abs(value) for value in values if not math.isnan(value))])
        worst = max((abs(a - b) for a, b in zip(values, own[name], strict=True) if not math.isnan(a)), default=0)
        assert [math.isnan(value) for value in values] == [math.isnan(value) for value in own[name]], name
        if worst > rtol * scale:
            found[name] = worst / scale
    return found
