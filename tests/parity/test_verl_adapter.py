"""verl's registry called by its own name and by `fastrl_*` on the same batch: loss, gradient and metrics over the product
of options. What differs is stated at the end, with its size."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from parity import peers
from parity.batches import B, Batch, T, make_batch
from parity.verl_cases import AGGREGATIONS, config
from torch import Tensor

import fastrl
import fastrl.adapters.verl as adapter
from fastrl.adapters.verl import losses, measures

verl = peers.verl()
adapter.register()

MODES = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo")
# Bounds that clip on both sides; every candidate of clip_cov is drawn.
NUMBERS = {
    "clip_ratio_low": 0.15,
    "clip_ratio_high": 0.3,
    "clip_ratio_c": 1.6,
    "tau_pos": 1.3,
    "tau_neg": 1.8,
    "dro_beta": 0.4,
    "clip_cov_ratio": 1.0,
    "clip_cov_lb": 0.1,
    "clip_cov_ub": 3.0,
    "kl_cov_ratio": 0.2,
    "ppo_kl_coef": 0.6,
}
COUNTS = (
    {},
    {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 11, "loss_scale_factor": 20},
    {"dp_size": 4, "batch_num_tokens": torch.tensor(61.0), "global_batch_size": torch.tensor(11.0)},
    {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None},
)
BATCHES = ({}, {"token_advantages": True}, {"extreme": "ratio"}, {"old": "policy"}, {"tools": False, "empty": False})
RTOL = 3e-8  # verl adds 1e-8 to every count that it divides by


def called(name: str, batch: Batch, actor: Any, dtype: torch.dtype = torch.float64, **given: Any):
    """(loss, gradient, metrics) of the registered policy loss `name`."""
    logps = batch.logps.to(dtype).requires_grad_()
    given = {"loss_agg_mode": "token-mean", "response_mask": batch.mask.bool(), "rollout_is_weights": None} | given
    loss, metrics = verl.core.get_policy_loss_fn(name)(
        old_log_prob=batch.old.to(dtype),
        log_prob=logps,
        advantages=batch.token_advantages.to(dtype),
        config=actor,
        **given,
    )
    return loss.detach(), torch.autograd.grad(loss, logps)[0], metrics


def compare(mode: str, batch: Batch, actor: Any, rtol: float = RTOL, **options: Any) -> None:
    """Both paths agree: the loss against the larger of itself and the gradient, the gradient against its largest entry."""
    loss, gradient, metrics = called(mode, batch, actor, **options)
    ours, own_gradient, own_metrics = called(f"fastrl_{mode}", batch, actor, **options)
    size = gradient.abs().max()
    torch.testing.assert_close(ours.double(), loss.double(), rtol=rtol, atol=rtol * float(size))
    torch.testing.assert_close(own_gradient, gradient, rtol=0, atol=rtol * float(size))
    assert own_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert type(own_metrics[name]) is float
        assert own_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def weights_of(batch: Batch) -> Tensor:
    """Rollout weights, two of them rejected."""
    weights = (batch.old - batch.rollout).exp()
    weights[0, 0] = weights[1, 2] = 0
    return weights


@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(mode):
    for how, counts, weighted, kind in itertools.product(AGGREGATIONS, COUNTS, (False, True), BATCHES):
        batch, actor = make_batch(**kind), config(loss_mode=mode, **NUMBERS)
        actor.global_batch_info.update(counts)
        weights = weights_of(batch) if weighted else None
        compare(mode, batch, actor, loss_agg_mode=how, rollout_is_weights=weights)


@pytest.mark.parametrize("mode", MODES)
def test_single_precision_and_masks_of_any_type(mode):
    batch, actor = make_batch(), config(loss_mode=mode, **NUMBERS)
    for mask in (batch.mask.bool(), batch.mask, batch.mask.float()):
        compare(mode, batch, actor, rtol=1e-5, dtype=torch.float32, response_mask=mask)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the batch is on the CPU, which Triton takes in its interpreter")
@pytest.mark.parametrize("mode", MODES)
def test_on_triton(mode, monkeypatch):
    """The kernels, in the interpreter."""
    monkeypatch.setattr(losses, "policy_loss", functools.partial(fastrl.policy_loss, backend="triton"))
    batch, actor = make_batch(token_advantages=True), config(loss_mode=mode, **NUMBERS)
    actor.global_batch_info.update(COUNTS[1])
    compare(mode, batch, actor, rtol=2e-5, dtype=torch.float32, rollout_is_weights=weights_of(batch).float())


@pytest.mark.parametrize("mode", MODES)
def test_defaults_and_fallbacks(mode):
    """verl's default numbers; clip_ratio where its low and high are None; the aggregation that each function has."""
    batch = make_batch(extreme="ratio")
    numbers = {"dro_beta": 0.1, "clip_cov_ratio": 1.0}
    compare(mode, batch, config(loss_mode=mode, **numbers))
    actor = config(loss_mode=mode, clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None, **numbers)
    compare(mode, batch, actor)
    ours, theirs = (verl.core.get_policy_loss_fn(name) for name in (f"fastrl_{mode}", mode))
    args = (batch.old, batch.logps, batch.token_advantages, batch.mask.bool())
    torch.testing.assert_close(ours(*args, config=actor)[0], theirs(*args, config=actor)[0], rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "cispo", "clip_cov"])
