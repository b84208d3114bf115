"""TRL's own `_compute_loss` and ours on the same batch: value and gradients. The mapping is in `trl_cases.py`."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("datasets", reason="needs datasets")

from parity.batches import everywhere
from parity.trl_cases import CASES, configured, trl_loss

import fastrl


@pytest.mark.parametrize(
    ("case", "engine"), everywhere(CASES, lambda name: name.split("-")[0] not in ("bnpo", "dr_grpo", "dapo", "luspo"))
)
def test_loss(case, engine):
    case.check(engine)


@pytest.mark.parametrize("name", ["rloo", "gmpo-plain"])
def test_an_empty_completion_differs(name):
    """TRL takes its ratio as exp(0) = 1, and adds −A/B to the loss, a constant; with us it is not there."""
    case = CASES[name]
    batch = dataclasses.replace(case, batch={}).make_batch()
    ours, theirs = case.ours(batch), case.theirs(batch)
    shift = -batch.advantages[-1] / len(batch.advantages)
    assert not batch.mask[-1].any() and shift
    theirs.loss -= shift
    assert ours.distance(theirs) <= case.rtol


def test_entropy_mask_of_gmpo_differs():
    """TRL takes the geometric mean over the tokens of high entropy; we refuse, since the loss is one per sequence."""
    batch = CASES["gmpo-plain"].make_batch()
    plain, masked = (trl_loss("GMPO", top_entropy_quantile=q)(batch) for q in (1.0, 0.4))
    assert masked.distance(plain) > 0.1
    with pytest.raises(ValueError, match="^top_entropy_quantile: "):
        fastrl.LossSpec(objective="gmpo", ratio_level="sequence", top_entropy_quantile=0.4)


@pytest.mark.parametrize("quantile", [1.0, 0.4])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_entropy_bonus(loss_type, quantile):
    """TRL's is the mean over the micro-batch's tokens (those of high entropy) for every loss type, which is
    `entropy_aggregation="token-mean"`; with the weights of the loss itself it is another one."""
    case, coef = CASES[f"{loss_type}-plain"], 0.2
    epsilon = {"epsilon_high": 1.1} if loss_type == "cispo" else {}
    batch = case.make_batch()
    theirs = trl_loss(loss_type=loss_type, entropy_coef=coef, top_entropy_quantile=quantile, **epsilon)(batch)
    spec = case.loss_spec().replace(entropy_coef=coef, top_entropy_quantile=quantile)
    ours = case.ours(batch, spec=spec.replace(entropy_aggregation="token-mean"))
    assert ours.distance(theirs) <= case.rtol
    assert case.ours(batch, spec=spec).distance(theirs) > 1e-3


def test_entropy_controller():
    """Over five optimizer steps whose entropy falls from above the target to below it and rises again."""
    case = CASES["entropy-bonus"]
    it = configured("GRPO", {})
    limits = {"target": 1.0, "delta": 0.05, "minimum": 0.1, "maximum": 0.3}
    ours = fastrl.AdaptiveEntropyController(0.2, **limits)
    state = {"use_adaptive_entropy": True, "_last_world_entropy": float("inf"), "_entropy_window_stats": None}
    vars(it).update(state)
    vars(it.args).update(
        {"entropy_target": 1.0, "entropy_coef_delta": 0.05, "entropy_coef_min": 0.1, "entropy_coef_max": 0.3}
    )
    try:
        coefficient = 0.2
        for scale in (1.5, 0.5, 0.4, 0.6, 1.4):
            batch = case.make_batch()
            batch = dataclasses.replace(batch, entropy=batch.entropy * scale)
            theirs = trl_loss(loss_type="bnpo", entropy_coef=coefficient)
            want = theirs(batch)
            coefficient = it.entropy_coef
            got = case.ours(batch, spec=case.loss_spec().replace(entropy_coef=ours.value))
            assert got.distance(want) <= case.rtol
            ours.update((batch.entropy * batch.mask).sum() / batch.tokens)
            assert ours.coefficient == pytest.approx(coefficient, rel=1e-12)
        assert coefficient != 0.2
    finally:
        it.use_adaptive_entropy = False
