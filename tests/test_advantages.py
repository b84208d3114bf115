"""Advantage estimators on every backend against plain loops over the formulas in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from common import BACKENDS, ON_CPU, close
from hypothesis import given
from hypothesis import strategies as st

import fastrl
from fastrl.spec import AdvantageBaseline, AdvantageScale

BASELINES, SCALES = [str(x) for x in AdvantageBaseline], [str(x) for x in AdvantageScale]
IDS = torch.tensor([7, -3, 7, 7, 100, -3, 7, 5, 5, 5])  # groups of 4, 2, 1 and 3, interleaved
REWARDS = torch.tensor([1.0, 0.25, -2.0, 0.5, 3.0, 0.75, 1.5, 0.1, 0.1, 0.1])  # the 5s are equal
LENGTHS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 0])


def groups_of(ids):
    return [[j for j in range(len(ids)) if ids[j] == ids[i]] for i in range(len(ids))]


def std(values):
    mean = math.fsum(values) / max(len(values), 1)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


def oracle(rewards, ids, baseline, scale, eps=1e-4, lengths=None):
    """One sample after the other, by the docstring."""
    r, out = rewards.double().tolist(), []
    batch = std(r)
    for i, group in enumerate(groups_of(ids.tolist())):
        mine, others = [r[j] for j in group], [r[j] for j in group if j != i]
        mean = math.fsum(mine) / len(mine)
        if baseline == "mean":
            a = r[i] - mean
        elif baseline == "leave-one-out":
            a = r[i] - math.fsum(others) / len(others) if others else 0.0
        elif baseline == "length-weighted":
            total = sum(lengths[j].item() for j in group)
            a = r[i] - sum(lengths[j].item() * r[j] for j in group) / total if total else 0.0
        else:
            a = r[i]
        if scale == "group":
            a /= std(mine) + eps
        elif scale == "batch":
            a /= batch + eps
        elif scale == "leave-one-out" and len(set(others)) > 1:
            a /= std(others) + eps
        elif scale == "mean":
            a = 0.0 if mean <= 0 else a / (mean + eps)
        looks = baseline != "none" or scale not in ("none", "batch")
        out.append(0.0 if looks and len(set(mine)) == 1 else a)
    return torch.tensor(out, dtype=torch.float64)


def call(backend, function, rewards, *, ids=None, **kwargs):
    name, device = backend
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    if ids is not None:
        moved["group_ids"] = ids.to(device)
    return function(rewards.to(device), **moved, backend=name).cpu()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("backend", BACKENDS)
class TestGroupAdvantages:
    def arguments(self, baseline, lengths=LENGTHS):
        return {"lengths": lengths} if baseline == "length-weighted" else {}

    def test_ragged_interleaved_groups(self, backend, baseline, scale):
        more = self.arguments(baseline)
        got = call(backend, fastrl.group_advantages, REWARDS, ids=IDS, baseline=baseline, scale=scale, **more)
        want = oracle(REWARDS, IDS, baseline, scale, lengths=LENGTHS)
        close(got, want, ulps=16)
        assert torch.equal(got == 0, want == 0)

    @pytest.mark.parametrize("size", [1, 4, 70])
    def test_groups_of_one_size(self, backend, baseline, scale, size):
        """140 samples: more than one program, and groups that end inside a block and far beyond it."""
        rewards, lengths = torch.randn(140), torch.randint(0, 9, (140,))
        rewards[:4] = 0.1
        more = self.arguments(baseline, lengths)
        got = call(backend, fastrl.group_advantages, rewards, group_size=size, baseline=baseline, scale=scale, **more)
        ids = torch.arange(140) // size
        want = oracle(rewards, ids, baseline, scale, lengths=lengths)
        close(got, want, ulps=128)
        assert torch.equal(got == 0, want == 0)
        by_id = call(
            backend, fastrl.group_advantages, rewards, ids=ids * 11 - 3, baseline=baseline, scale=scale, **more
        )
        close(by_id, want, ulps=128)

    def test_empty(self, backend, baseline, scale):
        more = self.arguments(baseline, torch.zeros(0))
        got = call(
            backend, fastrl.group_advantages, torch.zeros(0), group_size=4, baseline=baseline, scale=scale, **more
        )
        assert got.shape == (0,) and got.dtype == torch.float32

    def test_inputs_of_other_layouts_and_dtypes(self, backend, baseline, scale):
        """A strided view, bf16 rewards, int32 ids: as the same numbers in fp32."""
        rewards = REWARDS.bfloat16()
        strided = torch.stack([rewards, rewards * float("nan")], 1)[:, 0]
        more = self.arguments(baseline)
        got = call(backend, fastrl.group_advantages, strided, ids=IDS.int(), baseline=baseline, scale=scale, **more)
        assert got.dtype == torch.float32
        close(got, oracle(rewards, IDS, baseline, scale, lengths=LENGTHS), ulps=16)


@pytest.mark.parametrize("backend", BACKENDS)
class TestEdges:
    def test_nothing_left_of_equal_rewards(self, backend):
        """0.1 has no exact fp32 mean over 3; a residue over eps would be an advantage of its own."""
        rewards = torch.full((12,), 0.1)
        for baseline, scale in (("mean", "group"), ("leave-one-out", "leave-one-out"), ("mean", "mean")):
            got = call(backend, fastrl.group_advantages, rewards, group_size=3, baseline=baseline, scale=scale, eps=0)
            assert (got == 0).all()

    def test_std_of_equal_others_is_no_residue(self, backend):
        """The others of the first sample are equal: it is not divided by what rounding leaves of their std, which with
        E[x²] − E[x]² in fp32 is 1.6e-4 and makes the advantage 4000 times larger (NeMo-RL#4161)."""
        for value in (0.1, 0.7, 1 / 3, 1e3 + 0.1):
            rewards = torch.tensor([value + 1.0, *[value] * 7])
            got = call(
                backend, fastrl.group_advantages, rewards, group_size=8, baseline="leave-one-out",
                scale="leave-one-out", eps=1e-6,
            )  # fmt: skip
            close(got[0], rewards[0].double() - rewards[1].double(), ulps=4)
            close(got, oracle(rewards, torch.zeros(8), "leave-one-out", "leave-one-out", 1e-6), ulps=16)

    def test_std_of_close_others(self, backend):
        """An outlier of 1000 among rewards that differ by 1e-3: its others' std keeps its digits."""
        rewards = torch.tensor([1000.0, 1.0, 1.001, 0.999, 1.002])
        got = call(backend, fastrl.group_advantages, rewards, group_size=5, scale="leave-one-out", eps=1e-9)
        close(got, oracle(rewards, torch.zeros(5), "mean", "leave-one-out", 1e-9), ulps=64)

    def test_common_offset_costs_no_digits(self, backend):
        """Rewards of 10⁴ ± 1: std and mean are those of the differences."""
        rewards = 1e4 + torch.tensor([1.0, 0.5, -1.0, 0.25, -0.125, 0.5])
        got = call(backend, fastrl.group_advantages, rewards, group_size=6)
        close(got, oracle(rewards, torch.zeros(6), "mean", "group"), ulps=16)

    def test_nan_stays_visible_in_its_group_only(self, backend):
        rewards = torch.tensor([1.0, float("nan"), 1.0, 2.0])
        for baseline in ("mean", "leave-one-out"):
            for scale in ("group", "none", "leave-one-out", "mean"):
                got = call(backend, fastrl.group_advantages, rewards, group_size=2, baseline=baseline, scale=scale)
                assert got[:2].isnan().all() and got[2:].isfinite().all()
        got = call(backend, fastrl.pass_at_k_advantages, rewards, group_size=2)
        assert got[:2].isnan().all() and got[2:].isfinite().all()

    def test_lengths_of_zero(self, backend):
        rewards, lengths = torch.tensor([1.0, 2.0, 1.0, 2.0]), torch.tensor([0, 0, 0, 3])
        got = call(
            backend, fastrl.group_advantages, rewards, group_size=2, baseline="length-weighted", scale="none",
            lengths=lengths,
        )  # fmt: skip
        assert got.tolist() == [0, 0, -1, 0]

    def test_maxrl_by_hand(self, backend):
        """(r − μ)/μ: two of four right gives 1 and −1; one of four gives 3 and −1; a mean of 0 or less gives 0."""
        rewards = torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 0, -1, 1, 0, 0])
        got = call(backend, fastrl.group_advantages, rewards, group_size=4, scale="mean", eps=0)
        assert got.tolist() == [1, 1, -1, -1, 3, -1, -1, -1, 0, 0, 0, 0]


