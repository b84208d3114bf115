"""Per-token estimators on every backend against plain loops over the formulas."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from common import ACCELERATOR, BACKENDS, close

import fastrl

NAN = float("nan")
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
IDS = torch.tensor([4, 9, 4, 9, 4])


def batch(dtype=torch.float32, seed=0):
    """Token rewards with NaN wherever the mask is 0."""
    rewards = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return rewards.masked_fill(~MASK, NAN)


def places(mask=MASK):
    return [[t for t in range(mask.shape[1]) if mask[i, t]] for i in range(mask.shape[0])]


def returns_of(rewards, gamma=1.0):
    """A masked step is no step."""
    out = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, row in enumerate(places()):
        running = 0.0
        for t in reversed(row):
            running = rewards[i, t].item() + gamma * running
            out[i, t] = running
    return out


def whitened(values, unbiased=True):
    every = values[MASK].tolist()
    mean = math.fsum(every) / len(every)
    variance = statistics.variance(every) if unbiased else statistics.pvariance(every)
    return torch.where(MASK, (values - mean) / math.sqrt(variance + 1e-8), 0)


@pytest.mark.parametrize("backend", BACKENDS)
class TestReinforcePlusPlus:
    @pytest.mark.parametrize("gamma", [1.0, 0.9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_against_a_loop(self, backend, gamma, dtype):
        name, device = backend
        rewards = batch(dtype)
        got = fastrl.reinforce_plus_plus_advantages(rewards.to(device), mask=MASK.to(device), gamma=gamma, backend=name)
        assert got.dtype == torch.float32
        close(got, whitened(returns_of(rewards, gamma)), ulps=32)

    def test_biased(self, backend):
        name, device = backend
        got = fastrl.reinforce_plus_plus_advantages(
            batch().to(device), mask=MASK.to(device), unbiased=False, backend=name
        )
        close(got, whitened(returns_of(batch()), unbiased=False), ulps=32)

    def test_group_baseline(self, backend):
        """Samples 0, 2 and 4 are one group; 1 and 3 another, whose rewards are equal: exactly 0."""
        name, device = backend
        rewards = torch.tensor([1.0, 0.1, 0.0, 0.1, 0.25])
        got = fastrl.reinforce_plus_plus_baseline_advantages(
            rewards.to(device), mask=MASK.to(device), group_ids=IDS.to(device), backend=name
        ).cpu()
        mean = {4: 1.25 / 3, 9: rewards[1].item()}
        centred = torch.tensor([rewards[i].item() - mean[IDS[i].item()] for i in range(5)], dtype=torch.float64)
        want = whitened(centred[:, None].expand(5, 5))
        want[1] = 0
        close(got, want, ulps=16)
        assert torch.equal(got == 0, want == 0)

    def test_nothing(self, backend):
        name, device = backend
        empty = torch.zeros(0, 3, device=device)
        assert fastrl.reinforce_plus_plus_advantages(empty, backend=name).shape == (0, 3)
        all_masked = torch.full((2, 3), NAN, device=device)
        got = fastrl.reinforce_plus_plus_advantages(all_masked, mask=torch.zeros(2, 3, device=device), backend=name)
        assert (got == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
class TestReMax:
    def test_one_reward_per_sequence(self, backend):
        name, device = backend
        rewards, greedy = torch.tensor([1.0, 0.0, 2.5]).to(device), torch.tensor([0.5, 1.0, 2.5]).to(device)
        assert fastrl.remax_advantages(rewards, greedy, backend=name).tolist() == [0.5, -1.0, 0.0]

    def test_one_reward_per_token(self, backend):
        name, device = backend
        greedy = torch.tensor([0.5, 1.0, -2.5, NAN, 0.0])  # the fourth sequence has no token
        got = fastrl.remax_advantages(batch().to(device), greedy.to(device), mask=MASK.to(device), backend=name)
        close(got, torch.where(MASK, returns_of(batch()) - greedy[:, None].double(), 0), ulps=16)


def otb_loop(rewards, logps, squared, ids, *, align, keep_tail, weights=None, eps=1e-8):
    """Column by column; a column is a position, or the n-th valid token."""
    out, returns, rows = torch.zeros(rewards.shape, dtype=torch.float64), returns_of(rewards), places()
    path = torch.zeros_like(out)
    for i, row in enumerate(rows):
        running = 0.0
        for t in row:
            rho = 1.0 if weights is None else weights[i, t].item()
            running += rho**2 * (1 - 2 * math.exp(logps[i, t].item()) + squared[i, t].item())
            path[i, t] = running
    for value in set(ids.tolist()):
        members = [i for i in range(len(ids)) if ids[i] == value]
        columns = []
        for c in range(rewards.shape[1]):
            if align == "position":
                columns.append([(i, c) for i in members if c in rows[i]])
            else:
                columns.append([(i, rows[i][c]) for i in members if c < len(rows[i])])
        if all(len({returns[place].item() for place in column}) <= 1 for column in columns):
            continue  # nothing to compare, or nothing that differs
        for column in columns:
            if len(column) == 1 and keep_tail:
                out[column[0]] = returns[column[0]]
            elif len({returns[place].item() for place in column}) > 1:
                total = sum(path[place].item() for place in column) + eps
                base = sum((returns[place] * path[place]).item() for place in column) / total
                for place in column:
                    out[place] = returns[place] - base
    return out


class TestOptimalTokenBaseline:
    def inputs(self, V=7, dtype=torch.float32):
        g = torch.Generator().manual_seed(3)
        p = torch.softmax(torch.randn(5, 5, V, generator=g, dtype=torch.float64), -1)
        token = torch.randint(0, V, (5, 5, 1), generator=g)
        logps, squared = p.gather(2, token).squeeze(2).log().to(dtype), (p * p).sum(2).to(dtype)
        return logps.masked_fill(~MASK, NAN), squared.masked_fill(~MASK, math.inf)

    @pytest.mark.accelerator
    @pytest.mark.parametrize("keep_tail", [True, False])
    @pytest.mark.parametrize("align", ["position", "token"])
    @pytest.mark.parametrize("weighted", [True, False])
    def test_against_a_loop(self, align, keep_tail, weighted):
        logps, squared = self.inputs()
        weights = (torch.rand(5, 5) + 0.5).masked_fill(~MASK, NAN) if weighted else None
        rewards, *tensors = (x.to(ACCELERATOR) for x in (batch(), logps, squared, MASK, IDS))
        got = fastrl.optimal_token_baseline_advantages(
            rewards, *tensors[:2], mask=tensors[2], group_ids=tensors[3],
            rollout_weights=weights.to(ACCELERATOR) if weighted else None, align=align, keep_tail=keep_tail,
        ).cpu()  # fmt: skip
        want = otb_loop(batch(), logps, squared, IDS, align=align, keep_tail=keep_tail, weights=weights)
        close(got, want, ulps=32)
        assert torch.equal(got == 0, want == 0)

    def test_baseline_by_hand(self):
        """π = 1/2 of two tokens: W = 1 − 1 + 1/2 = 1/2, then 1; equal weights, so B is the mean of the returns."""
        rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        logps, squared = torch.full((2, 2), math.log(0.5)), torch.full((2, 2), 0.5)
        got = fastrl.optimal_token_baseline_advantages(rewards, logps, squared, group_size=2, eps=0)
        close(got, torch.tensor([[0.5, 0.5], [-0.5, -0.5]]), ulps=4)

    def test_equal_outcomes_and_single_samples_are_exactly_0(self):
        """0.1 at the end of each of a group, of different lengths: no signal, the tail of the longest included."""
        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
        rewards = torch.tensor([[0, 0, 0.1], [0.1, 0, 0], [0, 0.1, 0]])
        logps, squared = -torch.rand(3, 3), torch.rand(3, 3)
        for given in ({"group_size": 3}, {"group_size": 1}):
            got = fastrl.optimal_token_baseline_advantages(rewards, logps, squared, mask=mask, **given)
            assert (got == 0).all()

    def test_dtypes_and_empty(self):
        logps, squared = self.inputs(dtype=torch.float64)
        got = fastrl.optimal_token_baseline_advantages(batch().double(), logps, squared, mask=MASK, group_ids=IDS)
        want = otb_loop(batch(), logps, squared, IDS, align="position", keep_tail=True)
        assert got.dtype == torch.float64 and (got - want).abs().max() < 1e-12
        none = torch.zeros(0, 3)
        for align in ("position", "token"):
            assert fastrl.optimal_token_baseline_advantages(none, none, none, group_size=2, align=align).shape == (0, 3)
            wide = torch.zeros(2, 0)
            got = fastrl.optimal_token_baseline_advantages(wide, wide, wide, group_size=2, align=align)
            assert got.shape == (2, 0)


R, ONE = torch.ones(4, 3), torch.ones(4)
MISUSES = [
    ("R++ of sequences", lambda: fastrl.reinforce_plus_plus_advantages(ONE), ValueError, "rewards", "(B, T)"),
    ("R++ mask", lambda: fastrl.reinforce_plus_plus_advantages(R, mask=ONE), ValueError, "mask", "(4, 3)"),
    ("baseline mask", lambda: fastrl.reinforce_plus_plus_baseline_advantages(ONE, mask=ONE, group_size=2), ValueError, "mask", "(4, T)"),
    ("baseline of tokens", lambda: fastrl.reinforce_plus_plus_baseline_advantages(R, mask=R, group_size=2), ValueError, "rewards", "(S,)"),
    ("greedy of another batch", lambda: fastrl.remax_advantages(ONE, ONE[:3]), ValueError, "greedy_rewards", "(4,)"),
    ("mask without tokens", lambda: fastrl.remax_advantages(ONE, ONE, mask=R), ValueError, "mask", "(B, T)"),
    ("logps of another shape", lambda: fastrl.optimal_token_baseline_advantages(R, ONE, R, group_size=2), ValueError, "logps", "(4, 3)"),
    ("integer squares", lambda: fastrl.optimal_token_baseline_advantages(R, R, R.long(), group_size=2), TypeError, "sum_pi_squared", "float"),
    ("no groups", lambda: fastrl.optimal_token_baseline_advantages(R, R, R), ValueError, "group_size", "exactly one"),
    ("alignment", lambda: fastrl.optimal_token_baseline_advantages(R, R, R, group_size=2, align="tokens"), ValueError, "align", "'token'"),
]  # fmt: skip


@pytest.mark.parametrize("row", MISUSES, ids=lambda row: row[0])
def test_misuse(row):
    _, function, error, *words = row
    with pytest.raises(error) as caught:
        function()
    assert type(caught.value) is error and str(caught.value).startswith(words[0])
    assert all(word in str(caught.value) for word in words)
