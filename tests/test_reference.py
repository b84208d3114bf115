"""The reference itself: values derived by hand for the PPO family, KL estimators and aggregations; its scores."""

from __future__ import annotations

import math

import pytest
import torch

import fastrl
from fastrl import reference


def token_loss(logps, rollouts, spec, entropy=None):
    flat = entropy.reshape(-1) if entropy is not None else None
    return reference.token_loss(logps.reshape(-1), flat, rollouts.flat, None, spec)[0]


def one(ratio, advantage, spec, **more):
    """The loss of a single token with this ratio."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    rollouts = fastrl.Rollouts(ids, advantages=torch.tensor([advantage], dtype=torch.float64), old_logps=old, **more)
    return token_loss(old + math.log(ratio), rollouts, spec).item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "spec", "expected"),
    [
        # −min(r·A, clip(r, 0.8, 1.2)·A) = −min(1.5·2, 1.2·2) = −2.4
        (1.5, 2.0, fastrl.PPO, -2.4),
        # A < 0: −min(1.5·−2, 1.2·−2) = −(−3) = 3: the unclipped term is the smaller
        (1.5, -2.0, fastrl.PPO, 3.0),
        # below the range with A < 0: −min(0.5·−2, 0.8·−2) = 1.6
        (0.5, -2.0, fastrl.PPO, 1.6),
        # clip-higher at 1.28
        (1.5, 1.0, fastrl.DAPO, -1.28),
        # no upper bound: −1.5·2
        (1.5, 2.0, fastrl.PPO.replace(epsilon_high=None), -3.0),
        # dual clip c = 1.25 and A < 0: min(1.5·2, 1.25·2) = 2.5
        (1.5, -2.0, fastrl.PPO.replace(dual_clip=1.25), 2.5),
        # delta = 1.4 and A < 0: −min(min(1.5, 1.4)·−2, 1.2·−2) = 2.8
        (1.5, -2.0, fastrl.PPO.replace(delta=1.4), 2.8),
        # on-policy: −A
        (1.0, 0.7, fastrl.GRPO, -0.7),
        # one token is a sequence of one: the geometric mean is its own ratio, clipped at 1 + 4e-4
        (1.5, 2.0, fastrl.GSPO, -2.0 * (1 + 4e-4)),
    ],
)
def test_golden_ppo(ratio, advantage, spec, expected):
    assert one(ratio, advantage, spec) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # x = logp − ref = 0.5: k1 = 0.5, |x| = 0.5, x²/2 = 0.125, e^−0.5 − 1 + 0.5
    [("k1", 0.5), ("abs", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)],
)
def test_golden_kl(estimator, expected):
    ids = torch.zeros(1, 1, dtype=torch.long)
    logps = torch.tensor([[-1.0]], dtype=torch.float64)
    rollouts = fastrl.Rollouts(ids, advantages=torch.zeros(1, dtype=torch.float64), ref_logps=logps - 0.5)
    spec = fastrl.PPO.replace(kl_coef=2.0, kl_estimator=estimator)
    assert token_loss(logps, rollouts, spec).item() == pytest.approx(2.0 * expected, rel=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # Sequences of 1, 3 and 0 valid tokens with on-policy losses −1 and −4 each:
    [
        ("token-mean", -(1 + 3 * 4) / 4),
        ("token-sum", -(1 + 3 * 4)),
        ("seq-mean-token-mean", -(1 + 4) / 2),
        ("seq-mean-token-sum", -(1 + 12) / 2),
        ("seq-mean-token-sum-norm", -(1 + 12) / (2 * 5)),
    ],
)
def test_golden_aggregation(aggregation, expected):
    mask = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 0]])
    advantages = torch.tensor([1.0, 4.0, float("nan")], dtype=torch.float64)
    rollouts = fastrl.Rollouts(torch.zeros(3, 3, dtype=torch.long), mask, advantages)
    spec = fastrl.PPO.replace(aggregation=aggregation, max_length=5 if aggregation.endswith("norm") else None)
    logps = torch.full((3, 3), -2.0, dtype=torch.float64)
    assert token_loss(logps, rollouts, spec).item() == pytest.approx(expected, rel=1e-12)


def test_golden_gspo_gradient_goes_through_the_mean():
    """Two tokens, log-ratios 0.02 and 0.04, A = 3, wide clip, one sequence: s = e^0.03, loss −3·s,
    d/dlogp_t = −3·s/2 for both tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    old = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    logps = (old + torch.tensor([[0.02, 0.04]], dtype=torch.float64)).requires_grad_()
    rollouts = fastrl.Rollouts(ids, advantages=torch.tensor([3.0], dtype=torch.float64), old_logps=old)
    loss = token_loss(logps, rollouts, fastrl.GSPO.replace(epsilon_low=0.2, epsilon_high=0.2))
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.item() == pytest.approx(-3 * math.exp(0.03))
    torch.testing.assert_close(gradient, torch.full((1, 2), -1.5 * math.exp(0.03), dtype=torch.float64))


def test_scores_match_torch_distributions():
    logits = torch.randn(5, 9, dtype=torch.float64)
    logits[0, :4] = -torch.inf
    ids = torch.tensor([8, 1, 2, 3, 4])
    logps, entropy = reference.logprobs(logits, ids)
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logps, categorical.log_prob(ids))
    probs = categorical.probs
    torch.testing.assert_close(entropy, torch.special.entr(probs).sum(-1))
