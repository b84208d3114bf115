"""What the parity tests would notice: our code without its normaliser, its mask or one of its clamps fails exactly the
comparisons named, and an option at another value fails every comparison that sets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("datasets", reason="needs datasets")
pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")

from parity import liger_cases, openrlhf_cases, peers, trl_cases, verl_cases, verl_rollout_cases
from parity.batches import Case, T

import fastrl
from fastrl import correction, kl, objectives, reduction, reference, selection
from fastrl.flat import Flat
from fastrl.rollouts import Rollouts

peers.verl()
peers.openrlhf()

CASES: dict[str, Case] = {
    f"{peer}/{name}": case
    for peer, cases in (
        ("liger", {name: case for name, case in liger_cases.CASES.items() if liger_cases.is_representative(name)}),
        ("trl", trl_cases.CASES),
        ("verl", verl_cases.CASES | verl_rollout_cases.CASES),
        ("openrlhf", openrlhf_cases.CASES),
    )
    for name, case in cases.items()
}


def agrees(case: Case, spec: fastrl.LossSpec | None = None) -> bool:
    return case.ours(case.make_batch(), spec=spec).distance(case.expected) <= case.rtol


def failing() -> set[str]:
    return {name for name, case in CASES.items() if not agrees(case)}


def named(predicate: Callable[[str, Case, fastrl.LossSpec], bool]) -> set[str]:
    return {name for name, case in CASES.items() if predicate(name, case, case.loss_spec())}


def test_all_agree():
    assert not failing()


def test_without_the_normaliser(monkeypatch):
    """Every comparison but those of a sum."""
    monkeypatch.setattr(reduction, "denominator", lambda *_: None)
    assert failing() == named(lambda name, case, spec: spec.aggregation != "token-sum")


def test_without_the_length_of_a_sequence(monkeypatch):
    """Those that average over the tokens of each sequence."""
    original = reduction.weighting
    monkeypatch.setattr(reduction, "weighting", lambda spec: original(spec)._replace(per_sequence_mean=False))
    assert failing() == named(lambda name, case, spec: spec.aggregation == "seq-mean-token-mean")


def test_with_masked_tokens_in_the_length(monkeypatch):
    """Those, and whatever else takes a mean over a sequence; rejections that leave the counts count anew."""
    original = Rollouts._flatten

    def flatten(self: Rollouts) -> Flat:
        flat = original(self)
        return flat._replace(lengths=torch.full_like(flat.lengths, T))

    def means(name: str, case: Case, spec: fastrl.LossSpec) -> bool:
        gate, recounted = False, False
        if spec.rollout is not None:
            by_sequence = spec.rollout.normalize and spec.rollout.level == "sequence"
            gate = by_sequence or spec.rollout.reject_level == "sequence-mean" or spec.rollout.level == "geometric"
            recounted = not spec.rollout.rejected_in_denominator
        ratio = spec.ratio_level in ("sequence", "sequence_token")
        mean = (ratio or spec.aggregation == "seq-mean-token-mean") and not recounted
        return mean or gate or spec.off_policy_threshold is not None

    monkeypatch.setattr(Rollouts, "_flatten", flatten)
    assert failing() == named(means)


def test_without_the_mask(monkeypatch):
    """All, for there is garbage under every mask; but from logits masked log-probs are 0 before, which leaves no garbage
    on-policy, nor in a loss with rollout weights, which drops its masked tokens once more."""
    monkeypatch.setattr(reference, "_masked", lambda values, inputs: values)
    assert failing() == named(lambda *_: True) - {"liger/grpo-on-policy", "liger/grpo-sampler"}


def _unbounded(x: Tensor, *_: Any) -> Tensor:
    return x


def test_without_the_clamp_of_the_log_ratio(monkeypatch):
    monkeypatch.setattr(reference, "clamp_log_ratio", _unbounded)
    assert failing() == {"openrlhf/ppo-extreme", "verl/cispo-extreme", "verl/vanilla-extreme"}


def test_without_the_clamp_of_the_sequence_weight(monkeypatch):
    monkeypatch.setattr(reference, "hold", _unbounded)
    assert failing() == {"trl/vespo-extreme"}


def test_without_the_clamp_of_the_rollout_weight(monkeypatch):
    monkeypatch.setattr(correction, "hold", _unbounded)
    assert failing() == {"verl/rollout-extreme"}


def test_without_the_clamp_of_the_kl(monkeypatch):
    monkeypatch.setattr(kl, "hold", _unbounded)
    assert failing() == named(lambda name, case, spec: spec.kl_clamp is not None and "penalties" not in name)


def test_without_the_clip(monkeypatch):
    """Those that clip, unless the ratio is 1 or the bound far away."""
    for module in (objectives, selection):
        monkeypatch.setattr(module, "clip", _unbounded)
    clipped = {"ppo_clip", "cispo", "gmpo", "dppo_tv", "dppo_kl", "clip_cov"}
    expected = named(
        lambda name, case, spec: spec.objective in clipped and case.batch.get("old", True) in (True, "rollout")
    )
    assert failing() == expected - {"verl/cispo-extreme"}


def test_without_the_dual_clip(monkeypatch):
    """Those whose bound is near: verl's default of 3 is not reached on this batch."""
    monkeypatch.setattr(objectives, "_dual_clipped", lambda loss, t, spec: torch.zeros_like(loss, dtype=torch.bool))
    assert failing() == {"openrlhf/ppo-dual-clip", "verl/vanilla-dual-clip"}


