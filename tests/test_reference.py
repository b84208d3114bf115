"""The oracle itself: golden values derived by hand, an independent per-token transcription, and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from common import OPTIONS, PRESETS, clean_logits, make_batch

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


def by_hand(logps, entropy, rollouts, spec, advantages):
    """The loss once more, token by token in Python floats, sharing no code with the library."""
    mask = rollouts.mask
    B, T = mask.shape
    lengths = [int(mask[b].sum()) for b in range(B)]
    live = [b for b in range(B) if lengths[b]]
    per_sequence = []
    for b in live:
        tokens = [t for t in range(T) if mask[b, t]]
        gaps = {t: float(logps[b, t]) - float(rollouts.old_logps[b, t]) for t in tokens}
        mean_gap = sum(gaps.values()) / len(tokens)
        total = 0.0
        for t in tokens:
            d = mean_gap if spec.ratio_level == "sequence" else gaps[t]
            if spec.log_ratio_clamp is not None:
                d = max(-spec.log_ratio_clamp, min(spec.log_ratio_clamp, d))
            r, A = math.exp(d), float(advantages[b])
            low = -math.inf if spec.epsilon_low is None else 1 - spec.epsilon_low
            high = math.inf if spec.epsilon_high is None else 1 + spec.epsilon_high
            free = r if spec.delta is None else min(r, spec.delta)
            loss = max(-free * A, -max(low, min(high, r)) * A)
            if spec.dual_clip is not None and A < 0:
                loss = min(loss, -spec.dual_clip * A)
            x = float(logps[b, t]) - float(rollouts.ref_logps[b, t])
            if spec.kl_estimator == "k3" and spec.log_ratio_clamp is not None:
                x = max(-spec.log_ratio_clamp, min(spec.log_ratio_clamp, x))
            kl = {"k1": x, "abs": abs(x), "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[spec.kl_estimator]
            total += loss + spec.kl_coef * kl - spec.entropy_coef * float(entropy[b, t])
        per_sequence.append((total, len(tokens)))
    sums = sum(total for total, _ in per_sequence)
    n, s = sum(lengths), len(live)
    return {
        "token-mean": sums / n,
        "token-sum": sums,
        "seq-mean-token-mean": sum(total / count for total, count in per_sequence) / s,
        "seq-mean-token-sum": sums / s,
        "seq-mean-token-sum-norm": sums / (s * (spec.max_length or 1)),
    }[spec.aggregation]


@pytest.mark.parametrize("name", [name for name, spec in OPTIONS.items() if not spec.is_custom])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_transcription(name, seed):
    spec = OPTIONS[name]
    batch = make_batch(seed=seed, drift=0.6)
    logps, entropy = reference.logprobs(clean_logits(batch), batch.rollouts.token_ids, batch.rollouts.mask, 0.7)
    r = batch.rollouts.rewards.double().view(-1, 2)
    baseline = {"mean": r.mean(1, keepdim=True), "leave-one-out": r.flip(1), "none": 0}[spec.advantage_baseline]
    scale = {"group": r.std(1, keepdim=True) + 1e-4, "batch": r.std() + 1e-4, "none": 1}[spec.advantage_scale]
    advantages = ((r - baseline) / scale).reshape(-1)
    want = by_hand(logps, entropy, batch.rollouts, spec, advantages)
    assert token_loss(logps, batch.rollouts, spec, entropy).item() == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [*PRESETS, "entropy", "k1", "k2", "k3", "dual-clip", "delta", "gspo-full", "custom"])
def test_gradcheck(name):
    """Finite differences agree with autograd through the reference, and with the hand-off of the public function."""
    spec = OPTIONS[name].replace(entropy_coef=0.05)
    batch = make_batch(B=2, T=3, V=5, H=4, garbage=False)
    logits = clean_logits(batch).requires_grad_()
    rollouts, mask = batch.rollouts, batch.rollouts.mask

    def through_reference(logits):
        logps, entropy = reference.logprobs(logits, rollouts.token_ids, mask, 0.9)
        return token_loss(logps, rollouts, spec, entropy)

    assert torch.autograd.gradcheck(through_reference, logits)

    def through_library(logits):
        return fastrl.policy_loss_from_logits(logits, rollouts, spec, temperature=0.9, backend="torch").loss

    assert torch.autograd.gradcheck(through_library, logits)
    leaves = [x.double().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]

    def through_hidden(hidden, weight, bias):
        head = fastrl.LMHead(weight, bias, 1.1, 3.0)
        return fastrl.policy_loss_from_hidden(hidden, head, rollouts, spec, buffer_bytes=400, backend="torch").loss

    assert torch.autograd.gradcheck(through_hidden, leaves)


def test_scores_match_torch_distributions():
    logits = torch.randn(5, 9, dtype=torch.float64)
    logits[0, :4] = -torch.inf
    ids = torch.tensor([8, 1, 2, 3, 4])
    logps, entropy = reference.logprobs(logits, ids)
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logps, categorical.log_prob(ids))
    probs = categorical.probs
    torch.testing.assert_close(entropy, torch.special.entr(probs).sum(-1))
