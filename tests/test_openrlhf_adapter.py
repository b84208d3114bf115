"""The OpenRLHF adapter without OpenRLHF: the spec of each option, the version, and a clear message."""

from __future__ import annotations

import importlib.metadata
import math
import sys

import pytest
import torch

import fastrl
from fastrl.adapters import openrlhf as adapter
from fastrl.adapters._versions import warn_outside

CORRECTIONS = {
    "token-ratio-mask": {"level": "token", "mode": "mask", "lower": 0.5, "upper": 5.0},
    "token-ratio-clip": {"level": "token", "mode": "truncate", "lower": 0.5, "upper": 5.0},
    "seq-ratio-mask": {
        "level": "token",
        "reject": "k1",
        "reject_level": "sequence-mean",
        "reject_lower": -math.log(5.0),
        "reject_upper": -math.log(0.5),
    },
    "token-tv-mask": {"level": "token", "reject": "tv", "reject_lower": 0.0, "reject_upper": 0.1},
    "seq-binary_kl-mask": {
        "level": "token",
        "reject": "binary_kl",
        "reject_level": "sequence-mean",
        "reject_lower": 0.0,
        "reject_upper": 0.1,
    },
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_spec_of_a_correction(name):
    level, gating, mode = name.split("-")
    threshold = (0.5, 5.0) if gating == "ratio" else (0.0, 0.1)
    loss = adapter.PolicyLoss(
        is_correction_level=level,
        is_correction_gating=gating,
        is_correction_mode=mode,
        is_correction_threshold=threshold,
    )
    assert loss.spec() == fastrl.LossSpec(rollout=fastrl.RolloutCorrection(**CORRECTIONS[name]))


def test_spec_of_the_other_options():
    assert adapter.PolicyLoss().spec() == fastrl.LossSpec()
    numbers = {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 2.0, "token_level_loss": False}
    ours = {"epsilon_low": 0.1, "epsilon_high": 0.3, "dual_clip": 2.0, "aggregation": "seq-mean-token-mean"}
    assert adapter.PolicyLoss(**numbers).spec() == fastrl.LossSpec(**ours)
    gspo = fastrl.LossSpec(ratio_level="sequence", log_ratio_clamp=None, aggregation="seq-mean-token-mean")
    for level in ("off", "token", "seq"):
        assert adapter.PolicyLoss(policy_loss_type="gspo", is_correction_level=level).spec() == gspo


def test_it_is_a_module_of_the_training_loop():
    loss = adapter.PolicyLoss()
    assert not list(loss.parameters()) and loss.train() is loss and loss.to("cpu") is loss
    logps = torch.full((1, 2), -1.0, requires_grad=True)
    out = loss(logps, logps.detach(), torch.ones(1, 2), action_mask=torch.ones(1, 2))
    out[0].backward()
    assert out[0] == -1 and torch.equal(logps.grad, torch.full((1, 2), -0.5)) and out[3:] == (None, None)


def test_without_openrlhf(monkeypatch):
    for name in ("openrlhf", "openrlhf.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="OpenRLHF is not installed; pip install 'openrlhf>=0.11.2,<0.12'"):
        adapter.install()
    adapter.restore()


@pytest.mark.parametrize(("version", "warned"), [("0.11.1", True), ("0.11.2", False), ("0.12.0", True)])
def test_another_version_warns_once(version, warned, monkeypatch, caplog):
    """0.11.1's actor builds a `PolicyLoss` of other arguments and unpacks four values."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    warn_outside.cache_clear()
    for make in (adapter.PolicyLoss, adapter.ValueLoss, adapter.PolicyLoss):
        make()
    warn_outside.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    assert all(f"openrlhf {version}" in text and "openrlhf >=0.11.2,<0.12" in text for text in said)