def test_a_lower_bound_below_zero_is_none(mode):
    compare(mode, make_batch(extreme="ratio"), config(loss_mode=mode, **{**NUMBERS, "clip_ratio_low": 1.7}))


def test_no_penalty_of_kl_cov():
    compare("kl_cov", make_batch(), config(loss_mode="kl_cov", ppo_kl_coef=0.0, kl_cov_ratio=0.2))


@pytest.mark.parametrize("bounds", [(0.0, 3.0), (-0.4, 0.2)])
def test_bounds_of_clip_cov_around_zero(bounds):
    numbers = {**NUMBERS, "clip_cov_lb": bounds[0], "clip_cov_ub": bounds[1]}
    compare("clip_cov", make_batch(), config(loss_mode="clip_cov", **numbers))


REJECTIONS = (
    {},
    {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.4"},
    {"rollout_rs": "token_k2,seq_max_k3", "rollout_rs_threshold": "0.3,0.4"},
    {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.7_1.3"},
    {"rollout_rs": "seq_sum_k2", "rollout_rs_threshold": 0.9},
)
WEIGHTS = (
    {"rollout_is": None},
    {"rollout_is": "token", "rollout_is_threshold": 1.2},
    {"rollout_is": "token", "rollout_is_threshold": "0.7_1.5"},
    {"rollout_is": "sequence", "rollout_is_threshold": 1.5, "rollout_is_batch_normalize": True},
)


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_bypass_mode(loss_type):
    """Its weights, rejections and metrics are of π/π_rollout; counts are those of what is left."""
    batch = make_batch(old="rollout", empty=False)
    for rejection, weights, how, counts in itertools.product(
        REJECTIONS, WEIGHTS, ("token-mean", "seq-mean-token-mean"), COUNTS[:2]
    ):
        correction = verl.algorithm.RolloutCorrectionConfig(loss_type=loss_type, **rejection, **weights)
        actor = config(loss_mode="bypass_mode", rollout_correction=correction, **NUMBERS)
        actor.global_batch_info.update(counts)
        compare("bypass_mode", batch, actor, loss_agg_mode=how)
    actor = config(loss_mode="bypass_mode", rollout_correction={"loss_type": "dpo"})
    with pytest.raises(ValueError, match="^loss_type: .*'ppo_clip', 'reinforce'"):
        called("fastrl_bypass_mode", batch, actor)


class _Data(dict):
    """As much of a TensorDict as `ppo_loss` asks for, already padded."""

    def select(self, *names: str) -> _Data:
        return _Data({name: self[name] for name in names})

    def to_padded_tensor(self) -> _Data:
        return self


@pytest.mark.parametrize("mode", MODES)
def test_the_actor_s_whole_loss(mode, monkeypatch):
    """verl's `ppo_loss`, as its workers call it, finds ours by `loss_mode` and adds its KL and entropy."""
    monkeypatch.setattr(verl.losses, "no_padding_2_padding", lambda values, data: values)
    batch, results = make_batch(), []
    for name in (mode, f"fastrl_{mode}"):
        actor = config(loss_mode=name, use_kl_loss=True, kl_loss_coef=0.2, entropy_coeff=0.1, **NUMBERS)
        logps, entropy = batch.leaves()
        data = _Data(
            dp_size=2,
            batch_num_tokens=61,
            global_batch_size=11,
            response_mask=batch.mask,
            old_log_probs=batch.old,
            advantages=batch.token_advantages,
            ref_log_prob=batch.ref,
            rollout_is_weights=weights_of(batch),
        )
        loss, metrics = verl.losses.ppo_loss(actor, {"log_probs": logps, "entropy": entropy}, data)
        values = {k: float(m.aggregate()) if hasattr(m, "aggregate") else m for k, m in metrics.items()}
        results.append((loss.detach(), *torch.autograd.grad(loss, (logps, entropy)), values))
    (*theirs, metrics), (*ours, own) = results
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=RTOL, atol=RTOL)
    assert own == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "place", "name", "wrong"),
    [
        ("vanilla", losses, "_normalizer", lambda *_: None),
        ("geo_mean", losses, "sequence_weights", lambda weights, keep: weights),
        ("geo_mean", losses, "_normalizer", lambda *_: None),
        ("cispo", measures, "_HOLD", 0.1),
        ("sapo", losses.configs, "_FIXED", {}),
    ],
)
def test_the_comparison_can_fail(mode, place, name, wrong, monkeypatch):
    batch, actor = make_batch(), config(loss_mode=mode, **NUMBERS)
    actor.global_batch_info.update(COUNTS[1])
    compare(mode, batch, actor, rollout_is_weights=weights_of(batch))
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(AssertionError):
        compare(mode, batch, actor, rollout_is_weights=weights_of(batch))


