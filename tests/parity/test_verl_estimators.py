"""verl's advantage estimators and those under `fastrl_*`, called as its trainer calls them; and standing in for its own.

The formulas are compared in `test_advantages.py` and `test_token_advantages.py`; here it is what the adapter hands them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity import peers
from parity.batches import B, T, make_batch
from torch import Tensor

import fastrl
import fastrl.adapters.verl as adapter

verl = peers.verl()
adapter.register()

UIDS = np.array(["q4", "q1", "q4", "q1", "q4", "q1"], dtype=object)
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.5, 2.0, -1.0])
RTOL = 2e-6  # both in float32


@pytest.fixture
def standing_in():
    """fastrl's estimators under verl's own names, for one test."""
    adapter.install()
    yield
    adapter.restore()


def batch() -> dict[str, Tensor]:
    """As verl's trainer holds it, with every field that an estimator may read."""
    g = torch.Generator().manual_seed(3)
    mask = make_batch(empty=False).mask
    rewards = 0.1 * torch.randn(B, T, generator=g) * mask
    rewards[:, 0] += REWARDS  # the first token of every completion counts
    scored = make_batch(empty=False)
    return {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "values": torch.randn(B, T, generator=g),
        "reward_baselines": torch.randn(B, generator=g),
        "old_log_probs": scored.old.float(),
        "sum_pi_squared": (2 * scored.old.float()).exp() + 0.1,
        "rollout_is_weights": (scored.old - scored.rollout).exp().float(),
        "prompts": torch.zeros(B, 2, dtype=torch.long),
        "attention_mask": torch.cat(
            [torch.ones(B, 2).long(), (torch.arange(T) <= mask.sum(1, keepdim=True)).long()], 1
        ),
    }


def advantages(name: str, greedy: bool = True, **algorithm) -> tuple[Tensor, Tensor]:
    """What verl's `compute_advantage` puts into the batch; `greedy`: whether remax finds the greedy rewards there."""
    config = verl.algorithm.AlgoConfig(adv_estimator=name, **algorithm)
    rewards = {"format": REWARDS.numpy() * 0.3, "answer": np.arange(B) % 3 * 1.0}
    tensors = batch()
    if not name.endswith("remax") or not greedy:
        del tensors["reward_baselines"]
    data = peers.verl_trainer().DataProto.from_dict(tensors=tensors, non_tensors={"uid": UIDS, **rewards})
    out = peers.verl_trainer().compute_advantage(
        data,
        adv_estimator=name,
        gamma=config.gamma,
        lam=config.lam,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
        config=config,
    )
    return out.batch["advantages"], out.batch["returns"]


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], rtol: float = RTOL) -> None:
    mask = batch()["response_mask"]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y * mask, rtol=rtol, atol=rtol)
        assert x.dtype == y.dtype


CONFIGS = ({}, {"norm_adv_by_std_in_grpo": False}, {"gamma": 0.9})
BY_TRAINER = (
    "grpo",
    "grpo_passk",
    "rloo",
    "rloo_vectorized",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "gpg",
)


@pytest.mark.parametrize("name", BY_TRAINER)
def test_in_verl_s_trainer(name):
    for options in CONFIGS:
        same(advantages(f"fastrl_{name}", **options), advantages(name, **options))


def test_grpo_vectorized_reads_the_config():
    """verl's own, called by its trainer, does not: it divides by the std whatever norm_adv_by_std_in_grpo says."""
    name = "grpo_vectorized"
    same(advantages(f"fastrl_{name}"), advantages(name))
    same(advantages(f"fastrl_{name}", norm_adv_by_std_in_grpo=False), advantages("grpo", norm_adv_by_std_in_grpo=False))
    same(advantages(name, norm_adv_by_std_in_grpo=False), advantages(name))


STAND_IN = {
    "gae": [{}, {"gamma": 0.97, "lam": 0.9}],
    "remax": [{}],
    "gdpo": [{"gdpo_reward_keys": ["format", "answer"], **w} for w in ({}, {"gdpo_reward_weights": [0.3, 1.2]})],
    "tir_optimal_token_baseline": [{}],
    "grpo": CONFIGS,
    "rloo": CONFIGS,
}


