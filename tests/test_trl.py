"""The TRL adapter: the same scored batch through TRL's own loss and ours, on one real trainer, gives the same loss, the
same gradient in every parameter and the same metrics, over the product of TRL's options."""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

import trl_common  # noqa: E402
from trl_common import B, T, both, differences, run, scored_batch  # noqa: E402

from fastrl.adapters.trl import use_fastrl  # noqa: E402

AXES = {
    "loss_type": ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"],
    "importance_sampling_level": ["token", "sequence"],
    "clip": ["0.2", "higher", "delta"],
    "kl": ["none", "plain", "bias-corrected"],
    "entropy": ["none", "static", "adaptive", "adaptive-off"],
    "top_entropy_quantile": [1.0, 0.4],
    "off_policy_mask_threshold": [None, 0.1],
    "correction": ["none", "token", "sequence", "masked"],
    "sampled": [False, True],
    "tools": [False, True],
    "old": [True, False],
    "accumulation": [(1, 1), (4, 2), (3, 3)],
    "advantages": ["(B,)", "(B, 1)", "(B, T)"],
    "train": [True, False],
}
DRAWS = 120  # per loss type


def draws(loss_type: str) -> list[dict]:
    """Points of the product, the same on every run."""
    chosen, axes = random.Random(loss_type), {**AXES, "loss_type": [loss_type]}
    return [{name: chosen.choice(values) for name, values in axes.items()} for _ in range(DRAWS)]


def test_every_pair_of_options_is_drawn():
    points = [point for loss_type in AXES["loss_type"] for point in draws(loss_type)]
    for one, two in itertools.combinations(AXES, 2):
        seen = {(point[one], point[two]) for point in points}
        assert seen == set(itertools.product(AXES[one], AXES[two])), (one, two)


@functools.cache
def trainer():
    return trl_common.trainer(trl.GRPOTrainer, trl_common.model())


@functools.cache
def batch():
    return scored_batch(trainer())


def configure(it, point):
    """Set the options of a point where TRL's loss reads them."""
    loss_type = point["loss_type"]
    it.loss_type, it.importance_sampling_level = loss_type, point["importance_sampling_level"]
    it.epsilon_low = 0.2
    it.epsilon_high = {"cispo": 1.1}.get(loss_type, 0.2) if point["clip"] != "higher" else 0.4
    it.args.delta = 1.45 if point["clip"] == "delta" else None
    it.beta, it.args.use_bias_correction_kl = 0.3 * (point["kl"] != "none"), point["kl"] == "bias-corrected"
    it.entropy_coef = 0.2 * (point["entropy"] != "none")
    it.use_adaptive_entropy = point["entropy"].startswith("adaptive")
    it._entropy_bonus_enabled = it.entropy_coef != 0 or it.use_adaptive_entropy
    it.args.entropy_target = 2.0
    it._last_world_entropy = 3.0 if point["entropy"] == "adaptive-off" else 1.0
    it._entropy_window_stats = torch.tensor([3.0, 2.0]) if point["tools"] else None
    it.top_entropy_quantile = point["top_entropy_quantile"]
    it.off_policy_mask_threshold = point["off_policy_mask_threshold"]
    it.use_vllm = it.vllm_importance_sampling_correction = point["correction"] != "none"
    it.current_gradient_accumulation_steps, it.args.steps_per_generation = point["accumulation"]
    it.args.sapo_temperature_neg, it.args.vespo_k_pos = 1.25, 1.5


def inputs_of(point):
    """The scored batch with what the point has of it."""
    inputs = {name: value for name, value in batch().items() if name != "old_logps"}
    counts = inputs["completion_mask"] * (inputs["tool_mask"] if point["tools"] else 1)
    ratio = inputs.pop("importance_sampling_ratio").masked_fill(counts == 0, 1.0)  # as TRL takes it
    if point["correction"] == "sequence" and point["loss_type"] != "vespo":  # which TRL refuses
        ratio = ratio.prod(-1, keepdim=True)
    elif point["correction"] == "masked":
        ratio = ratio.masked_fill(ratio > 1.2, 0.0)
    if point["correction"] != "none":
        inputs["importance_sampling_ratio"] = ratio
    for name, axis in {"sampling_per_token_logps": "sampled", "tool_mask": "tools", "old_per_token_logps": "old"}.items():
        if not point[axis]:
            del inputs[name]
    if point["kl"] == "none":
        del inputs["ref_per_token_logps"]
    if point["advantages"] != "(B,)":
        inputs["advantages"] = inputs["advantages"][:, None]
    if point["advantages"] == "(B, T)":
        inputs["advantages"] = inputs["advantages"] * torch.linspace(-0.6, 1.0, T)
    return inputs


@pytest.mark.parametrize("loss_type", AXES["loss_type"])
def test_same_batch_same_loss(loss_type):
    it, wrong = trainer(), {}
    for index, point in enumerate(draws(loss_type)):
        configure(it, point)
        found = differences(*both(it, inputs_of(point), point["train"], level="logits" if index % 6 == 0 else "hidden"))
        if found:
            wrong[str(point)] = found
    assert not wrong, wrong
