"""KL in the reward and in the advantage, and the controllers of its coefficient, by hand and by loops."""

from __future__ import annotations

import math

import pytest
import torch
from common import ACCELERATOR, close

import fastrl

NAN = float("nan")
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
ESTIMATES = {
    "k1": lambda x: x,
    "abs": abs,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: math.expm1(-max(min(x, 20), -20)) + max(min(x, 20), -20),
}


def batch(dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(1)
    logps, ref = (scale * torch.randn(2, 4, 5, generator=g) - 2).to(dtype)
    return logps.masked_fill(~MASK, NAN), ref.masked_fill(~MASK, math.inf)


def loop(rewards, logps, ref, coef, estimator, clamp):
    out, means = torch.zeros(4, 5, dtype=torch.float64), []
    for i in range(4):
        valid = [t for t in range(5) if MASK[i, t]]
        kl = []
        for t in valid:
            value = ESTIMATES[estimator](logps[i, t].item() - ref[i, t].item())
            kl.append(value if clamp is None else max(min(value, clamp), -clamp))
            score = rewards[i, t].item() if rewards.ndim == 2 else rewards[i].item() * (t == valid[-1])
            out[i, t] = score - coef * kl[-1]
        if valid:
            means.append(sum(kl) / len(kl))
    return out, sum(means) / len(means)


class TestShapedRewards:
    @pytest.mark.accelerator
    @pytest.mark.parametrize("clamp", [None, 0.75])
    @pytest.mark.parametrize("estimator", list(ESTIMATES))
    @pytest.mark.parametrize("per_token", [True, False])
    def test_against_a_loop(self, per_token, estimator, clamp):
        logps, ref = batch()
        rewards = torch.randn(4, 5).masked_fill(~MASK, NAN) if per_token else torch.tensor([1.0, -2.0, 0.5, NAN])
        tensors = [x.to(ACCELERATOR) for x in (rewards, logps, ref)]
        got, kl = fastrl.kl_shaped_rewards(
            *tensors, mask=MASK.to(ACCELERATOR), kl_coef=0.3, kl_estimator=estimator, kl_clamp=clamp
        )
        want, mean = loop(rewards, logps, ref, 0.3, estimator, clamp)
        close(got, want, ulps=8)
        close(kl, torch.tensor(mean), ulps=8)
        assert got.dtype == kl.dtype == torch.float32 and (got.cpu()[~MASK] == 0).all()

    def test_k3_holds_its_exponent(self):
        """x = −100 would be e¹⁰⁰ − 101, which float32 has no value for; it is taken at −20."""
        got, kl = fastrl.kl_shaped_rewards(
            torch.zeros(1), -100 * torch.ones(1, 1), torch.zeros(1, 1), kl_coef=1.0, kl_estimator="k3"
        )
        close(kl, torch.tensor(math.expm1(20) - 20), ulps=4)
        assert got[0, 0] == -kl

    def test_dtypes_and_layouts(self):
        """bf16 log-probs are subtracted in fp32; a transposed view; a coefficient on the device; float64."""
        logps, ref = batch(torch.bfloat16)
        rewards = torch.ones(4, dtype=torch.bfloat16)
        strided = logps.T.contiguous().T
        got = fastrl.kl_shaped_rewards(rewards, strided, ref, mask=MASK, kl_coef=torch.tensor(0.3)).rewards
        close(got, loop(rewards, logps, ref, 0.3, "k1", None)[0], ulps=8)
        wide = fastrl.kl_shaped_rewards(rewards.double(), logps.double(), ref.double(), mask=MASK, kl_coef=0.3)
        assert wide.rewards.dtype == wide.kl.dtype == torch.float64

    def test_no_gradient(self):
        logps = torch.zeros(2, 3, requires_grad=True)
        assert not fastrl.kl_shaped_rewards(torch.ones(2), logps, torch.ones(2, 3), kl_coef=0.1).rewards.requires_grad

    def test_nan_at_a_token_that_counts_propagates(self):
        logps, ref = batch()
        logps[0, 1] = NAN
        got, kl = fastrl.kl_shaped_rewards(torch.ones(4), logps, ref, mask=MASK, kl_coef=0.1)
        assert got[0, 1].isnan() and kl.isnan() and got.isnan().sum() == 1

    def test_nothing_counts(self):
        for shape, mask in (((2, 3), torch.zeros(2, 3)), ((0, 3), None), ((2, 0), None)):
            x = torch.full(shape, NAN)
            got, kl = fastrl.kl_shaped_rewards(torch.full(shape[:1], NAN), x, x, mask=mask, kl_coef=0.1)
            assert got.shape == shape and (got == 0).all() and kl == 0


class TestShapedAdvantages:
    @pytest.mark.accelerator
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 5)])
    def test_against_a_loop(self, shape, gamma):
        logps, ref = batch()
        advantages = torch.randn(shape)
        full = advantages.reshape(4, -1).expand(4, 5)
        mean = sum((logps[i, t] - ref[i, t]).item() for i, t in MASK.nonzero().tolist()) / MASK.sum().item()
        want = torch.zeros(4, 5, dtype=torch.float64)
        for i in range(4):
            running = 0.0
            for t in reversed(range(5)):
                if MASK[i, t]:
                    running = mean - (logps[i, t] - ref[i, t]).item() + gamma * running
                    want[i, t] = full[i, t].item() + 0.2 * running
        tensors = [x.to(ACCELERATOR) for x in (advantages, logps, ref)]
        got = fastrl.kl_shaped_advantages(*tensors, mask=MASK.to(ACCELERATOR), kl_coef=0.2, gamma=gamma)
        close(got, want, ulps=16)

    def test_the_term_has_mean_0(self):
        logps, ref = batch(scale=3.0)
        got = fastrl.kl_shaped_advantages(torch.zeros(4), logps, ref, mask=MASK, kl_coef=1.0)
        assert got.abs().max() > 1 and abs(got.sum()) < 1e-5


