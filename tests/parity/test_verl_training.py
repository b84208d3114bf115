"""Fifty optimiser steps of a tiny model through verl's `ppo_loss`, with its policy loss and with ours: the same curves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import peers
from parity.tiny import LENGTH, PROMPT, V, one_thread, tiny_model
from parity.verl_cases import _Data, config
from torch import Tensor

import fastrl.adapters.verl as adapter

verl = peers.verl()
adapter.register()

SEQUENCES = 6
RUNS = {
    "vanilla": {"clip_ratio_c": 1.5},
    "gspo": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "loss_agg_mode": "seq-mean-token-mean"},
    "cispo": {},
    "geo_mean": {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": LENGTH},
    "kl_cov": {"kl_cov_ratio": 0.2},
    "bypass_mode": {
        "rollout_correction": {
            "loss_type": "reinforce",
            "rollout_is": "sequence",
            "rollout_is_threshold": 2.0,
            "rollout_rs": "token_k1",
            "rollout_rs_threshold": "0.5_2.0",
        }
    },
}


def scores(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the answers' tokens."""
    logps = model(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[:, PROMPT:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def rollouts(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (SEQUENCES, PROMPT + LENGTH), generator=g)
    mask = (torch.arange(LENGTH) < torch.tensor([6, 4, 5, 1, 3, 2])[:, None]).long()
    with torch.no_grad():
        logps, _ = scores(tiny_model(), ids)
    near = [(logps + 0.2 * torch.randn(logps.shape, generator=g)).clamp(max=-1e-3) for _ in range(2)]
    advantages = torch.randn(SEQUENCES, generator=g)[:, None] * mask
    weights = (0.2 * torch.randn(logps.shape, generator=g)).exp()
    return {
        "ids": ids,
        "response_mask": mask,
        "old_log_probs": near[0],
        "ref_log_prob": near[1],
        "advantages": advantages,
        "rollout_is_weights": weights,
    }


def train(name: str, options: dict[str, Any], batches: list[dict[str, Tensor]]) -> tuple[list[dict], list[Tensor]]:
    """What is logged of each step, two micro-batches of unequal length each, and the weights after the last."""
    actor = config(loss_mode=name, use_kl_loss=True, kl_loss_coef=0.05, entropy_coeff=0.01, **options)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    log = []
    for step in range(50):
        batch, logged = batches[step % len(batches)], {}
        tokens = int(batch["response_mask"].sum())
        counts = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": SEQUENCES}
        for part in (slice(0, 2), slice(2, None)):
            micro = _Data({key: value[part] for key, value in batch.items()})
            logps, entropy = scores(model, micro.pop("ids"))
            loss, metrics = verl.losses.ppo_loss(
                actor, {"log_probs": logps, "entropy": entropy}, _Data(**micro, **counts)
            )
            loss.backward()
            for key, metric in metrics.items():
                logged[key] = logged.get(key, 0) + float(metric.aggregate() if hasattr(metric, "aggregate") else metric)
        logged["gradient"] = (
            torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        )
        optimizer.step()
        optimizer.zero_grad()
        log.append(logged)
    return log, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("mode", RUNS)
def test_same_curves(mode, monkeypatch):
    monkeypatch.setattr(verl.losses, "no_padding_2_padding", lambda values, data: values)
    batches = [rollouts(seed) for seed in range(5)]
    with one_thread():
        want, weights = train(mode, RUNS[mode], batches)
        got, own_weights = train(f"fastrl_{mode}", RUNS[mode], batches)
    assert want[0]["actor/pg_loss"] != want[-1]["actor/pg_loss"]
    for theirs, ours in zip(want, got, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-6)
    for x, y in zip(own_weights, weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
