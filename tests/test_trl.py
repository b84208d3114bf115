"""The TRL adapter: the same scored batch through TRL's own loss and ours, on one real trainer, gives the same loss, the
same gradient in every parameter and the same metrics, over the product of TRL's options.

The product has 165,888 points per loss type. A run takes some of them, the same ones every time; `FASTRL_TRL_POINTS=n` takes n
per loss type in an order that is the same for every n, `FASTRL_TRL_POINTS=all` the whole product (hours), for instance

    FASTRL_TRL_POINTS=4000 python -m pytest tests/test_trl.py -k same_batch -n 2
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
from collections.abc import Iterator

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
POINTS = os.environ.get("FASTRL_TRL_POINTS", "160")  # per loss type
LEVELS = {0: "logits", 4: "logprobs"}  # of every eighth draw; hidden states for the others


def draws(loss_type: str) -> Iterator[dict]:
    """Points of the product, none twice, the same on every run."""
    axes = {**AXES, "loss_type": [loss_type]}
    size = math.prod(map(len, axes.values()))
    order = list(range(size))
    random.Random(loss_type).shuffle(order)
    for place in order[: size if POINTS == "all" else int(POINTS)]:
        point = {}
        for name, values in axes.items():
            place, index = divmod(place, len(values))
            point[name] = values[index]
        yield point


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
    for name, axis in {
        "sampling_per_token_logps": "sampled",
        "tool_mask": "tools",
        "old_per_token_logps": "old",
    }.items():
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
        found = differences(*both(it, inputs_of(point), point["train"], level=LEVELS.get(index % 8, "hidden")))
        if found:
            wrong[str(point)] = found
    assert not wrong, wrong


EVERYTHING = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "clip": "delta",
    "kl": "bias-corrected",
    "entropy": "static",
    "top_entropy_quantile": 0.7,
    "off_policy_mask_threshold": 0.05,
    "correction": "token",
    "sampled": True,
    "tools": True,
    "old": True,
    "accumulation": (4, 2),
    "advantages": "(B, T)",
    "train": True,
}
SPECS = {  # what an adapter could forget
    "delta": {"delta": None},
    "kl": {"kl_coef": 0.0, "kl_gradient": "plain"},
    "bias-correction": {"kl_gradient": "plain"},
    "entropy": {"entropy_coef": 0.0, "entropy_aggregation": None},
    "entropy-aggregation": {"entropy_aggregation": None},
    "quantile": {"top_entropy_quantile": 1.0},
    "off-policy": {"off_policy_threshold": None},
    "level": {"ratio_level": "sequence"},
    "clip": {"epsilon_high": 0.3},
}


@pytest.mark.parametrize("forgotten", [*SPECS, "normalizer", "tool_mask", "importance_sampling_ratio", "nothing"])
def test_the_comparison_sees_an_option_that_is_forgotten(forgotten, monkeypatch):
    from fastrl.adapters.trl import batch as adapter
    from fastrl.adapters.trl import config

    it = trainer()
    configure(it, EVERYTHING)
    if forgotten in SPECS:
        mapped = config.grpo_spec
        monkeypatch.setattr(config, "grpo_spec", lambda options: mapped(options).replace(**SPECS[forgotten]))
    elif forgotten == "normalizer":
        monkeypatch.setattr(adapter, "normalizer", lambda *_: None)
    elif forgotten != "nothing":
        taken = adapter.rollouts_from_batch
        without = {"tool_mask": None} if forgotten == "tool_mask" else {"importance_sampling_ratio": torch.ones(B, T)}
        monkeypatch.setattr(adapter, "rollouts_from_batch", lambda inputs, **kw: taken({**inputs, **without}, **kw))
    found = differences(*both(it, inputs_of(EVERYTHING)))
    assert bool(found) == (forgotten != "nothing"), found


@functools.cache
def rloo():
    return trl_common.trainer(trl.RLOOTrainer, trl_common.model(), gradient_accumulation_steps=2)


@pytest.mark.parametrize("level", ["hidden", "logits"])
@pytest.mark.parametrize("epsilon", [(0.2, 0.2), (0.1, 0.9), (1.5, 0.05)])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_rloo(epsilon, train, level):
    """One ratio for a completion, the product over its tokens; empty completions add their −A."""
    it = rloo()
    it.epsilon_low, it.epsilon_high = epsilon
    inputs = scored_batch(it)
    names = ("tool_mask", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    inputs = {name: value for name, value in inputs.items() if name not in (*names, "importance_sampling_ratio")}
    assert differences(*both(it, inputs, train, level)) == []


def test_rloo_keeps_the_sum_of_long_completions():
    """The share of a token is rounded, their sum is not: with 5,000 tokens the ratio keeps six digits."""
    from fastrl.adapters.trl import rloo_rollouts_from_batch

    g, n = torch.Generator().manual_seed(0), 5000
    old = -3 * torch.rand(2, n, generator=g)
    ids, mask = torch.zeros(2, n).long(), (torch.rand(2, n, generator=g) < 0.9).long()
    inputs = {
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.ones(2),
        "old_logps": (old * mask).sum(1),
    }
    spread = rloo_rollouts_from_batch(inputs).old_logps
    assert not spread[mask == 0].any()
    error = (spread.double() * mask).sum(1) - inputs["old_logps"].double()
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("cls", [trl.GRPOTrainer, trl.RLOOTrainer])
def test_a_batch_without_tokens_has_a_loss_to_differentiate(cls):
    it = trainer() if cls is trl.GRPOTrainer else rloo()
    if cls is trl.GRPOTrainer:
        configure(it, EVERYTHING | {"loss_type": "grpo"})
        inputs = inputs_of(EVERYTHING)
    else:
        inputs = {n: v for n, v in scored_batch(it).items() if n in ("prompt_ids", "prompt_mask", "completion_ids")}
        inputs |= {"advantages": torch.linspace(-1.0, 0.6, B), "old_logps": torch.zeros(B)}
    inputs["completion_mask"] = torch.zeros(B, T).long()
    theirs, ours = both(it, inputs)
    assert torch.isfinite(ours.loss) and differences(theirs, ours) == []


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_on_policy_ratio_is_one_to_the_bit(level):
    """Old log-probs are taken by the code of the loss, in batches of another size too."""
    it = trainer()
    configure(
        it, EVERYTHING | {"entropy": "none", "kl": "none", "correction": "none", "off_policy_mask_threshold": None}
    )
    plugin = use_fastrl(it, level=level)
    inputs = {name: value for name, value in batch().items() if not name.endswith("logps") and "ratio" not in name}
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        old, entropy, aux_loss = it._get_per_token_logps_and_entropies(it.model, ids, attention, T, 3)
    inputs["old_per_token_logps"] = old
    result = run(it, inputs)
    plugin.restore()
    assert entropy is None and aux_loss is None
    assert result.metrics["fastrl/ratio_min"] == result.metrics["fastrl/ratio_max"] == 1.0
    theirs, _, _ = it._get_per_token_logps_and_entropies(it.model, ids, attention, T, 3)
    torch.testing.assert_close(old, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_an_infinite_bound_is_none(loss_type):
    it = trainer()
    configure(it, EVERYTHING | {"loss_type": loss_type, "clip": "0.2"})
    it.epsilon_high, it.epsilon_low = float("inf"), 1.5
    assert differences(*both(it, inputs_of(EVERYTHING))) == []


def test_metrics_of_our_own():
    it = trainer()
    configure(it, EVERYTHING)
    _, ours = both(it, inputs_of(EVERYTHING))
    assert {"fastrl/ratio_mean", "fastrl/approx_kl", "fastrl/rollout_weight_mean", "fastrl/tokens"} <= set(ours.metrics)
    inputs = inputs_of(EVERYTHING)
    assert ours.metrics["fastrl/tokens"] == (inputs["completion_mask"] * inputs["tool_mask"]).sum()


@pytest.mark.parametrize("cls", ["GRPOTrainer", "RLOOTrainer"])
def test_the_temperature_is_that_of_the_config(cls):
    it = trl_common.trainer(getattr(trl, cls), trl_common.model(), temperature=0.7)
    inputs = scored_batch(it)
    drop = ["old_logps", "importance_sampling_ratio", "ref_per_token_logps"]
    if cls == "RLOOTrainer":
        drop = [name for name in inputs if name.endswith("token_logps")] + ["tool_mask", "importance_sampling_ratio"]
    inputs = {name: value for name, value in inputs.items() if name not in drop}
    assert differences(*both(it, inputs)) == []