@pytest.mark.parametrize("name", STAND_IN)
def test_standing_in(name):
    """Under verl's own names, which its trainer hands values, greedy rewards and Σπ² to."""
    expected = [advantages(name, **options) for options in STAND_IN[name]]
    adapter.install([name])
    try:
        assert verl.core.get_adv_estimator_fn(name) is adapter.ADVANTAGE_ESTIMATORS[f"fastrl_{name}"]
        got = [advantages(name, **options) for options in STAND_IN[name]]
    finally:
        adapter.restore()
    for x, y in zip(got, expected, strict=True):
        same(x, y, 1e-5)


@pytest.mark.parametrize("tail", [True, False])
def test_optimal_token_baseline(tail):
    """Without holes in the mask, which verl counts wrongly when it looks for the tail; see `test_token_advantages.py`."""
    given = batch()
    mask = make_batch(empty=False, tools=False).mask
    names = ("token_level_rewards", "old_log_probs", "sum_pi_squared", "rollout_is_weights")
    args = {name: given[name] for name in names} | {"response_mask": mask, "index": UIDS, "handle_zero_tail": tail}
    theirs, ours = (
        verl.core.get_adv_estimator_fn(f"{prefix}optimal_token_baseline")(**args) for prefix in ("", "fastrl_")
    )
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y * mask, rtol=1e-5, atol=1e-6)


def test_every_name_is_registered():
    names = {f"fastrl_{estimator.value}" for estimator in verl.core.AdvantageEstimator}
    assert names == set(adapter.ADVANTAGE_ESTIMATORS) <= set(verl.core.ADV_ESTIMATOR_REGISTRY)
    losses = {name for name in verl.core.POLICY_LOSS_REGISTRY if not name.startswith("fastrl_")}
    assert {f"fastrl_{name}" for name in losses} == set(adapter.POLICY_LOSSES)
    before = dict(verl.core.POLICY_LOSS_REGISTRY), dict(verl.core.ADV_ESTIMATOR_REGISTRY)
    assert adapter.register() == [*adapter.POLICY_LOSSES, *adapter.ADVANTAGE_ESTIMATORS]
    assert before == (verl.core.POLICY_LOSS_REGISTRY, verl.core.ADV_ESTIMATOR_REGISTRY)


def test_install_and_restore_are_exact_and_idempotent():
    core = verl.core
    tables = (core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY, vars(core))
    before = [dict(table) for table in tables]
    adapter.install(["vanilla", "gae"])
    assert (
        core.compute_policy_loss_vanilla
        is core.POLICY_LOSS_REGISTRY["vanilla"]
        is adapter.POLICY_LOSSES["fastrl_vanilla"]
    )
    assert core.compute_gae_advantage_return is adapter.ADVANTAGE_ESTIMATORS["fastrl_gae"]
    assert core.POLICY_LOSS_REGISTRY["gspo"] is before[0]["gspo"]
    adapter.install()
    adapter.install()
    assert all(
        core.POLICY_LOSS_REGISTRY[name] is core.POLICY_LOSS_REGISTRY[f"fastrl_{name}"]
        for name in before[0]
        if not name.startswith("fastrl_")
    )
    adapter.restore()
    adapter.restore()
    assert before == [dict(table) for table in tables]
    with pytest.raises(ValueError, match="^names: .*got 'ppo'"):
        adapter.install(["vanilla", "ppo"])
    assert before == [dict(table) for table in tables]


@pytest.mark.parametrize(
    ("name", "missing"), [("gae", "values"), ("remax", "reward_baselines"), ("optimal_token_baseline", "old_log_probs")]
)
def test_what_the_trainer_does_not_hand_over_is_named(name, missing):
    """verl's trainer gives these to its own names only."""
    with pytest.raises(
        ValueError, match=f"^{missing}: .*verl's trainers hand it to '.*' only: see fastrl.adapters.verl.install"
    ):
        advantages(f"fastrl_{name}", greedy=False)
    with pytest.raises(ValueError, match="^non_tensor_batch: .*'gdpo' only"):
        advantages("fastrl_gdpo", gdpo_reward_keys=["answer"])


