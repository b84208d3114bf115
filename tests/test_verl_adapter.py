"""What the verl adapter makes of a config, without verl: the spec of each mode, and refusals by verl's names."""

from __future__ import annotations

import importlib.metadata
import math
import sys

import pytest
import torch
from test_packaging import python

import fastrl
from fastrl.adapters import verl as adapter
from fastrl.adapters._versions import warn_outside
from fastrl.adapters.verl import registry

ACTOR = {
    "clip_ratio_low": 0.1,
    "clip_ratio_high": 0.3,
    "clip_ratio_c": 2.5,
    "tau_pos": 1.1,
    "tau_neg": 1.7,
    "strategy": "fsdp",
}
POLICY = {
    "clip_cov_ratio": 0.01,
    "clip_cov_lb": 0.5,
    "clip_cov_ub": 4.0,
    "kl_cov_ratio": 0.02,
    "ppo_kl_coef": 0.3,
    "dro_beta": 0.2,
}
CLIP = {"epsilon_low": 0.1, "epsilon_high": 0.3}

SPECS = {
    "vanilla": {**CLIP, "dual_clip": 2.5},
    "dppo_tv": {"objective": "dppo_tv", **CLIP, "dppo_ratio_cap": 2.5},
    "dppo_kl": {"objective": "dppo_kl", **CLIP, "dppo_ratio_cap": 2.5},
    "gspo": {"ratio_level": "sequence_token", **CLIP, "log_ratio_clamp": 10.0},
    "sapo": {"objective": "sapo", "sapo_temperature_positive": 1.1, "sapo_temperature_negative": 1.7, "aggregation": "seq-mean-token-mean"},
    "gpg": {"objective": "reinforce"},
    "clip_cov": {"objective": "clip_cov", "seed": 0, **CLIP, "clip_cov_fraction": 0.01, "clip_cov_low": 0.5, "clip_cov_high": 4.0, "log_ratio_clamp": None},
    "kl_cov": {"objective": "kl_cov", "kl_cov_fraction": 0.02, "kl_cov_coef": 0.3, "log_ratio_clamp": None},
    "geo_mean": {"objective": "gmpo", "ratio_level": "sequence", **CLIP, "aggregation": "seq-mean-token-mean", "log_ratio_clamp": None},
    "dro": {"objective": "dro", "dro_beta": 0.2, "log_ratio_clamp": None},
    "cispo": {"objective": "cispo", **CLIP},
}  # fmt: skip


@pytest.mark.parametrize("mode", SPECS)
def test_spec_of_each_mode(mode):
    want = fastrl.LossSpec(**SPECS[mode])
    config = {**ACTOR, "policy_loss": {**POLICY, "loss_mode": mode}}
    assert adapter.spec_from_config(config) == want
    assert adapter.spec_from_config(config, f"fastrl_{mode}") == want


def test_spec_of_bypass_mode_and_of_aggregations():
    for kind, mode in (("ppo_clip", "vanilla"), ("reinforce", "gpg")):
        config = {**ACTOR, "policy_loss": {"rollout_correction": {"loss_type": kind, "bypass_mode": True}}}
        assert adapter.spec_from_config(config, "bypass_mode") == fastrl.LossSpec(**SPECS[mode])
    for how in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        assert adapter.spec_from_config({"loss_agg_mode": how}).aggregation == how
    assert adapter.spec_from_config({"loss_agg_mode": "token-sum"}).aggregation == "token-mean"  # over 1/dp_size
    norm = {"loss_agg_mode": "seq-mean-token-sum-norm"}
    assert adapter.spec_from_config({**norm, "loss_scale_factor": 512}).max_length == 512
    assert adapter.spec_from_config(norm, max_length=64).max_length == 64
    with pytest.raises(ValueError, match=r"^loss_scale_factor \(max_length\): "):
        adapter.spec_from_config(norm)


