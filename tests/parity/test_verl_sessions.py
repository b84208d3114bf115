"""verl's default trainer (v1) hands its estimators the outputs of agents' sessions, and under the name "grpo" only the last
output of each: fastrl stands in under that name; under a name of its own it cannot know of sessions, and says so once."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from parity import peers
from torch import Tensor

import fastrl.adapters.verl as adapter
from fastrl.adapters.verl import outcome_advantages

v1, verl = peers.verl_v1(), peers.verl()
adapter.register()

# <prompt>_<session>_<output>: of the first and last session several outputs, the last of which is scored.
SEVERAL = ["p_0_0", "p_0_1", "p_1_0", "p_2_0", "p_2_1", "p_2_2"]
ONE = [f"p_{session}_0" for session in range(6)]
REWARDS = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.0, 1.0])
LENGTHS = torch.tensor([3, 2, 3, 1, 2, 3])


def advantages(name: str, keys: list[str], **algorithm) -> tuple[Tensor, Tensor]:
    """What verl's default trainer computes of six outputs for one prompt."""
    mask = (torch.arange(3) < LENGTHS[:, None]).long()
    tensors = {"token_level_rewards": REWARDS[:, None] * (torch.arange(3) == 0), "response_mask": mask}
    uids = np.array(["p"] * len(keys), dtype=object)
    data = peers.verl_trainer().DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids})
    config = verl.algorithm.AlgoConfig(adv_estimator=name, **algorithm)
    by_std = config.norm_adv_by_std_in_grpo
    out = v1.compute_advantage_for_multi_trajectories(data, keys, name, config=config, norm_adv_by_std_in_grpo=by_std)
    return out.batch["advantages"], out.batch["returns"]


@pytest.mark.parametrize("keys", [SEVERAL, ONE], ids=["several", "one"])
@pytest.mark.parametrize("by_std", [True, False])
def test_standing_in_for_grpo(keys, by_std, caplog):
    theirs = advantages("grpo", keys, norm_adv_by_std_in_grpo=by_std)
    outcome_advantages.say_sessions.cache_clear()
    adapter.install(["grpo"])
    try:
        ours = advantages("grpo", keys, norm_adv_by_std_in_grpo=by_std)
    finally:
        adapter.restore()
    for x, y in zip(ours, theirs, strict=True):
        assert y.any()
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    assert not caplog.records


@pytest.mark.parametrize("name", ["rloo", "grpo_vectorized", "opo"])
def test_the_other_names_score_every_output(name, caplog):
    """In verl as in fastrl, so they are equal under a name of ours."""
    for keys in (SEVERAL, ONE):
        for x, y in zip(advantages(f"fastrl_{name}", keys), advantages(name, keys), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    assert not caplog.records


def test_a_name_of_ours_sees_no_sessions_and_says_so_once(caplog):
    outcome_advantages.say_sessions.cache_clear()
    with caplog.at_level(logging.WARNING, "fastrl"):
        for _ in range(2):
            equal = [
                torch.allclose(*(advantages(n, keys)[0] for n in ("fastrl_grpo", "grpo"))) for keys in (ONE, SEVERAL)
            ]
    assert equal == [True, False]
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("algorithm.adv_estimator: ") and "adv_estimator=grpo" in said and "install" in said


def test_the_former_trainer_has_no_sessions(caplog, monkeypatch):
    """Nothing to say where verl's default trainer is not loaded."""
    outcome_advantages.say_sessions.cache_clear()
    monkeypatch.delitem(outcome_advantages.sys.modules, v1.__name__)
    advantages("fastrl_grpo", ONE)
    assert not caplog.records