def test_refused():
    given = batch()
    rewards, mask = given["token_level_rewards"], given["response_mask"]
    with pytest.raises(ValueError, match="^index: expected the uid"):
        adapter.ADVANTAGE_ESTIMATORS["fastrl_grpo"](rewards, mask)
    with pytest.raises(ValueError, match="^norm_adv_by_std_in_grpo: "):
        adapter.ADVANTAGE_ESTIMATORS["fastrl_gdpo"](rewards, mask, UIDS, norm_adv_by_std_in_grpo=False)
    with pytest.raises(ValueError, match="^whiten_by: expected a field of verl 0.9.1's AlgoConfig"):
        adapter.ADVANTAGE_ESTIMATORS["fastrl_rloo"](rewards, mask, UIDS, config={"whiten_by": "group"})
    with pytest.raises(ValueError, match="^leaf: expected an argument"):
        adapter.ADVANTAGE_ESTIMATORS["fastrl_reinforce_plus_plus"](rewards, mask, leaf=3)
    with pytest.raises(ValueError, match="^gdpo_reward_keys: .*list the rewards"):
        adapter.ADVANTAGE_ESTIMATORS["fastrl_gdpo"](rewards, mask, UIDS, config={}, non_tensor_batch={})
    with pytest.raises(ValueError, match="^gdpo_reward_keys: expected keys of non_tensor_batch, b, got 'a'"):
        keys = {"gdpo_reward_keys": ["a"]}
        adapter.ADVANTAGE_ESTIMATORS["fastrl_gdpo"](rewards, mask, UIDS, config=keys, non_tensor_batch={"b": REWARDS})


def test_groups_without_information_differ():
    """A group of one: verl gives grpo, rloo, opo and gpg their plain reward, ours is 0 (as is verl's rloo_vectorized).
    A group of equal rewards: verl's whitening moves it off 0 in gdpo and reinforce_plus_plus_baseline."""
    mask = batch()["response_mask"]
    alone = np.array(["a", "a", "a", "b", "b", "c"], dtype=object)
    placed = REWARDS[:, None] * (torch.arange(T) == 0)
    for name, reward in (
        ("grpo", -1 / (1 + 1e-6)),
        ("rloo", -1.0),
        ("opo", -1.0),
        ("gpg", -6 / 5),
        ("rloo_vectorized", 0.0),
    ):
        theirs, _ = verl.core.get_adv_estimator_fn(name)(placed.clone(), mask, index=alone)
        ours, _ = adapter.ADVANTAGE_ESTIMATORS[f"fastrl_{name}"](placed, mask, index=alone)
        assert theirs[-1, 0].item() == pytest.approx(reward) and not ours[-1].any()
        torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=RTOL, atol=RTOL)
    equal = placed.clone()
    equal[[0, 2, 4], 0] = 0.3
    name = "reinforce_plus_plus_baseline"
    theirs, _ = verl.core.get_adv_estimator_fn(name)(equal.clone(), mask, index=UIDS)
    ours, _ = adapter.ADVANTAGE_ESTIMATORS[f"fastrl_{name}"](equal, mask, index=UIDS)
    assert theirs[0, 0].abs() > 0.05 and not ours[[0, 2, 4]].any()
    torch.testing.assert_close(ours[[1, 3, 5]], theirs[[1, 3, 5]], rtol=RTOL, atol=RTOL)


def test_uids_of_any_type():
    given = batch()
    args = given["token_level_rewards"], given["response_mask"]
    numbers = np.unique(UIDS.astype(str), return_inverse=True)[1]
    want = adapter.ADVANTAGE_ESTIMATORS["fastrl_grpo"](*args, index=UIDS)[0]
    for index in (numbers, torch.from_numpy(numbers), list(UIDS)):
        assert torch.equal(adapter.ADVANTAGE_ESTIMATORS["fastrl_grpo"](*args, index=index)[0], want)


def test_losses_stand_in_everywhere(standing_in):
    """verl's bypass mode and its distillation call 'vanilla' by themselves."""
    from parity.test_verl_adapter import called
    from parity.verl_cases import config

    scored = make_batch(old="rollout", empty=False)
    ours = called("bypass_mode", scored, config(loss_mode="bypass_mode", rollout_correction={"loss_type": "ppo_clip"}))
    adapter.restore()
    theirs = called(
        "bypass_mode", scored, config(loss_mode="bypass_mode", rollout_correction={"loss_type": "ppo_clip"})
    )
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-7, atol=1e-9)
    assert fastrl.adapters.verl.losses.policy_loss is fastrl.policy_loss
