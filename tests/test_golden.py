"""Values and gradients derived by hand: one row per objective, ratio level, KL gradient and correction, every backend.

Tokens have old log-prob −1 (probability 0.367879) unless said otherwise; r is the ratio, so logp = log r − 1.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import BACKENDS

import fastrl
from fastrl import LossSpec, RolloutCorrection, Rollouts

NAN = math.nan
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def run(backend, logps, spec, **given):
    """(loss, gradient of each token, metrics) of one sequence."""
    name, device = backend
    dtype = torch.float64 if backend == ("torch", "cpu") else torch.float32
    leaf = torch.tensor([logps], dtype=dtype, device=device, requires_grad=True)
    data = {key: torch.tensor([value], dtype=torch.float64).to(dtype) for key, value in given.items()}
    rollouts = Rollouts(torch.zeros(1, len(logps), dtype=torch.long), **data).to(device)
    out = fastrl.policy_loss(leaf, rollouts, spec, backend=name)
    out.loss.backward()
    return out.loss.item(), leaf.grad[0].tolist(), out.metrics


def at_ratios(backend, ratios, advantages, spec, **given):
    logps = [math.log(r) - 1 for r in ratios]
    return run(backend, logps, spec, advantages=advantages, old_logps=[-1.0] * len(ratios), **given)


def near(values):
    return pytest.approx(values, rel=2e-6, abs=1e-7)


LP = math.log(1.5) - 1  # −0.594535, the log-prob at r = 1.5
TWO_SIDED = fastrl.CISPO.replace(epsilon_low=0.2, epsilon_high=0.2)


@pytest.mark.parametrize(
    ("spec", "ratio", "advantage", "loss", "gradient"),
    [
        # −min(1.5, 1.2)·2·logp, and the same factor as gradient
        (TWO_SIDED, 1.5, 2.0, -2.4 * LP, -2.4),
        # A < 0 is clipped too: −1.2·−2·logp
        (TWO_SIDED, 1.5, -2.0, 2.4 * LP, 2.4),
        (TWO_SIDED, 0.5, 2.0, -1.6 * (math.log(0.5) - 1), -1.6),
        # −4·σ(0.5) = −4·0.622459; −4·σ·(1 − σ)·r = −4·0.235004·1.5
        (fastrl.SAPO, 1.5, 1.0, -2.4898373, -1.4100223),
        # (4/1.05)·σ(1.05·0.5) = 3.809524·0.628317; 4·0.233535·1.5
        (fastrl.SAPO, 1.5, -1.0, 2.3935887, 1.4012075),
        # log r = 0.405 is held at 0.4: −e^0.4·1, no gradient; with A < 0 it is not: 1.5
        (fastrl.GMPO, 1.5, 1.0, -1.4918247, 0.0),
        (fastrl.GMPO, 1.5, -1.0, 1.5, 1.5),
        # φ = e³·w²·e^(−3w) = 20.085537·2.25·e^−4.5 = 0.502043
        (fastrl.VESPO, 1.5, 1.0, -0.5020429 * LP, -0.5020429),
        # A < 0: φ = e²·w³·e^(−2w) = 7.389056·3.375·e^−3 = 1.241593
        (fastrl.VESPO, 1.5, -1.0, 1.2415931 * LP, 1.2415931),
        # π − π_old = 0.551819 − 0.367879 = 0.184 <= 0.2: kept, −1.5·logp
        (fastrl.DPPO_TV, 1.5, 1.0, -1.5 * LP, -1.5),
        (fastrl.DPPO_TV.replace(dppo_ratio_cap=1.2), 1.5, 1.0, -1.2 * LP, -1.2),
        # π − π_old = 0.368 > 0.2: dropped for A > 0, kept for A < 0
        (fastrl.DPPO_TV, 2.0, 1.0, 0.0, 0.0),
        (fastrl.DPPO_TV, 2.0, -1.0, 2 * (math.log(2) - 1), 2.0),
        # 0.147 − 0.368 = −0.221 < −0.2: dropped for A < 0
        (fastrl.DPPO_TV, 0.4, -1.0, 0.0, 0.0),
        # 0.367879·log(1/1.5) + 0.632121·log(0.632121/0.448181) = 0.0682 > 0.05: dropped for A > 0
        (fastrl.DPPO_KL, 1.5, 1.0, 0.0, 0.0),
        (fastrl.DPPO_KL.replace(epsilon_high=0.07), 1.5, 1.0, -1.5 * LP, -1.5),
        # A < 0 pushes it back: kept
        (fastrl.DPPO_KL, 1.5, -1.0, 1.5 * LP, 1.5),
        (fastrl.REINFORCE, 1.5, 2.0, -2 * LP, -2.0),
        (LossSpec(objective="importance_sampling"), 1.5, 2.0, -3.0, -3.0),
        # A > 0 in full, A < 0 times min(r, 1)
        (fastrl.TOPR, 1.5, 1.0, -LP, -1.0),
        (fastrl.TOPR, 1.5, -1.0, LP, 1.0),
        (fastrl.TOPR, 0.5, -1.0, 0.5 * (math.log(0.5) - 1), 0.5),
        # −2·logp + 0.05·0.405465²; −2 + 0.1·0.405465
        (fastrl.DRO, 1.5, 2.0, -2 * LP + 0.05 * 0.4054651**2, -1.9594535),
        # one token is the highest: −1.5·2 + 0.405465, gradient −1.5·2 + 1
        (fastrl.KL_COV, 1.5, 2.0, -3 + 0.4054651, -2.0),
        # one token has covariance 0, below the range: nothing is drawn, the clip is that of PPO
        (fastrl.CLIP_COV, 1.5, 2.0, -2.4, 0.0),
        (fastrl.CLIP_COV, 1.5, -2.0, 3.0, 3.0),
    ],
)
def test_objectives(backend, spec, ratio, advantage, loss, gradient):
    got = at_ratios(backend, [ratio], [advantage], spec)
    assert got[0] == near(loss) and got[1] == near([gradient])


def test_gmpo_clips_each_token(backend):
    """r = 1.5 and 0.5, A = 1: log-ratios 0.4 (held) and −0.693147, mean −0.146574, ℓ = −e^−0.146574 = −0.863663; only
    the second token has a gradient, ℓ/2."""
    loss, gradient, _ = at_ratios(backend, [1.5, 0.5], [1.0], fastrl.GMPO)
    assert loss == near(-0.8636622) and gradient == near([0.0, -0.4318311])


@pytest.mark.parametrize(
    ("level", "loss", "gradient"),
    # r = 1.5 and 0.8, advantages 1 and 3, unclipped, mean over two tokens; product 1.2, its root 1.095445
    [
        ("token", -(1.5 + 0.8 * 3) / 2, [-0.75, -1.2]),
        # −1.095445·(1 + 3)/2, and half of it through each side of the mean
        ("sequence", -2.1908902, [-1.0954451, -1.0954451]),
        # the same value; the gradient of a token is −1.095445·A/2
        ("sequence_token", -2.1908902, [-0.5477226, -1.6431677]),
        # −1.2·(1 + 3)/2, all of it through each token of the sum
        ("sequence_sum", -2.4, [-2.4, -2.4]),
    ],
)
def test_ratio_levels(backend, level, loss, gradient):
    spec = LossSpec(objective="importance_sampling", ratio_level=level)
    got = at_ratios(backend, [1.5, 0.8], [1.0, 3.0], spec)
    assert got[0] == near(loss) and got[1] == near(gradient)


def test_picked_tokens(backend):
    """log-probs −1, −2, −6 (mean −3), A = 2, 0, 1 (mean 1): covariances 2, −1, 0. clip_cov draws the first, the one in
    (1, 5); kl_cov penalises it. log r = 0.5 everywhere, e^0.5 = 1.648721."""
    logps, given = [-1.0, -2.0, -6.0], {"advantages": [2.0, 0.0, 1.0], "old_logps": [-1.5, -2.5, -6.5]}
    loss, gradient, _ = run(backend, logps, fastrl.CLIP_COV.replace(epsilon_high=1.0), **given)
    assert loss == near(-1.6487213 / 3) and gradient == near([0.0, 0.0, -1.6487213 / 3])
    loss, gradient, _ = run(backend, logps, fastrl.KL_COV, **given)
    assert loss == near((-3 * 1.6487213 + 0.5) / 3)
    assert gradient == near([(-2 * 1.6487213 + 1) / 3, 0.0, -1.6487213 / 3])


@pytest.mark.parametrize(
    ("fields", "loss", "gradient"),
    # x = logp − ref = 0.5, r = e^0.2 = 1.221403, A = 0, kl_coef 2; k3 = e^−0.5 − 0.5 = 0.106531
    [
        ({}, 0.2130613, 2 * (1 - math.exp(-0.5))),
        # r·k3, whose derivative is r·k3 + r·(1 − e^−0.5) = r·x
        ({"kl_gradient": "importance_weighted"}, 0.2602337, 1.2214028),
        ({"kl_gradient": "straight_through"}, 0.2130613, 1.0),
        ({"kl_estimator": "abs", "kl_gradient": "straight_through"}, 1.0, 1.0),
        ({"kl_clamp": 0.05}, 0.1, 0.0),
        # the ratio keeps its gradient
        ({"kl_clamp": 0.05, "kl_gradient": "importance_weighted"}, 0.1221403, 0.1221403),
        ({"kl_clamp": 0.05, "kl_gradient": "straight_through"}, 0.1, 1.0),
    ],
)
def test_kl_gradients(backend, fields, loss, gradient):
    spec = fastrl.PPO.replace(kl_coef=2.0, **fields)
    got = run(backend, [-1.0], spec, advantages=[0.0], old_logps=[-1.2], ref_logps=[-1.5])
    assert got[0] == near(loss) and got[1] == near([gradient])


RHO = [-1 - math.log(2), -1 - math.log(0.75)]  # the sampler, so that ρ = 2 and 0.75


@pytest.mark.parametrize(
    ("fields", "loss"),
    # on-policy, A = 1 and 3, mean over two tokens: −(v₁ + 3·v₂)/2. Product of the ρ 1.5, its root 1.224745
    [
        ({}, -(2 + 2.25) / 2),
        ({"upper": 1.5}, -(1.5 + 2.25) / 2),
        ({"lower": 0.9, "upper": 1.5}, -(1.5 + 2.7) / 2),
        ({"mode": "mask", "upper": 1.5}, -2.25 / 2),
        ({"mode": "mask", "lower": 0.9}, -2 / 2),
        ({"level": "sequence"}, -1.5 * 2),
        ({"level": "sequence", "upper": 1.2}, -1.2 * 2),
        ({"level": "sequence", "mode": "mask", "upper": 1.2}, 0.0),
        ({"level": "geometric"}, -1.2247449 * 2),
        # mean 1.375
        ({"normalize": True}, -(2 + 2.25) / (2 * 1.375)),
        # one sequence: its weight is its mean
        ({"level": "sequence", "normalize": True}, -2.0),
        # −log ρ = −0.69, 0.288
        ({"reject": "k1", "reject_upper": 0.2}, -2 / 2),
        ({"reject": "k1", "reject_lower": -0.5}, -2.25 / 2),
        ({"reject": "k1", "reject_upper": 0.2, "rejected_in_denominator": False}, -2 / 1),
        ({"mode": "mask", "upper": 1.5, "rejected_in_denominator": False}, -2.25 / 1),
        # (log ρ)²/2 = 0.2402, 0.0414; their sum 0.2816
        ({"reject": "k2", "reject_upper": 0.1}, -2.25 / 2),
        ({"reject": "k2", "reject_level": "sequence-sum", "reject_upper": 0.25}, 0.0),
        ({"reject": "k2", "reject_level": "sequence-mean", "reject_upper": 0.25}, -(2 + 2.25) / 2),
        # ρ − 1 − log ρ = 0.3069, 0.0377
        ({"reject": "k3", "reject_upper": 0.1}, -2.25 / 2),
        ({"reject": "k3", "reject_level": "sequence-max", "reject_upper": 0.1}, 0.0),
        # |0.367879 − 0.183940| = 0.1839, |0.367879 − 0.490506| = 0.1226
        ({"reject": "tv", "reject_upper": 0.15}, -2.25 / 2),
        # 0.18394·log 0.5 + 0.81606·log(0.81606/0.632121) = 0.0809; likewise 0.0312
        ({"reject": "binary_kl", "reject_upper": 0.05}, -2.25 / 2),
        ({"level": None, "reject": "k3", "reject_upper": 0.1}, -3 / 2),
        # (log ρ)² = 0.4805, 0.0828, mean 0.2816: without the first it is below 0.1
        ({"level": None, "second_moment": 0.1}, -3 / 2),
        ({"level": None, "second_moment": 0.3}, -(1 + 3) / 2),
        ({"second_moment": 0.1, "rejected_in_denominator": False}, -2.25),
    ],
)
def test_corrections(backend, fields, loss):
    spec = fastrl.PPO.replace(rollout=RolloutCorrection(**fields))
    got = at_ratios(backend, [1.0, 1.0], [1.0, 3.0], spec, rollout_logps=RHO)
    assert got[0] == near(loss)
    assert sum(got[1]) == near(loss), "on-policy, a token's gradient is its loss"


def test_other_weights(backend):
    """An unscored token has ρ = 1: −(1 + 2.25)/2. Given weights 0.5 and 2: −(0.5 + 6)/2."""
    spec = fastrl.PPO.replace(rollout=RolloutCorrection())
    assert at_ratios(backend, [1.0, 1.0], [1.0, 3.0], spec, rollout_logps=[NAN, RHO[1]])[0] == near(-3.25 / 2)
    assert at_ratios(backend, [1.0, 1.0], [1.0, 3.0], fastrl.PPO, rollout_weights=[0.5, 2.0])[0] == near(-3.25)


def test_off_policy_mask(backend):
    """mean(rollout − logp) = (−0.693147 + 0.287682)/2 = −0.203: above −0.3, tokens with A < 0 go; A = −1 and 3."""
    spec = fastrl.PPO.replace(off_policy_threshold=-0.3)
    loss, gradient, metrics = at_ratios(backend, [1.0, 1.0], [-1.0, 3.0], spec, rollout_logps=RHO)
    assert loss == near(-1.5) and gradient == near([0.0, -1.5])
    assert metrics["rollout_rejected_fraction"].item() == 0.5
    loose = spec.replace(off_policy_threshold=-0.1)
    assert at_ratios(backend, [1.0, 1.0], [-1.0, 3.0], loose, rollout_logps=RHO)[0] == near(-1.0)


@pytest.mark.parametrize(
    ("fields", "sample_size", "rejected", "tokens"),
    [
        # weights 1.5 and 0.75: 2.25²/(2.25 + 0.5625)
        ({"upper": 1.5}, 1.8, 0.0, 2),
        ({"mode": "mask", "upper": 1.5}, 1.0, 0.5, 2),
        ({"mode": "mask", "upper": 1.5, "rejected_in_denominator": False}, 1.0, 0.5, 1),
    ],
)
def test_rollout_metrics(backend, fields, sample_size, rejected, tokens):
    """χ² = mean(ρ²) − 1 = (4 + 0.5625)/2 − 1 over the tokens that count; 0.5625 − 1 over the second alone."""
    spec = fastrl.PPO.replace(rollout=RolloutCorrection(**fields))
    metrics = at_ratios(backend, [1.0, 1.0], [1.0, 3.0], spec, rollout_logps=RHO)[2]
    assert metrics["rollout_effective_sample_size"].item() == near(sample_size)
    assert metrics["rollout_rejected_fraction"].item() == near(rejected)
    assert metrics["rollout_chi2"].item() == near(1.28125 if tokens == 2 else -0.4375)
    assert metrics["tokens"].item() == tokens
