"""prime-rl's rl losses against transcriptions of their formulas: one sample at a time, un-normalised sums."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from frameworks.batches import assert_same, cispo, masked_sum, ppo, scored

import fastrl
from fastrl.adapters import prime_rl


def inputs(b, row, logps, weights=None, **more):
    """prime-rl's LossInputs of one sample: (seq,) tensors, a bool mask."""
    return SimpleNamespace(
        trainer_logprobs=logps,
        inference_logprobs=b.rollout[row],
        ref_logprobs=None,
        advantages=b.advantages[row],
        loss_mask=b.mask[row],
        loss_weights=weights,
        trainer_mask_logprobs=None,
        inference_mask_logprobs=None,
        **more,
    )


def ratio(x, b):
    return (x - b.rollout).exp()


def ipo(x, b, eps, cap, tau=1.0):
    far = (x.detach().exp() - b.rollout.exp()).abs() > eps
    d = x - b.rollout
    r = (d.detach().clamp(max=math.log(cap)) + d - d.detach()).exp()
    return -tau * b.advantages * r * ~far


def icepop(x, b, low, high):
    r = ratio(x, b)
    return -b.advantages * r * ((r >= low) & (r <= high))


CASES = {
    "ipo-default": ({}, lambda x, b: ipo(x, b, 0.3, 1e4)),
    "ipo": (
        {"type": "ipo", "eps": 0.1, "max_importance_ratio": 1.2, "adv_tau": 0.7},
        lambda x, b: ipo(x, b, 0.1, 1.2, 0.7),
    ),
    "icepop": ({"type": "icepop", "ratio_low": 0.7, "ratio_high": 1.4}, lambda x, b: icepop(x, b, 0.7, 1.4)),
    "ppo": ({"type": "ppo"}, lambda x, b: ppo(x, b.rollout, b.advantages, 0.2, 0.2)),
    "ppo-asymmetric": (
        {"type": "ppo", "ratio_low": 0.9, "ratio_high": 1.5, "adv_tau": 2.0},
        lambda x, b: ppo(x, b.rollout, 2 * b.advantages, 0.1, 0.5),
    ),
    "cispo-default": (
        {"type": "cispo"},
        lambda x, b: -ratio(x, b).detach().clamp(max=5.0) * b.advantages * x,
    ),
    "cispo": (
        {"type": "cispo", "ratio_low": 0.8, "ratio_high": 1.3},
        lambda x, b: cispo(x, b.rollout, b.advantages, 0.2, 0.3),
    ),
    "preset": (
        {"type": "dapo", "epsilon_high": 0.28},
        lambda x, b: ppo(x, b.rollout, b.advantages, 0.2, 0.28),
    ),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sum_of_samples_over_a_global_count(name, weighted):
    """As prime-rl calls it: sample by sample, the sums added and divided by the count of the whole step."""
    kwargs, formula = CASES[name]
    b = scored(seed=1)
    weights = torch.rand(b.mask.shape, dtype=torch.float64) + 0.2 if weighted else None

    def ours(x):
        rows = [prime_rl.loss(inputs(b, i, x[i], None if weights is None else weights[i]), **kwargs) for i in range(4)]
        return sum(row.loss for row in rows) / 37

    def theirs(x):
        return masked_sum((1.0 if weights is None else weights) * formula(x, b), b.mask) / 37

    assert_same(ours, theirs, b.logps)


def test_beyond_the_cap_ppo_has_no_gradient():
    """prime-rl keeps the gradient of a ratio beyond `max_importance_ratio` at the cap; here it is 0, the value the same."""
    b = scored()
    x = (b.rollout + 1.0).requires_grad_()
    low = b._replace(advantages=-b.advantages.abs())
    out = prime_rl.loss(inputs(low, 0, x[0]), type="ppo", max_importance_ratio=2.0)
    (gradient,) = torch.autograd.grad(out.loss, x)
    assert float(out.loss.detach()) == pytest.approx(2.0 * float(b.advantages[0].abs()[b.mask[0]].sum()), rel=1e-9)
    assert not gradient.any() and float(out.metrics["fastrl/clamped_fraction"]) == 1


def test_metrics_are_tensors_with_prime_rls_names():
    b = scored()
    far = (b.logps.exp() - b.rollout.exp()).abs() > 0.1
    out = prime_rl.loss(inputs(b, 0, b.logps[0]), type="ipo", eps=0.1)
    assert float(out.metrics["is_masked"]) == pytest.approx(float(far[0][b.mask[0]].double().mean()), rel=1e-6)
    r = ratio(b.logps, b)[0]
    clipped = ((r > 1.2) & (b.advantages[0] > 0)) | ((r < 0.8) & (b.advantages[0] < 0))
    out = prime_rl.loss(inputs(b, 0, b.logps[0]), type="ppo")
    assert float(out.metrics["is_clipped"]) == pytest.approx(float(clipped[b.mask[0]].double().mean()), rel=1e-6)
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in out.metrics.values())


def test_returns_the_trainers_own_class(monkeypatch):
    class LossOutputs:
        def __init__(self, loss, metrics):
            self.loss, self.metrics = loss, metrics

    module = ModuleType("loss")
    module.LossOutputs = LossOutputs
    monkeypatch.setitem(sys.modules, "prime_rl.trainer.rl.loss", module)
    b = scored()
    assert isinstance(prime_rl.loss(inputs(b, 0, b.logps[0])), LossOutputs)


def test_a_preset_with_its_reference():
    b = scored()
    given = inputs(b, 0, b.logps[0])
    given.ref_logprobs = b.ref[0]
    out = prime_rl.loss(given, type="gspo", kl_coef=0.1)
    spec = fastrl.GSPO.replace(kl_coef=0.1, aggregation="token-sum")
    rollouts = fastrl.Rollouts(
        torch.zeros(1, 7, dtype=torch.long), b.mask[:1], b.advantages[:1], old_logps=b.rollout[:1], ref_logps=b.ref[:1]
    )
    assert float(out.loss) == pytest.approx(float(fastrl.policy_loss(b.logps[:1], rollouts, spec).loss), rel=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"type": "ipo", "score_centering": True}, "score_centering"),
        ({"type": "ipo", "kl_tau": 1e-3}, "kl_tau"),
        ({"type": "default"}, "preset"),
        ({"type": "icepop", "ratio_low": 6.0}, "rollout.lower"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(kwargs, named):
    b = scored()
    with pytest.raises(ValueError, match=f"^{named}: "):
        prime_rl.loss(inputs(b, 0, b.logps[0]), **kwargs)


def test_an_unknown_input_is_refused():
    b = scored()
    with pytest.raises(ValueError, match="^rollout_is_weights: expected a field of prime-rl's LossInputs"):
        prime_rl.loss(inputs(b, 0, b.logps[0], rollout_is_weights=b.ref[0]))
