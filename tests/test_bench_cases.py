"""The cases of the benchmarks: which there are, what they hold, and what their floors compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("rich", reason="needs rich")

from bench import figures, hidden, inputs, logits, suites, targets, timing
from bench.case import Shape


def test_every_target_has_a_case_with_its_providers() -> None:
    cases = [case for device in ("cpu", "cuda") for case in suites.cases("targets", device, quick=False) if case.target]
    once = [case.name for case in cases if "fastrl-overlap" in case.providers]
    assert once == ["hidden-trainable-N4096-H4096-V151936-bf16"]
    assert "fastrl-fp32-logits" in next(c for c in cases if c.name == once[0]).providers
    assert {case.target for case in cases} == set(targets.TARGETS)
    assert {case.target for case in cases if case.first_call} == {
        name for name, target in targets.TARGETS.items() if target.first_seconds
    }
    assert all(case.short for case in cases if targets.TARGETS[case.target].kernel_ms)
    for case in cases:
        assert targets.TARGETS[case.target].device == case.shape.device
        target = targets.TARGETS[case.target]
        assert set(target.faster) <= set(case.providers) <= set(target.providers), case.name
        assert target.floor is None or case.providers["floor"].floor, case.name


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("suite", ["targets", "all", "logits"])
def test_a_kernel_that_waits_comes_after_all_others(suite: str, quick: bool) -> None:
    """A hang loses no figure but its own: the rows of every other case are written before."""
    *others, last = suites.cases(suite, "cuda", quick)
    assert set(last.providers) == {"eager", "fastrl", "floor", "fastrl-tickets"}
    assert last.waits and last.target is None and not last.first_call
    assert not any(case.waits or "fastrl-tickets" in case.providers for case in others)
    assert not any(case.waits for case in suites.cases(suite, "cpu", quick=False))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cases_are_unique_and_have_words(device: str) -> None:
    """A worker process finds its case by name."""
    names = [case.name for case in suites.cases("all", device, quick=False)]
    assert len(set(names)) == len(names)
    assert all(name.startswith("memory-") or figures.label(name) != name for name in names)


def test_the_realistic_batch() -> None:
    shape = Shape(64, 128, 50, 8)
    batch = inputs.realistic_inputs(shape, False)
    assert batch["mask"].float().mean() == pytest.approx(0.7, abs=0.01)
    assert (batch["advantages"] == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert "ref" not in batch
    full = inputs.dense(batch)
    assert full["mask"].all() and (full["advantages"] != 0).all()
    held = batch["mask"][batch["advantages"] == 0].sum() / batch["mask"].sum()
    assert held == pytest.approx(0.3, abs=0.003)  # of the tokens, not only of the sequences
    tokens = batch["mask"].sum(-1)
    live = tokens[batch["advantages"] != 0].sum().item()
    assert hidden.realistic_flops(shape) == (2 * tokens.sum().item() + 4 * live) * 8 * 50
    assert 6 * shape.rows * 8 * 50 / hidden.realistic_flops(shape) == pytest.approx(1.786, abs=0.004)


def test_the_memory_suite_spans_n_and_v() -> None:
    for device in ("cpu", "cuda"):
        shapes = [case.shape for case in suites.cases("memory", device, quick=False)]
        assert max(s.rows for s in shapes) == 8 * min(s.rows for s in shapes)
        assert max(s.vocab for s in shapes) >= 8 * min(s.vocab for s in shapes)
    assert all(case.memory_only for case in suites.cases("memory", "cpu", quick=True))
    assert not any(case.memory_only for case in suites.cases("memory", "cuda", quick=False))


def test_the_cpu_suite_spans_n_h_and_v() -> None:
    shapes = [case.shape for case in suites.cases("cpu", "cpu", quick=False)]
    for size in ("rows", "hidden", "vocab"):
        assert len({getattr(shape, size) for shape in shapes}) >= 3, size
    assert suites.cases("cpu", "cuda", quick=False) == []


def test_cold_rounds_flush_the_last_cache() -> None:
    flushed = timing._flushing("cpu")
    before = int(flushed[0])
    case = suites.cases("scan", "cpu", quick=True)[0]
    provider = case.providers["fastrl"]
    run = provider.load(case.shape)
    assert timing.time_step(case, provider, run) > 0 and flushed[0] == before
    assert timing.time_step(case, provider, run, "cold") > 0 and flushed[0] == before + 1
    assert flushed.numel() == 2 * timing.last_cache_bytes("cpu") >= 2**20


def test_floors_compute_what_their_names_say() -> None:
    case = next(c for c in suites.cases("hidden", "cpu", quick=True) if "trainable" in c.name)
    batch = case.make_inputs(case.shape, False)
    out = case.providers["floor"].load(case.shape)(batch)
    assert out["dweight"].shape == batch["weight"].shape and out["dhidden"].shape[-1] == case.shape.hidden
    assert not torch.is_grad_enabled() or out["dweight"].grad_fn is None
    token, sequence = suites.cases("logits", "cpu", quick=True)[:2]
    batch = token.make_inputs(token.shape, False)
    for case, times in ((token, 1.0), (sequence, 1.5)):  # a ratio per sequence reads every logit once more
        copies = case.providers["floor"].load(case.shape)(batch)
        assert sum(copy.numel() for copy in copies.values()) == times * batch["logits"].numel()
    assert logits.sequence_bytes(dataclasses.replace(token.shape, device="cuda")) == 1.5 * logits.loss_bytes(
        token.shape
    )
