"""The data types: LossSpec, Rollouts, LMHead, Metrics, advantages."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from common import ON_CPU, OPTIONS, PRESETS, clean_logits, close, make_batch
from hypothesis import given
from hypothesis import strategies as st

import fastrl
from fastrl import LossSpec
from fastrl.spec import spec_of


class TestLossSpec:
    def test_defaults_are_those_of_the_contract(self):
        spec = LossSpec()
        assert (spec.kl_coef, spec.entropy_coef, spec.epsilon_low, spec.epsilon_high) == (0, 0, 0.2, 0.2)
        assert (spec.log_ratio_clamp, spec.advantage_eps, spec.objective) == (20, 1e-4, "ppo_clip")

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_by_name(self, name):
        assert LossSpec.preset(name.upper().replace("_", "-")) == PRESETS[name]
        assert LossSpec.preset(name, kl_coef=0.5).kl_coef == 0.5

    def test_frozen_hashable_and_checked_again(self):
        spec = fastrl.DAPO
        with pytest.raises(dataclasses.FrozenInstanceError):
            spec.kl_coef = 1.0
        assert hash(spec) == hash(LossSpec(epsilon_high=0.28)) and spec == LossSpec(epsilon_high=0.28)
        with pytest.raises(ValueError, match="delta"):
            spec.replace(delta=1.2)

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies_are_equal_and_have_their_own_key(self, duplicate):
        other = duplicate(fastrl.GSPO)
        assert other == fastrl.GSPO and other.key != fastrl.GSPO.key and spec_of(other.key) is other

    def test_enums_are_strings(self):
        assert fastrl.GSPO.ratio_level == "sequence" and str(fastrl.GRPO.aggregation) == "seq-mean-token-mean"


class TestRollouts:
    def test_split_keeps_groups_whole(self):
        batch = make_batch(B=6, group_size=3)
        whole = fastrl.advantages.sequence_advantages(batch.rollouts.flat, fastrl.GRPO)
        parts = batch.rollouts.split(4)
        assert [part.num_sequences for part in parts] == [2, 2, 1, 1]
        torn = torch.cat([fastrl.advantages.sequence_advantages(part.flat, fastrl.GRPO) for part in parts])
        assert torch.equal(torn, whole)
        again = torch.cat(
            [fastrl.advantages.sequence_advantages(p.flat, fastrl.GRPO) for part in parts[:2] for p in part.split(2)]
        )
        assert torch.equal(again, whole[:4])

    @pytest.mark.parametrize("per_token", [False, True])
    def test_split_of_packed(self, per_token):
        cu = torch.tensor([0, 2, 2, 3, 7])
        ids, mask = torch.arange(7), torch.tensor([1, 1, 0, 1, 1, 0, 1])
        advantages = torch.randn(7 if per_token else 4)
        rollouts = fastrl.Rollouts(ids, mask, advantages, old_logps=-torch.ones(7), cu_seqlens=cu)
        logps = -torch.rand(7)
        spec = fastrl.GRPO
        whole = fastrl.policy_loss(logps, rollouts, spec)
        parts = rollouts.split(3)
        normalizer = rollouts.normalizer(spec)
        total = sum(fastrl.policy_loss(logps[p.token_slice], p, spec, normalizer=normalizer).loss for p in parts)
        close(total, whole.loss, ulps=8)
        assert [p.shape[0] for p in parts] == [2, 1, 4]

    def test_packed_advantages_stay_per_token_when_lengths_hide_it(self):
        """Two sequences and two valid tokens, both in the first sequence: (2,) advantages are still per token."""
        mask = torch.tensor([[1, 1], [0, 0]])
        advantages = torch.tensor([[1.0, 5.0], [9.0, 9.0]])
        padded = fastrl.Rollouts(torch.zeros(2, 2, dtype=torch.long), mask, advantages)
        packed, _ = padded.pack()
        a = fastrl.policy_loss(-torch.ones(2, 2), padded, fastrl.PPO).loss
        for backend in ON_CPU:
            assert fastrl.policy_loss(-torch.ones(2), packed, fastrl.PPO, backend=backend).loss == a == -3

    def test_ragged_groups_by_ids(self):
        rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0])
        ids = torch.tensor([7, -3, 7, -3, 100])
        got = fastrl.group_advantages(rewards, group_ids=ids)
        for value in (7, -3):
            group = rewards[ids == value]
            close(got[ids == value], (group - group.mean()) / (group.std() + 1e-4), ulps=16)
        assert got[4] == 0
        tokens = torch.zeros(5, 2, dtype=torch.long)
        logps = -torch.rand(5, 2)
        for backend in ON_CPU:
            inside = fastrl.policy_loss(logps, fastrl.Rollouts(tokens, rewards=rewards, group_ids=ids), backend=backend)
            outside = fastrl.policy_loss(logps, fastrl.Rollouts(tokens, advantages=got), backend=backend)
            close(inside.loss, outside.loss, ulps=16)

    def test_masks_of_every_dtype(self):
        batch = make_batch()
        logits = clean_logits(batch).float()
        want = fastrl.policy_loss_from_logits(logits, batch.rollouts).loss
        for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16):
            rollouts = dataclasses.replace(batch.rollouts, mask=batch.rollouts.mask.to(dtype))
            assert torch.equal(fastrl.policy_loss_from_logits(logits, rollouts).loss, want)
            logps = fastrl.logprobs_from_logits(logits, rollouts.token_ids, mask=rollouts.mask).logps
            assert (logps[~batch.rollouts.mask] == 0).all()

    def test_shift_for_next_token(self):
        """Position t scores token t + 1, without a copy."""
        logits, ids, mask = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)), torch.ones(2, 5)
        scores, targets, kept = fastrl.shift_for_next_token(logits, ids, mask)
        assert scores.data_ptr() == logits.data_ptr() and targets.shape == kept.shape == (2, 4)
        got = fastrl.logprobs_from_logits(scores, targets, mask=kept).logps
        close(got[0, 0], torch.log_softmax(logits[0, 0], -1)[ids[0, 1]], ulps=16)


class TestAdvantages:
    def test_zero_variance_and_single_sample_are_exactly_zero(self):
        """NeMo-RL#4161: 0.1 three times has a mean that is not 0.1 in float32."""
        rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0])
        for kwargs in ({}, {"baseline": "leave-one-out"}, {"scale": "none"}, {"scale": "batch"}):
            got = fastrl.group_advantages(rewards, group_size=3, **kwargs)
            assert (got[:3] == 0).all() and (got[3:] != 0).any()
            assert (fastrl.group_advantages(rewards, group_size=1, **kwargs) == 0).all()

    def test_golden(self):
        """(1, 2, 6): mean 3, unbiased std √7; leave-one-out baselines 4, 3.5, 1.5."""
        rewards = torch.tensor([1.0, 2.0, 6.0])
        want = torch.tensor([-2.0, -1.0, 3.0])
        close(fastrl.group_advantages(rewards, group_size=3), want / (7**0.5 + 1e-4), ulps=4)
        close(fastrl.group_advantages(rewards, group_size=3, scale="none"), want, ulps=4)
        got = fastrl.group_advantages(rewards, group_size=3, baseline="leave-one-out", scale="none")
        close(got, torch.tensor([-3.0, -1.5, 4.5]), ulps=4)

    @given(
        groups=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), min_size=1, max_size=5),
        seed=st.integers(0, 99),
    )
    def test_any_order_of_any_groups(self, groups, seed):
        """Ragged groups in any order equal each group by itself; advantages of a group sum to about 0."""
        rewards = torch.tensor([r for group in groups for r in group])
        ids = torch.tensor([i for i, group in enumerate(groups) for _ in group])
        order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
        got = torch.empty_like(rewards)
        got[order] = fastrl.group_advantages(rewards[order], group_ids=ids[order] * 37 - 5)
        for i, group in enumerate(groups):
            alone = fastrl.group_advantages(torch.tensor(group), group_size=len(group))
            assert torch.allclose(got[ids == i], alone, rtol=1e-5, atol=1e-6)
            assert abs(alone.double().sum()) < 1e-5 * len(group)

    def test_nan_reward_stays_visible(self):
        got = fastrl.group_advantages(torch.tensor([1.0, float("nan"), 1.0, 2.0]), group_size=2)
        assert got[:2].isnan().all() and got[2:].isfinite().all()