def test_float64_stays_float64():
    rewards = REWARDS.double() + 1e-12 * torch.arange(10)
    for function in (fastrl.group_advantages, fastrl.pass_at_k_advantages, fastrl.gpg_advantages):
        assert function(rewards, group_ids=IDS).dtype == torch.float64
    got = fastrl.group_advantages(rewards, group_ids=IDS)
    assert (got - oracle(rewards, IDS, "mean", "group")).abs().max() < 1e-12


def test_std_of_equal_others_in_float64():
    """As above where 0.1 has no exact mean: the first sample's A is the difference, not divided by anything."""
    for n in range(3, 13):
        rewards = torch.tensor([1.1, *[0.1] * (n - 1)], dtype=torch.float64)
        got = fastrl.group_advantages(rewards, group_size=n, baseline="leave-one-out", scale="leave-one-out", eps=0)
        assert abs(got[0] - 1) < 1e-12


@given(
    groups=st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=5), min_size=1, max_size=4),
    baseline=st.sampled_from([b for b in BASELINES if b != "length-weighted"]),
    scale=st.sampled_from(SCALES),
    seed=st.integers(0, 99),
)
def test_any_groups_in_any_order(groups, baseline, scale, seed):
    """Few distinct rewards, so that equal groups, equal others and ties are common."""
    order = torch.randperm(sum(map(len, groups)), generator=torch.Generator().manual_seed(seed))
    rewards = torch.tensor([r / 7 for group in groups for r in group])[order]
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group])[order]
    want = oracle(rewards, ids, baseline, scale)
    for name in ON_CPU:
        got = fastrl.group_advantages(rewards, group_ids=ids, baseline=baseline, scale=scale, backend=name)
        assert torch.allclose(got.double(), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_the_loss(backend, baseline, scale, level):
    """Rewards given to the loss, by size and by ids, equal advantages given to it; the gradient shows each."""
    name, device = backend
    spec = fastrl.PPO.replace(advantage_baseline=baseline, advantage_scale=scale, ratio_level=level)
    rewards = torch.tensor([0.3, 1.0, -0.2, 0.1, 0.1, 0.1, 1.0, 0.0, 0.0])
    ids = torch.arange(9) // 3
    tokens, old = torch.zeros(9, 4, dtype=torch.long, device=device), -torch.rand(9, 4, device=device)
    logps = (old + 0.1 * torch.randn(9, 4, device=device)).requires_grad_()

    def gradient(**given):
        rollouts = fastrl.Rollouts(tokens, **given, old_logps=old)
        return torch.autograd.grad(fastrl.policy_loss(logps, rollouts, spec, backend=name).loss, logps)[0]

    want = gradient(advantages=oracle(rewards, ids, baseline, scale).float().to(device))
    close(gradient(rewards=rewards.to(device), group_size=3), want, ulps=32)
    close(gradient(rewards=rewards.to(device), group_ids=ids.to(device)), want, ulps=32)


def test_length_weighted_is_no_field_of_a_loss():
    with pytest.raises(ValueError, match="advantage_baseline: 'length-weighted'.*group_advantages"):
        fastrl.LossSpec(advantage_baseline="length-weighted")


@pytest.mark.parametrize("backend", BACKENDS)
class TestPassAtK:
    @pytest.mark.parametrize("scale", ["group", "none"])
    def test_only_the_best_leads(self, backend, scale):
        ids = torch.tensor([0, 1, 0, 1, 0, 2, 1, 1, 3, 3])
        rewards = torch.tensor([0.2, 1.0, 0.9, 0.5, 0.4, 3.0, 0.75, -1.0, 2.0, 2.0])
        got = call(backend, fastrl.pass_at_k_advantages, rewards, ids=ids, scale=scale)
        want = torch.zeros(10, dtype=torch.float64)
        for i, group in enumerate(groups_of(ids.tolist())):
            mine = [rewards[j].double().item() for j in group]
            best = sorted(mine)[-2:]
            if len(mine) > 1 and mine[group.index(i)] == best[1]:
                want[i] = (best[1] - best[0]) / (std(mine) + 1e-6 if scale == "group" else 1)
        close(got, want, ulps=16)
        assert torch.equal(got == 0, want == 0) and (got != 0).sum() == 2


@pytest.mark.parametrize("backend", BACKENDS)
class TestGPG:
    def test_against_a_loop(self, backend):
        got = call(backend, fastrl.gpg_advantages, REWARDS, ids=IDS, f_norm=2.0)
        want = oracle(REWARDS, IDS, "mean", "none") * (10 / 6) / 2  # groups 7 and −3 vary: 6 of 10 samples
        close(got, want, ulps=16)
        assert torch.equal(got == 0, want == 0)

    def test_given_alpha(self, backend):
        want = oracle(REWARDS, IDS, "mean", "none") * 1.5
        close(call(backend, fastrl.gpg_advantages, REWARDS, ids=IDS, alpha=1.5), want, ulps=16)
        close(call(backend, fastrl.gpg_advantages, REWARDS, ids=IDS, alpha=torch.tensor(1.5)), want, ulps=16)

    def test_no_signal_at_all(self, backend):
        assert (call(backend, fastrl.gpg_advantages, torch.full((6,), 0.1), group_size=3) == 0).all()
        assert call(backend, fastrl.gpg_advantages, torch.zeros(0), group_size=3).shape == (0,)


def gdpo_oracle(rewards, ids, weights, whiten, lengths, eps=1e-4):
    x = sum(w * oracle(rewards[:, k], ids, "mean", "group", eps) for k, w in enumerate(weights))
    if whiten == "none":
        return x
    counts = lengths.tolist() if whiten == "tokens" else [1] * len(x)
    every = [v for v, n in zip(x.tolist(), counts, strict=True) for _ in range(n)]
    mean, spread = math.fsum(every) / len(every), std(every)
    white = (x - mean) / (math.sqrt(spread**2 + 1e-8) if whiten == "tokens" else spread + eps)
    for i, group in enumerate(groups_of(ids.tolist())):
        if all((rewards[j] == rewards[i]).all() for j in group):
            white[i] = 0
    return white


@pytest.mark.parametrize("whiten", ["batch", "tokens", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
class TestGDPO:
    @pytest.mark.parametrize("K", [1, 3])
    def test_against_a_loop(self, backend, whiten, K):
        rewards = torch.stack([REWARDS, REWARDS.flip(0).round(), torch.arange(10.0) % 3], 1)[:, :K].clone()
        rewards[7:] = torch.tensor([0.1, -0.7, 1 / 3])[:K]  # a group that varies in no reward
        weights = torch.tensor([0.5, 2.0, -1.0])[:K]
        more = {"lengths": LENGTHS} if whiten == "tokens" else {}
        got = call(backend, fastrl.gdpo_advantages, rewards, ids=IDS, weights=weights, whiten=whiten, **more)
        want = gdpo_oracle(rewards, IDS, weights.tolist(), whiten, LENGTHS)
        close(got, want, ulps=64)
        assert torch.equal(got == 0, want == 0) and (got[7:] == 0).all() and got[4] == 0

    def test_more_than_one_step_of_the_last_program(self, backend, whiten):
        rewards, lengths = torch.randn(1100, 2), torch.randint(0, 5, (1100,))
        more = {"lengths": lengths} if whiten == "tokens" else {}
        got = call(backend, fastrl.gdpo_advantages, rewards, group_size=4, whiten=whiten, **more)
        close(got, gdpo_oracle(rewards, torch.arange(1100) // 4, [1, 1], whiten, lengths), ulps=256)

    def test_nothing_varies_and_nothing_given(self, backend, whiten):
        more = {"lengths": torch.ones(6)} if whiten == "tokens" else {}
        assert (
            call(backend, fastrl.gdpo_advantages, torch.full((6, 2), 0.1), group_size=3, whiten=whiten, **more) == 0
        ).all()
        more = {"lengths": torch.ones(0)} if whiten == "tokens" else {}
        assert call(backend, fastrl.gdpo_advantages, torch.zeros(0, 2), group_size=3, whiten=whiten, **more).shape == (
            0,
        )

    def test_nan_stays_visible(self, backend, whiten):
        rewards = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [1.0, 0.0], [0.0, 0.5]])
        more = {"lengths": torch.ones(4)} if whiten == "tokens" else {}
        got = call(backend, fastrl.gdpo_advantages, rewards, group_size=2, whiten=whiten, **more)
        assert got[:2].isnan().all()


MISUSES = [
    ("several rewards", lambda: fastrl.group_advantages(torch.ones(4, 2), group_size=2), ValueError, "rewards", "gdpo_advantages"),
    ("one reward of gdpo", lambda: fastrl.gdpo_advantages(torch.ones(4), group_size=2), ValueError, "rewards", "(S, K)"),
    ("OPO without lengths", lambda: fastrl.group_advantages(REWARDS, group_ids=IDS, baseline="length-weighted"), ValueError, "lengths", "None"),
    ("lengths without OPO", lambda: fastrl.group_advantages(REWARDS, group_ids=IDS, lengths=LENGTHS), ValueError, "lengths", "'mean'"),
    ("lengths of another shape", lambda: fastrl.group_advantages(REWARDS, group_ids=IDS, baseline="length-weighted", lengths=LENGTHS[:3]), ValueError, "lengths", "(10,)"),
    ("negative eps", lambda: fastrl.group_advantages(REWARDS, group_ids=IDS, eps=-1), ValueError, "eps", "above 0"),
    ("unknown scale", lambda: fastrl.group_advantages(REWARDS, group_ids=IDS, scale="std"), ValueError, "scale", "'leave-one-out'"),
    ("batch scale of pass@k", lambda: fastrl.pass_at_k_advantages(REWARDS, group_ids=IDS, scale="batch"), ValueError, "scale", "'group'"),
    ("integer rewards", lambda: fastrl.gpg_advantages(IDS, group_ids=IDS), TypeError, "rewards", "float"),
    ("no groups", lambda: fastrl.gpg_advantages(REWARDS), ValueError, "group_size", "exactly one"),
    ("f_norm of 0", lambda: fastrl.gpg_advantages(REWARDS, group_ids=IDS, f_norm=0), ValueError, "f_norm", "above 0"),
    ("alpha per sample", lambda: fastrl.gpg_advantages(REWARDS, group_ids=IDS, alpha=REWARDS), ValueError, "alpha", "()"),
    ("weights of another count", lambda: fastrl.gdpo_advantages(torch.ones(4, 2), group_size=2, weights=torch.ones(3)), ValueError, "weights", "(2,)"),
    ("unknown whitening", lambda: fastrl.gdpo_advantages(torch.ones(4, 2), group_size=2, whiten="token"), ValueError, "whiten", "'tokens'"),
    ("tokens without lengths", lambda: fastrl.gdpo_advantages(torch.ones(4, 2), group_size=2, whiten="tokens"), ValueError, "lengths", "'tokens'"),
    ("divisor of the rewards", lambda: fastrl.gdpo_advantages(torch.ones(4, 2), group_size=3), ValueError, "group_size", "4 rewards"),
]  # fmt: skip


@pytest.mark.parametrize("row", MISUSES, ids=lambda row: row[0])
def test_misuse(row):
    _, function, error, *words = row
    with pytest.raises(error) as caught:
        function()
    assert type(caught.value) is error and str(caught.value).startswith(words[0])
    assert all(word in str(caught.value) for word in words)
