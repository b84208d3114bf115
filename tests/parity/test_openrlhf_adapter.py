"""OpenRLHF's loss classes and those of `fastrl.adapters.openrlhf` on the same batch: loss, gradient and the 5-tuple over
the product of options."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from parity import peers
from parity.batches import B, T, make_batch
from torch import Tensor

import fastrl
from fastrl.adapters import openrlhf as adapter

theirs = peers.openrlhf().loss
RTOL = 3e-8  # OpenRLHF adds 1e-8 to a length
BATCHES = ({}, {"token_advantages": True, "tools": False}, {"empty": False})
COUNTS = (
    {},
    {"dp_size": 2, "batch_num_tokens": 61.0, "global_batch_size": torch.tensor(11.0)},
    {"dp_size": 2},  # without a global count OpenRLHF's dp_size has no effect
)
GATES = list(itertools.product(("off", "token", "seq"), ("mask", "clip"), ("ratio", "binary_kl", "tv")))
THRESHOLDS = ((0.8, 1.3), (0.0, 0.06), [0.0, 1.2], (-math.inf, math.inf))


def run(loss: Any, batch: Any, dtype: torch.dtype = torch.float64, **given: Any):
    """(loss, gradient, the other four) of one call."""
    logps = batch.logps.to(dtype).requires_grad_()
    given = {"action_mask": batch.mask} | given
    out = loss(
        logps, batch.old.to(dtype), batch.token_advantages.to(dtype), rollout_log_probs=batch.rollout.to(dtype), **given
    )
    return out[0].detach(), torch.autograd.grad(out[0], logps)[0], out[1:]


def compare(want: tuple, got: tuple, rtol: float = RTOL) -> None:
    size = float(want[1].abs().max())
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=rtol, atol=rtol * size)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=rtol * size + 1e-12)
    assert len(got[2]) == len(want[2]) == 4
    for x, y in zip(got[2], want[2], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == () and not x.requires_grad
            assert x.item() == pytest.approx(y.item(), rel=1e-5, abs=1e-6)


def both(**options: Any):
    """OpenRLHF's loss and ours, or None where OpenRLHF refuses, and then so must ours."""
    try:
        peer = theirs.PolicyLoss(**options)
    except ValueError:
        with pytest.raises(ValueError, match="^is_correction_(mode|threshold): "):
            adapter.PolicyLoss(**options)
        return None
    return peer, adapter.PolicyLoss(**options)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize(("level", "mode", "gating"), GATES)
def test_policy_loss(kind, level, mode, gating):
    refused = 0
    for threshold, by_token, dual in itertools.product(THRESHOLDS, (True, False), (None, 1.3)):
        pair = both(
            clip_eps_low=0.15,
            clip_eps_high=0.25,
            dual_clip=dual,
            token_level_loss=by_token,
            policy_loss_type=kind,
            is_correction_level=level,
            is_correction_mode=mode,
            is_correction_gating=gating,
            is_correction_threshold=threshold,
        )
        refused += pair is None
        for batch, counts in itertools.product(BATCHES, COUNTS) if pair else ():
            peer, ours = pair
            scored = make_batch(**batch)
            compare(run(peer, scored, **counts), run(ours, scored, **counts))
    assert refused < 16 or (mode == "clip" and (level == "seq" or gating != "ratio"))


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_masks_of_any_type_and_none(kind):
    batch = make_batch()
    peer, ours = both(policy_loss_type=kind, is_correction_level="token")
    for mask in (batch.mask.bool(), batch.mask.float()):
        compare(
            run(peer, batch, torch.float32, action_mask=mask), run(ours, batch, torch.float32, action_mask=mask), 1e-5
        )
    if kind == "ppo":  # gspo without a mask fails in OpenRLHF
        compare(run(peer, batch, action_mask=None), run(ours, batch, action_mask=None))
    assert run(ours, batch, action_mask=None)[0] == run(ours, batch, action_mask=torch.ones(B, T))[0]


def test_steep_ratios_and_bounds_below_zero():
    batch = make_batch(extreme="ratio")
    peer, ours = both(clip_eps_low=1.5, clip_eps_high=0.3)
    compare(run(peer, batch), run(ours, batch))