def test_counts_that_are_missing():
    batch, actor = make_batch(), config()
    actor.global_batch_info.update(dp_size=2)
    for how, named in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=named):
            called("vanilla", batch, actor, loss_agg_mode=how)
        with pytest.raises(ValueError, match=f"^{named}: "):
            called("fastrl_vanilla", batch, actor, loss_agg_mode=how)


def test_nothing_is_read_under_the_mask():
    """verl's modes by sequence multiply a NaN there by 0 into the loss; with ours the value is that of a clean batch."""
    batch, actor = make_batch(), config()
    hidden = batch.mask == 0
    args = (batch.old, batch.logps, batch.token_advantages)
    garbage = (x.masked_fill(hidden, torch.nan) for x in args)
    ours = verl.core.get_policy_loss_fn("fastrl_vanilla")
    for how in AGGREGATIONS:
        want = ours(*args, batch.mask, loss_agg_mode=how, config=actor)
        got = ours(*(x.clone() for x in args), batch.mask, loss_agg_mode=how, config=actor)
        assert got == want
    got = ours(*garbage, batch.mask, loss_agg_mode="seq-mean-token-sum", config=actor)
    assert got == ours(*args, batch.mask, loss_agg_mode="seq-mean-token-sum", config=actor)
    theirs = verl.core.get_policy_loss_fn("vanilla")
    old = batch.old.masked_fill(hidden, torch.nan)
    assert theirs(old, *args[1:], batch.mask, loss_agg_mode="seq-mean-token-sum", config=actor)[0].isnan()


def test_an_empty_micro_batch_differs():
    """No token: 0 with us, 0/0 in verl."""
    batch, actor = make_batch(), config()
    empty = torch.zeros(B, T, dtype=torch.bool)
    loss, gradient, metrics = called("fastrl_vanilla", batch, actor, response_mask=empty)
    assert loss == 0 and not gradient.any() and not any(metrics.values())
    assert called("vanilla", batch, actor, response_mask=empty)[0].isnan()


def test_gspo_far_below_differs():
    """verl holds a sequence's mean log-ratio below 10, ours within ±10: beyond −10 verl keeps a gradient of at most
    |A|·e⁻¹⁰ = 4.6e-5·|A|."""
    batch, actor = make_batch(), config(loss_mode="gspo")
    for shift in (12.0, -12.0):
        moved = batch.old - shift * (torch.arange(B) == 1)[:, None]
        far = Batch(**{**vars(batch), "old": moved})
        theirs, ours = called("gspo", far, actor), called("fastrl_gspo", far, actor)
        error = (theirs[1] - ours[1]).abs().max()
        assert error <= (0 if shift > 0 else math.exp(-10) * 2) + 1e-12


def test_the_draw_of_clip_cov():
    """As many tokens as verl's, of the same candidates; drawn from torch's generator as verl's are, but others."""
    numbers = {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.01, "clip_cov_ub": 5.0}
    batch, actor = make_batch(), config(loss_mode="clip_cov", **numbers)
    drawn = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        theirs = called("clip_cov", batch, actor)[2]["actor/pg_clipfrac"]
        torch.manual_seed(seed)
        _, gradient, metrics = called("fastrl_clip_cov", batch, actor)
        assert metrics["actor/pg_clipfrac"] == pytest.approx(theirs, rel=1e-6)
        drawn.append(tuple((gradient == 0).flatten().tolist()))
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
