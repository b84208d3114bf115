"""Advantages per sequence: the peers' own estimators and ours on the same rewards."""

from __future__ import annotations

import pytest
import torch
from parity import peers
from parity.batches import B, T, make_batch
from torch import Tensor

import fastrl

GROUP = 3
REWARDS = torch.tensor([[1.0, 0.2], [0.0, -0.4], [1.0, 0.9], [0.5, 0.1], [2.0, 0.1], [-1.0, 0.1]], dtype=torch.float64)


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=rtol)


BESSEL = 5e-8  # TRL takes n/(n − 1) in float32, which holds 3/2 and not 6/5


class TestTRL:
    """`_generate_and_score_completions` of its trainers, with generation replaced."""

    @staticmethod
    def theirs(rewards: Tensor, kind: str = "GRPO", **options) -> Tensor:
        pytest.importorskip("trl", reason="needs trl 1.16")
        from parity.trl_cases import configured, scored

        return scored(configured(kind, options), make_batch(), rewards)["advantages"]

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    def test_group(self, scale):
        ours = fastrl.group_advantages(REWARDS.sum(1), group_size=GROUP, scale=scale)
        close(ours, self.theirs(REWARDS, scale_rewards=scale), BESSEL if scale == "batch" else 1e-10)

    def test_a_group_of_equal_rewards(self):
        rewards = REWARDS.clone()
        rewards[:GROUP] = 0.3
        ours = fastrl.group_advantages(rewards.sum(1), group_size=GROUP)
        close(ours, self.theirs(rewards))
        assert not ours[:GROUP].any()

    def test_leave_one_out(self):
        ours = fastrl.group_advantages(REWARDS.sum(1), group_size=GROUP, baseline="leave-one-out", scale="none")
        close(ours, self.theirs(REWARDS, "RLOO"))
        standardised = (ours - ours.mean()) / (ours.std() + 1e-4)
        close(standardised, self.theirs(REWARDS, "RLOO", normalize_advantages=True), BESSEL)

    def test_normalize_then_sum(self):
        ours = fastrl.gdpo_advantages(REWARDS, group_size=GROUP)
        theirs = self.theirs(REWARDS, multi_objective_aggregation="normalize_then_sum")
        close(ours, theirs, BESSEL)

    def test_unscorable_differs(self):
        """A completion that no reward function scored: TRL leaves it out of its group, with us it stays visible."""
        rewards = REWARDS.clone()
        rewards[1] = torch.nan
        theirs = self.theirs(rewards)
        ours = fastrl.group_advantages(rewards.sum(1), group_size=GROUP)
        assert ours[:GROUP].isnan().all() and theirs[1] == 0
        both = fastrl.group_advantages(rewards.sum(1)[[0, 2]], group_size=2)
        close(torch.stack([both[0], torch.zeros(()), both[1]]), theirs[:GROUP])
        close(ours[GROUP:], theirs[GROUP:])


GROUPS = torch.tensor([4, 1, 4, 1, 4, 7])  # the last prompt was sampled once
ALONE = 5