_NEUTRAL: dict[str, Any] = {
    "delta": None,
    "entropy_coef": 0.0,
    "kl_gradient": "plain",
    "ratio_level": "token",
    "top_entropy_quantile": 1.0,
    "off_policy_threshold": None,
    "rollout": None,
}
_OTHER: dict[str, Any] = {
    "epsilon_low": 0.9,
    "epsilon_high": 3.0,
    "kl_coef": 0.7,
    "aggregation": "seq-mean-token-sum",
    "sapo_temperature_positive": 3.0,
    "sapo_temperature_negative": 3.0,
    "dppo_ratio_cap": 1e3,
    "dro_beta": 3.0,
    "clip_cov_fraction": 0.05,
    "clip_cov_low": 1.5,
    "clip_cov_high": 0.2,
    "kl_cov_fraction": 0.5,
    "kl_cov_coef": 3.0,
}


def other_specs(spec: fastrl.LossSpec) -> Iterator[tuple[str, fastrl.LossSpec]]:
    """The spec with one of its options, or of its rollout correction's, at another value."""
    for field, value in {**_NEUTRAL, **_OTHER}.items():
        here, default = getattr(spec, field), fastrl.LossSpec.__dataclass_fields__[field].default
        if here in (None, default, value) or (field == "ratio_level" and spec.objective == "gmpo"):
            continue
        changes = {field: value} | ({"max_length": None} if field == "aggregation" else {})
        yield field, spec.replace(**changes)
    if spec.rollout is not None:
        for field in ("lower", "upper", "reject_lower", "reject_upper"):
            here = getattr(spec.rollout, field)
            if here is not None:
                far = {"lower": 0.0, "reject_lower": -50.0}.get(field, 1e13)
                yield field, spec.replace(rollout=dataclasses.replace(spec.rollout, **{field: far}))
        for field, value in (("normalize", False), ("rejected_in_denominator", True)):
            if getattr(spec.rollout, field) != value:
                yield field, spec.replace(rollout=dataclasses.replace(spec.rollout, **{field: value}))


UNSEEN = {
    ("trl/cispo-on-policy", "epsilon_high"),  # the ratio is 1
    ("verl/kl-k2+", "kl_gradient"),  # k2's own gradient
    ("verl/rollout-extreme", "upper"),  # there the clamp bounds the weight
}


def test_every_option_bites():
    """No comparison would pass with one of its options at another value."""
    unseen = set()
    for name, case in CASES.items():
        unseen |= {(name, option) for option, spec in other_specs(case.loss_spec()) if agrees(case, spec)}
    assert unseen == UNSEEN