@pytest.mark.parametrize(
    ("actor", "policy", "mode", "named"),
    [
        ({"clip_ratio_d": 3.0}, {}, "vanilla", "clip_ratio_d: expected a field of verl 0.9.1's ActorConfig"),
        ({}, {"clip_cov_mid": 2.0}, "vanilla", "clip_cov_mid: expected a field of verl 0.9.1's PolicyLossConfig"),
        ({}, {"rollout_correction": {"rollout_veto": 1e-4}}, "vanilla", "rollout_veto: expected a field of verl 0.9.1's RolloutCorrectionConfig"),
        ({"global_batch_info": {"world_size": 2}}, {}, "vanilla", "world_size: expected a field of global_batch_info"),
        ({"clip_ratio_c": 1.0}, {}, "vanilla", r"clip_ratio_c \(dual_clip\): "),
        ({"clip_ratio_c": 0.0}, {}, "dppo_tv", r"clip_ratio_c \(dppo_ratio_cap\): "),
        ({"clip_ratio_low": -0.1}, {}, "vanilla", r"clip_ratio_low \(epsilon_low\): "),
        ({"clip_ratio_high": math.nan}, {}, "gspo", r"clip_ratio_high \(epsilon_high\): "),
        ({"tau_pos": 0.0}, {}, "sapo", r"tau_pos \(sapo_temperature_positive\): "),
        ({"loss_agg_mode": "batch-mean"}, {}, "vanilla", r"loss_agg_mode \(aggregation\): "),
        ({}, {}, "dro", "dro_beta: "),
        ({}, {"dro_beta": -1.0}, "dro", r"policy_loss.dro_beta \(dro_beta\): "),
        ({}, {"clip_cov_ratio": 0.0}, "clip_cov", r"policy_loss.clip_cov_ratio \(clip_cov_fraction\): "),
        ({}, {"clip_cov_lb": 7.0}, "clip_cov", r"policy_loss.clip_cov_lb \(clip_cov_low\): "),
        ({}, {"kl_cov_ratio": 0.0}, "kl_cov", r"policy_loss.kl_cov_ratio \(kl_cov_fraction\): "),
        ({}, {"rollout_correction": None}, "bypass_mode", "rollout_correction: "),
        ({}, {"rollout_correction": {"loss_type": "dpo"}}, "bypass_mode", "loss_type: .*use one of 'ppo_clip', 'reinforce'"),
    ],
)  # fmt: skip
def test_refused_by_name(actor, policy, mode, named):
    """At the first call, before anything is computed; and by `spec_from_config` in a launch script."""
    config = {**actor, "policy_loss": policy}
    loss, x = adapter.POLICY_LOSSES[f"fastrl_{mode}"], torch.zeros(2, 3)
    how = config.get("loss_agg_mode", "token-mean")
    with pytest.raises(ValueError, match=f"^{named}"):
        loss(x, x, x, torch.ones(2, 3), how, config)
    if "global_batch_info" not in actor:
        with pytest.raises(ValueError, match=f"^{named}"):
            adapter.spec_from_config(config, mode)


def test_a_dict_config_is_read_as_a_dataclass_is():
    omegaconf = pytest.importorskip("omegaconf", reason="needs omegaconf, which verl brings")
    config = {
        **ACTOR,
        "policy_loss": {**POLICY, "loss_mode": "fastrl_kl_cov", "rollout_correction": {"rollout_is": None}},
    }
    assert adapter.spec_from_config(omegaconf.OmegaConf.create(config)) == adapter.spec_from_config(config)
    with pytest.raises(ValueError, match="^clip_ratio_d: "):
        adapter.spec_from_config(omegaconf.OmegaConf.create({**config, "clip_ratio_d": 1}))


def test_other_bad_input():
    with pytest.raises(ValueError, match="^config: "):
        adapter.spec_from_config(None)
    with pytest.raises(ValueError, match="^loss_mode: .*'ppo'"):
        adapter.spec_from_config({}, "ppo")
    x, loss = torch.zeros(2, 3), adapter.POLICY_LOSSES["fastrl_vanilla"]
    with pytest.raises(ValueError, match="^response_mask: expected shape"):
        loss(x, x, x, torch.ones(2, 4), config={})
    with pytest.raises(TypeError, match="^old_log_prob: "):
        loss(None, x, x, torch.ones(2, 3), config={})
    with pytest.raises(TypeError, match="rollout_log_probs"):
        loss(x, x, x, torch.ones(2, 3), config={}, rollout_log_probs=x)


def test_without_verl(monkeypatch):
    for name in ("verl", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, None)
    for function in (adapter.register, adapter.install):
        with pytest.raises(ModuleNotFoundError, match="verl is not installed; pip install 'verl>=0.9.1,<0.10'"):
            function()


def test_importing_it_registers_nothing():
    code = (
        "import sys, fastrl.adapters.verl; print('verl' in sys.modules, 'fastrl.adapters.verl.plugin' in sys.modules)"
    )
    assert python(code).split() == ["False", "False"]


@pytest.mark.parametrize(("version", "warned"), [("0.9.0", True), ("0.9.1", False), ("0.9.2", False), ("0.10.2", True)])
def test_another_version_warns_once(version, warned, monkeypatch, caplog):
    """0.9.0's ActorConfig has a field that 0.9.1's has not, and its gspo aggregates in one way only."""
    core = type(sys)("verl.trainer.ppo.core_algos")
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: core)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    warn_outside.cache_clear()
    registry._core()
    registry._core()
    warn_outside.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    assert all(f"verl {version}" in text and "verl >=0.9.1,<0.10" in text for text in said)