class TestVerl:
    """Its registered estimators on outcome rewards: one number per sequence, at its tokens."""

    @staticmethod
    def theirs(name: str, rewards: Tensor, **options) -> Tensor:
        verl = peers.verl()
        mask = make_batch(empty=False).mask
        scores = torch.zeros(B, T, dtype=rewards.dtype)
        scores[:, 0] = rewards  # the first token of every completion counts
        estimator = verl.core.get_adv_estimator_fn(name)
        advantages, _ = estimator(scores, mask, index=GROUPS.numpy(), **options)
        assert not advantages[mask == 0].any()
        return advantages

    @classmethod
    def per_sequence(cls, name: str, rewards: Tensor, **options) -> Tensor:
        """(B,): what the first token holds, and all others too."""
        advantages = cls.theirs(name, rewards, **options)
        mask = make_batch(empty=False).mask
        assert torch.equal(advantages, advantages[:, :1] * mask)
        return advantages[:, 0]

    @pytest.mark.parametrize(("scale", "by_std"), [("group", True), ("none", False)])
    def test_grpo(self, scale, by_std):
        """But for the group of one, where verl takes mean 0 and std 1."""
        rewards = REWARDS[:, 0]
        ours = fastrl.group_advantages(rewards, group_ids=GROUPS, scale=scale, eps=1e-6)
        theirs = self.per_sequence("grpo", rewards, norm_adv_by_std_in_grpo=by_std)
        close(ours[:ALONE], theirs[:ALONE])
        assert ours[ALONE] == 0
        assert theirs[ALONE].item() == pytest.approx(rewards[ALONE].item() / (1 + 1e-6 * by_std), rel=6e-8)
        vectorised = self.per_sequence("grpo_vectorized", rewards, norm_adv_by_std_in_grpo=by_std)
        close(vectorised, theirs, rtol=1e-6)  # which computes in float32

    def test_rloo(self):
        """verl's two disagree on the group of one: r and 0."""
        rewards = REWARDS[:, 0]
        ours = fastrl.group_advantages(rewards, group_ids=GROUPS, baseline="leave-one-out", scale="none")
        close(ours, self.per_sequence("rloo_vectorized", rewards))
        theirs = self.per_sequence("rloo", rewards)
        close(ours[:ALONE], theirs[:ALONE])
        assert theirs[ALONE] == rewards[ALONE]

    def test_opo(self):
        rewards, lengths = REWARDS[:, 0], make_batch(empty=False).mask.sum(1)
        ours = fastrl.group_advantages(
            rewards, group_ids=GROUPS, baseline="length-weighted", scale="none", lengths=lengths
        )
        theirs = self.per_sequence("opo", rewards)
        close(ours[:ALONE], theirs[:ALONE])
        assert ours[ALONE] == 0 and theirs[ALONE] == rewards[ALONE]

    @pytest.mark.parametrize(("scale", "by_std"), [("group", True), ("none", False)])
    def test_pass_at_k(self, scale, by_std):
        rewards, groups = REWARDS[:, 0], torch.tensor([4, 1, 4, 1, 4, 1])
        config = peers.verl().algorithm.AlgoConfig(norm_adv_by_std_in_grpo=by_std)
        estimator = peers.verl().core.get_adv_estimator_fn("grpo_passk")
        theirs, _ = estimator(rewards[:, None], torch.ones(B, 1), index=groups.numpy(), config=config)
        close(fastrl.pass_at_k_advantages(rewards, group_ids=groups, scale=scale), theirs[:, 0])

    def test_gpg(self):
        """verl's α counts rewards that are not zero; the paper's, and our default, samples whose group varies."""
        rewards = REWARDS[:, 0]
        theirs = self.per_sequence("gpg", rewards, f_norm=0.5)
        alpha = B / rewards.count_nonzero()
        ours = fastrl.gpg_advantages(rewards, group_ids=GROUPS, f_norm=0.5, alpha=alpha.double())
        close(ours[:ALONE], theirs[:ALONE])
        assert ours[ALONE] == 0
        assert theirs[ALONE].item() == pytest.approx((alpha * rewards[ALONE] / 0.5).item())

    def test_gdpo(self):
        """Two rewards, whitened over the tokens. verl moves a group of one, and of equal rewards, off 0; and computes
        in float32."""
        mask = make_batch(empty=False).mask
        groups = torch.tensor([4, 1, 4, 1, 4, 1])
        keys = ["format", "answer"]
        config = peers.verl().algorithm.AlgoConfig(gdpo_reward_keys=keys, gdpo_reward_weights=[0.3, 1.2])
        prompts = torch.zeros(B, 1)
        theirs, _ = peers.verl().core.get_adv_estimator_fn("gdpo")(
            torch.zeros(B, T),
            mask,
            index=groups.numpy(),
            config=config,
            non_tensor_batch={key: REWARDS[:, k].numpy() for k, key in enumerate(keys)},
            batch={"prompts": prompts, "attention_mask": torch.cat([torch.ones(B, 1).long(), mask], 1)},
        )
        ours = fastrl.gdpo_advantages(
            REWARDS,
            weights=torch.tensor([0.3, 1.2]),
            group_ids=groups,
            whiten="tokens",
            lengths=mask.sum(1),
            eps=1e-6,
        )
        close(ours[:, None] * mask, theirs, rtol=3e-6)
