"""`token_metrics`: per token what `Metrics` counts, whatever level and backend the loss came from."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS, make_batch

import fastrl
from fastrl.objectives import OBJECTIVES
from fastrl.presets import PRESETS
from fastrl.token_metrics import token_metrics


def loss(spec, backend=("torch", "cpu")):
    batch = make_batch(V=64, scale=3.0, device=backend[1])
    out = fastrl.policy_loss_from_hidden(batch.hidden, batch.head(), batch.rollouts, spec, backend=backend[0])
    return out, batch.rollouts


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_flags_add_up_to_the_fractions(name, backend):
    out, rollouts = loss(PRESETS[name], backend)
    tokens = token_metrics(out, rollouts, PRESETS[name])
    if OBJECTIVES[PRESETS[name].objective].flags is None:
        assert tokens.clip_low is None and tokens.clip_high is None
        return
    for side, flags in (("low", tokens.clip_low), ("high", tokens.clip_high)):
        assert flags.shape == rollouts.shape and flags.dtype == torch.bool
        assert not flags[rollouts.mask == 0].any()
        want = out.metrics[f"clip_fraction_{side}"] * out.metrics["tokens"]
        assert flags.sum().item() == pytest.approx(want.item(), abs=1e-3), side


def test_high_entropy_keeps_the_fraction():
    out, rollouts = loss(fastrl.GRPO.replace(top_entropy_quantile=0.25))
    kept = token_metrics(out, rollouts, fastrl.GRPO.replace(top_entropy_quantile=0.25)).high_entropy
    valid = rollouts.mask.bool()
    assert not kept[~valid].any() and kept.sum() == pytest.approx(0.25 * valid.sum(), abs=1)
    assert out.entropy[kept].min() > out.entropy[valid & ~kept].max()
    assert token_metrics(out, rollouts, fastrl.GRPO).high_entropy is None


def test_vespo_weight_is_one_for_a_sequence():
    """φ(w) of w = exp(Σ log r), and 1 = φ(1) where nothing counts."""
    ids, old = torch.zeros(3, 2).long(), torch.full((3, 2), -2.0)
    logps = old + torch.tensor([[0.1, 0.2], [-0.3, 5.0], [7.0, 7.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]])
    rollouts = fastrl.Rollouts(ids, mask, torch.tensor([1.0, -1.0, 1.0]), old_logps=old)
    weight = token_metrics(fastrl.policy_loss(logps, rollouts, fastrl.VESPO), rollouts, fastrl.VESPO).sequence_weight
    w = torch.tensor([0.3, -0.3, 0.0]).exp()
    k, lam = torch.tensor([2.0, 3.0, 2.0]), torch.tensor([3.0, 2.0, 3.0])
    want = lam.exp() * w**k * (-lam * w).exp()
    torch.testing.assert_close(weight, want[:, None].expand(3, 2), rtol=1e-6, atol=0)
    assert token_metrics(fastrl.policy_loss(logps, rollouts), rollouts, fastrl.GRPO).sequence_weight is None
