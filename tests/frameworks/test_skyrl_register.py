"""What SkyRL's registry gets, and what `register` refuses of a whole config."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from frameworks.batches import masked_sum, ppo, scored
from frameworks.test_skyrl import config

from fastrl.adapters import skyrl


def whole(fully_async=False, **algorithm):
    """SkyRL's config, as far as `register` sees it."""
    return SimpleNamespace(trainer={"algorithm": algorithm, "fully_async": {"enabled": fully_async}})


@pytest.fixture
def table(monkeypatch):
    """What is registered: SkyRL's registry as a dict."""
    names = {}
    module = ModuleType("ppo_utils")
    module.PolicyLossRegistry = SimpleNamespace(register=names.__setitem__)
    monkeypatch.setitem(sys.modules, "skyrl.backends.skyrl_train.utils.ppo_utils", module)
    return names


def test_register(table):
    """Every loss goes to the registry that SkyRL keeps, under its own name."""
    for refused in ({"policy_loss_type": "fastrl_topr"}, {"policy_loss_type": "fastrl_gspo", "use_tis": True}):
        with pytest.raises(ValueError, match="^(policy_loss_type|use_tis): "):
            skyrl.register(whole(**refused))
    with pytest.raises(ValueError, match="^config: expected SkyRL's whole config, got a dict; pass cfg, "):
        skyrl.register({"policy_loss_type": "fastrl_gspo"})
    assert not table
    names = skyrl.register(whole(policy_loss_type="fastrl_gspo"))
    assert set(names) == set(table) == {f"fastrl_{name}" for name in skyrl.TYPES}
    b = scored()
    loss, _ = table["fastrl_dual_clip"](b.logps, b.old, b.advantages, config=config(), loss_mask=b.mask)
    torch.testing.assert_close(loss, masked_sum(ppo(b.logps, b.old, b.advantages, 0.2, 0.2, 3.0), b.mask))


@pytest.mark.parametrize("loss_type", skyrl.TYPES)
def test_fully_async_refuses_losses_with_old_log_probs(table, loss_type):
    """SkyRL refuses its own by their names, which ours do not have."""
    chosen = f"fastrl_{loss_type}"
    if loss_type in ("rollout_is", "dppo"):
        skyrl.register(whole(fully_async=True, policy_loss_type=chosen))
    else:
        with pytest.raises(ValueError, match=f"^policy_loss_type: .*'{chosen}'.* with trainer.fully_async.enabled use"):
            skyrl.register(whole(fully_async=True, policy_loss_type=chosen))
        assert not table
        skyrl.register(whole(policy_loss_type=chosen))
    assert chosen in table


def test_fully_async_takes_cispo_against_the_sampler(table):
    skyrl.register(whole(fully_async=True, policy_loss_type="fastrl_cispo", cispo={"cispo_anchor": "rollout"}))
    assert table


def test_fully_async_leaves_skyrls_own_losses_to_skyrl(table):
    skyrl.register(whole(fully_async=True, policy_loss_type="gspo"))
    assert table