class TestMetrics:
    def test_values_by_hand(self):
        """Four tokens with ratios 0.5, 1, 1.5, 3 and advantages −, +, +, −, and one masked."""
        ratios = torch.tensor([[0.5, 1.0, 1.5, 3.0, 9.0]])
        advantages = torch.tensor([[-1.0, 1.0, 1.0, -1.0, 1.0]])
        mask = torch.tensor([[1, 1, 1, 1, 0]])
        old = torch.full((1, 5), -2.0)
        rollouts = fastrl.Rollouts(torch.zeros(1, 5, dtype=torch.long), mask, advantages, old_logps=old)
        for backend in ON_CPU:
            out = fastrl.policy_loss(old + ratios.log(), rollouts, fastrl.PPO.replace(dual_clip=2.0), backend=backend)
            values = out.metrics.to_floats()
            want = {
                "clip_fraction": 0.5,  # 0.5 below 0.8 with A < 0, and 1.5 above 1.2 with A > 0
                "clip_fraction_low": 0.25,
                "clip_fraction_high": 0.25,
                "dual_clip_fraction": 0.25,  # 3 > 2 with A < 0
                "ratio_mean": 1.5,
                "ratio_min": 0.5,
                "ratio_max": 3.0,
                "effective_sample_size": 6.0**2 / (0.25 + 1 + 2.25 + 9),
                "approx_kl": -(ratios[0, :4].log().mean().item()),
                "approx_kl_k3": (ratios[0, :4] - 1 - ratios[0, :4].log()).mean().item(),
                "clamped_fraction": 0.0,
                "tokens": 4.0,
                "sequences": 1.0,
            }
            assert values == pytest.approx(want, rel=1e-5)

    def test_absent_names_are_absent(self):
        out = fastrl.policy_loss(-torch.ones(1, 2), fastrl.Rollouts(torch.zeros(1, 2).long(), advantages=torch.ones(1)))
        assert not {"ref_kl", "entropy", "dual_clip_fraction", "rollout_weight_mean"} & set(out.metrics)
        assert len(out.metrics) == len(list(out.metrics)) and "clip_fraction" in repr(out.metrics)

    @pytest.mark.parametrize("backend", ON_CPU)
    def test_merge_with_an_empty_batch(self, backend):
        """A rank without tokens changes no metric, the extremes included."""
        batch = make_batch()
        logps = torch.full((4, 6), -2.0)
        full = fastrl.policy_loss(logps, batch.rollouts, backend=backend).metrics
        r = batch.rollouts
        none = fastrl.Rollouts(
            r.token_ids[:0],
            advantages=torch.ones(0),
            old_logps=r.old_logps[:0],
            ref_logps=r.ref_logps[:0],
            rollout_logps=r.rollout_logps[:0],
        )
        empty = fastrl.policy_loss(logps[:0], none, backend=backend).metrics
        assert empty["ratio_min"] == empty["ratio_max"] == 0
        assert full.merge(empty).to_floats() == pytest.approx(full.to_floats())

    @pytest.mark.parametrize("name", ["grpo", "gspo-full", "k3", "dual-clip"])
    def test_fractions_are_fractions(self, name):
        for seed in range(5):
            batch = make_batch(seed=seed, drift=1.0)
            out = fastrl.policy_loss_from_logits(clean_logits(batch).float(), batch.rollouts, OPTIONS[name])
            for metric, value in out.metrics.to_floats().items():
                if "fraction" in metric:
                    assert 0 <= value <= 1, metric