class TestControllers:
    def test_fixed(self):
        controller = fastrl.FixedKLController(0.1)
        assert controller.update(5.0, 100) == controller.value == 0.1

    def test_adaptive_kl_by_hand(self):
        """Twice the target is held to +20 %, a tenth below to −10 %, each times n/horizon."""
        controller = fastrl.AdaptiveKLController(0.2, target=2.0, horizon=100)
        assert controller.update(4.0, 50) == pytest.approx(0.2 * 1.1)
        assert controller.update(torch.tensor(1.8), 100) == pytest.approx(0.22 * 0.9)
        assert controller.update(2.0, 64) == pytest.approx(0.198)
        assert controller.update(0.0, 1000) == 0  # 1 − 0.2·10 would turn the penalty into a bonus

    def test_adaptive_entropy_by_hand(self):
        """Before a measurement and above the target nothing is applied; c moves by delta within its bounds."""
        controller = fastrl.AdaptiveEntropyController(0.01, target=0.5, delta=0.004, maximum=0.016)
        assert controller.value == 0 and controller.coefficient == 0.01
        assert controller.update(0.5) == pytest.approx(0.014)
        assert controller.update(torch.tensor(0.2)) == 0.016
        assert controller.update(0.51) == 0 and controller.coefficient == pytest.approx(0.012)
        for _ in range(4):
            controller.update(3.0)
        assert controller.coefficient == 0 and controller.update(0.1) == pytest.approx(0.004)
        assert fastrl.GRPO.replace(entropy_coef=controller.value).entropy_coef == pytest.approx(0.004)

    @pytest.mark.parametrize(
        "make, update",
        [
            (lambda: fastrl.FixedKLController(0.1), (1.0, 5)),
            (lambda: fastrl.AdaptiveKLController(0.1, 2.0, 10), (1.0, 5)),
            (lambda: fastrl.AdaptiveEntropyController(0.1, 0.5), (0.3,)),
        ],
    )
    def test_resumed_from_a_checkpoint(self, make, update):
        trained, resumed = make(), make()
        trained.update(*update)
        resumed.load_state_dict(trained.state_dict())
        assert resumed.value == trained.value and resumed.update(*update) == trained.update(*update)
        with pytest.raises(ValueError, match="state: expected the names"):
            resumed.load_state_dict({"val": 1.0})


X = torch.ones(4, 3)
MISUSES = [
    ("no coefficient", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X, X, kl_coef=None), TypeError, "kl_coef", "number"),
    ("negative coefficient", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X, X, kl_coef=-1), ValueError, "kl_coef", "above 0"),
    ("coefficient per token", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X, X, kl_coef=X), ValueError, "kl_coef", "0-d"),
    ("estimator", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X, X, kl_coef=1, kl_estimator="k4"), ValueError, "kl_estimator", "'k3'"),
    ("column of rewards", lambda: fastrl.kl_shaped_rewards(torch.ones(4, 1), X, X, kl_coef=1), ValueError, "rewards", "(4,) or (4, 3)"),
    ("packed log-probs", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X[0], X[0], kl_coef=1), ValueError, "logps", "(B, T)"),
    ("another reference", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X, X[:2], kl_coef=1), ValueError, "ref_logps", "(4, 3)"),
    ("another mask", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X, X, kl_coef=1, mask=X[:2]), ValueError, "mask", "(4, 3)"),
    ("clamp of 0", lambda: fastrl.kl_shaped_rewards(torch.ones(4), X, X, kl_coef=1, kl_clamp=0), ValueError, "kl_clamp", "above 0"),
    ("discount over 1", lambda: fastrl.kl_shaped_advantages(torch.ones(4), X, X, kl_coef=1, gamma=1.5), ValueError, "gamma", "0 to 1"),
    ("advantages of others", lambda: fastrl.kl_shaped_advantages(torch.ones(3), X, X, kl_coef=1), ValueError, "advantages", "(4, 1)"),
    ("target of 0", lambda: fastrl.AdaptiveKLController(0.1, 0, 10), ValueError, "target", "above 0"),
    ("NaN measured", lambda: fastrl.AdaptiveKLController(0.1, 1, 10).update(NAN, 1), ValueError, "kl", "finite"),
    ("KL per token", lambda: fastrl.AdaptiveKLController(0.1, 1, 10).update(X, 1), ValueError, "kl", "()"),
    ("initial out of bounds", lambda: fastrl.AdaptiveEntropyController(2.0, 0.5), ValueError, "initial", "[0.0, 1.0]"),
    ("text as a coefficient", lambda: fastrl.FixedKLController("0.1"), TypeError, "coef", "number"),
]  # fmt: skip


@pytest.mark.parametrize("row", MISUSES, ids=lambda row: row[0])
def test_misuse(row):
    _, function, error, *words = row
    with pytest.raises(error) as caught:
        function()
    assert type(caught.value) is error and str(caught.value).startswith(words[0])
    assert all(word in str(caught.value) for word in words)