def test_nearly_equal_policies_in_single_precision():
    """binary_kl of nearly equal probabilities rounds below 0, and OpenRLHF's lower bound of 0 then drops the token: as
    many with us."""
    batch = make_batch(empty=False)
    batch = type(batch)(**{**vars(batch), "rollout": batch.old * (1 + 1e-5)})
    peer, ours = both(
        is_correction_level="token", is_correction_gating="binary_kl", is_correction_threshold=(0.0, 0.05)
    )
    want, got = run(peer, batch, torch.float32), run(ours, batch, torch.float32)
    assert 0 < want[2][3] < 1
    compare(want, got, 1e-5)
    ours.is_correction_threshold = (-1.0, 0.05)
    assert run(ours, batch, torch.float32)[2][3] == 0


def test_weights_far_out_differ():
    """exp of a log-ratio of 23 to the sampler: OpenRLHF's weight; ours is held at e²⁰."""
    batch = make_batch(extreme="rollout")
    gate = {"is_correction_level": "token", "is_correction_threshold": (0.0, math.inf)}
    want, got = (run(m.PolicyLoss(**gate), batch)[1] for m in (theirs, adapter))
    ratio = got / want
    far = (batch.old - batch.rollout > 20) & (want != 0)
    assert far.sum() == 1 and ratio[far].item() == pytest.approx(math.exp(20 - 23), rel=1e-5)
    torch.testing.assert_close(got[~far], want[~far])


def test_an_unscored_token_differs():
    """NaN from the sampler: OpenRLHF's loss is NaN; with us the token's weight is 1."""
    batch = make_batch(nan=True)
    filled = type(batch)(**{**vars(batch), "rollout": torch.where(batch.rollout.isnan(), batch.old, batch.rollout)})
    loss = adapter.PolicyLoss(is_correction_level="token", is_correction_threshold=(0.8, 1.3))
    want, got = run(loss, filled), run(loss, batch)
    assert got[0] == want[0] and torch.equal(got[1], want[1])
    peer = theirs.PolicyLoss(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=(0.8, 1.3))
    assert run(peer, batch)[0].isnan()


def test_attributes_may_change():
    batch = make_batch()
    peer, ours = both()
    for loss in (peer, ours):
        loss.clip_eps_low, loss.dual_clip, loss.token_level_loss = 0.05, 1.2, False
    compare(run(peer, batch), run(ours, batch))
    ours.is_correction_level = "geo"
    with pytest.raises(ValueError, match="^is_correction_level: "):
        run(ours, batch)


@pytest.mark.parametrize("name", ["PolicyLoss", "ValueLoss", "PairWiseLoss", "LogExpLoss"])
def test_signatures(name):
    for method in ("__init__", "forward"):
        want, got = (inspect.signature(getattr(getattr(m, name), method)).parameters for m in (theirs, adapter))
        if method == "__init__" and name in ("PairWiseLoss", "LogExpLoss"):
            continue
        assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in want.values()]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy_loss_type": "cispo"}, "policy_loss_type"),
        ({"is_correction_level": "sequence"}, "is_correction_level"),
        ({"is_correction_mode": "drop"}, "is_correction_mode"),
        ({"is_correction_gating": "kl"}, "is_correction_gating"),
        ({"is_correction_level": "token", "is_correction_threshold": 2.0}, "is_correction_threshold"),
        ({"is_correction_level": "token", "is_correction_threshold": (2.0, 1.0)}, "is_correction_threshold"),
        ({"is_correction_level": "seq", "is_correction_threshold": (0.0, 0.0)}, "is_correction_threshold"),
        ({"dual_clip": 0.9}, "dual_clip"),
        ({"clip_eps_low": -0.1}, "clip_eps_low"),
        ({"clip_eps_high": math.nan}, "clip_eps_high"),
    ],
)
def test_refused_at_construction(options, named):
    with pytest.raises(ValueError, match=f"^{named}\\b"):
        adapter.PolicyLoss(**options)
    if named not in ("policy_loss_type", "is_correction_threshold", "clip_eps_low", "clip_eps_high"):
        with pytest.raises((ValueError, AssertionError)):
            theirs.PolicyLoss(**options)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="kl_coef"):
        adapter.PolicyLoss(kl_coef=0.1)
    with pytest.raises(TypeError, match="entropy"):
        adapter.PolicyLoss()(*[torch.zeros(1, 1)] * 3, entropy=None)
    with pytest.raises(TypeError, match="^rollout_log_probs: "):
        adapter.PolicyLoss(is_correction_level="token")(*[torch.zeros(1, 1)] * 3)
    with pytest.raises(ValueError, match="^clip_eps: "):
        adapter.ValueLoss(clip_eps=0.0)


def test_nothing_is_read_under_the_mask():
    """A NaN there is multiplied by 0 into OpenRLHF's loss; an empty batch is 0/0 in it, and 0 with us."""
    batch = make_batch()
    clean = run(adapter.PolicyLoss(is_correction_level="seq"), batch)
    hidden = batch.mask == 0
    names = ("logps", "old", "rollout")
    dirty = type(batch)(**{**vars(batch), **{n: getattr(batch, n).masked_fill(hidden, torch.nan) for n in names}})
    got = run(adapter.PolicyLoss(is_correction_level="seq"), dirty)
    assert got[0] == clean[0] and torch.equal(got[1], clean[1]) and got[2] == clean[2]
    assert run(theirs.PolicyLoss(), dirty)[0].isnan()
    empty = torch.zeros(B, T)
    assert run(adapter.PolicyLoss(), batch, action_mask=empty)[0] == 0
    assert run(theirs.PolicyLoss(), batch, action_mask=empty)[0].isnan()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("by_token", [True, False])
def test_value_loss(by_token, clip):
    g = torch.Generator().manual_seed(5)
    values, old, returns = (torch.randn(B, T, generator=g).double() for _ in range(3))
    for mask, counts in itertools.product((make_batch().mask, make_batch(tools=False).mask.bool()), COUNTS):
        results = []
        for loss in (theirs.ValueLoss(clip, by_token), adapter.ValueLoss(clip, token_level_loss=by_token)):
            leaf = values.clone().requires_grad_()
            out = loss(leaf, old, returns, action_mask=mask, **counts)
            results.append((out, torch.autograd.grad(out, leaf)[0]))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=RTOL, atol=1e-12)
    want = theirs.ValueLoss(clip)(values, old, returns)
    torch.testing.assert_close(adapter.ValueLoss(clip)(values, old, returns), want)


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_reward_model_losses(shape):
    g = torch.Generator().manual_seed(6)
    pair = torch.randn(2, *shape, generator=g).double()

    def gradients(loss: Any, *more: Any) -> tuple[Tensor, Tensor]:
        leaf = pair.clone().requires_grad_()
        out = loss(*leaf, *more)
        return out.detach(), torch.autograd.grad(out, leaf)[0]

    for margin in (None, torch.rand(shape, generator=g), torch.tensor([2]), 0.3):
        want, got = (gradients(m.PairWiseLoss(), margin) for m in (theirs, adapter))
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(adapter.LogExpLoss()), gradients(theirs.LogExpLoss()))
    with pytest.raises(ValueError, match="^margin: .*use PairWiseLoss"):
        adapter.LogExpLoss()(*pair, 0.3)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({}, {"_normalizer": lambda *_: None}),
        ({"is_correction_level": "seq"}, {"dropped": lambda old, *_: torch.zeros_like(old, dtype=torch.bool)}),
        ({"clip_eps_low": 0.4, "is_correction_level": "token"}, {"token_mean": lambda values, keep: values.mean()}),
    ],
)
def test_the_comparison_can_fail(options, wrong, monkeypatch):
    batch, counts = make_batch(), COUNTS[1]
    peer, ours = both(is_correction_threshold=(0.8, 1.3), **options)
    compare(run(peer, batch, **counts), run(ours, batch, **counts))
    for name, function in wrong.items():
        monkeypatch.setattr(adapter, name, function)
    with pytest.raises(AssertionError):
        compare(run(peer, batch, **counts), run(ours, batch, **counts))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the batch is on the CPU, which Triton takes in its interpreter")
@pytest.mark.parametrize("options", [{"is_correction_level": "seq"}, {"policy_loss_type": "gspo", "dual_clip": 1.3}])
def test_on_triton(options, monkeypatch):
    """The kernels, in the interpreter."""
    monkeypatch.setattr(adapter, "policy_loss", functools.partial(fastrl.policy_loss, backend="triton"))
    batch = make_batch()
    peer, ours = both(is_correction_threshold=(0.8, 1.3), **options)
    compare(run(peer, batch, torch.float32), run(ours, batch, torch.float32), 2e-5)
