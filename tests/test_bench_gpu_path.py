"""The way that the benchmarks go on a GPU, on a simulated one: a host clock, a device clock, and a queue between."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="needs rich")

from bench import kernels, memory, report, rounds, runner, sides, suites, targets, timing
from bench import rows as every_row
from bench.case import Case, Inputs, Provider, Shape


class Gpu:
    """Milliseconds of the host and of the device, which starts what it is given no earlier than it is given. A step
    of the fixture takes 0.4 of the host's and 0.1 of the device's."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.emptied = 0

    def python(self, ms: float) -> None:
        self.host += ms

    def launch(self, ms: float) -> None:
        self.device = max(self.device, self.host) + ms

    def synchronize(self) -> None:
        self.host = self.device = max(self.device, self.host)

    def event(self, enable_timing: bool) -> Any:
        made = SimpleNamespace(at=0.0)
        made.record = lambda: setattr(made, "at", max(self.device, self.host))
        made.elapsed_time = lambda end: end.at - made.at
        return made

    def empty_cache(self) -> None:
        self.emptied += 1


CYCLES_PER_MS = 1_500_000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.launch(cycles / CYCLES_PER_MS))
    monkeypatch.setattr(torch.cuda, "empty_cache", made.empty_cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(timing, "_flushing", lambda _: torch.zeros(8))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.host / 1e3))
    step = timing.step

    def timed_step(*arguments: Any) -> Inputs:
        made.python(0.4)
        made.launch(0.1)
        return step(*arguments)

    monkeypatch.setattr(timing, "step", timed_step)
    timing._lead_cycles.cache_clear()
    yield made
    timing._lead_cycles.cache_clear()


def test_python_before_the_launches_is_not_the_gpus_time(gpu: Gpu) -> None:
    """0.7 ms of Python before 0.2 ms of kernels: the idle device counted both, the wall clock still does."""

    def call() -> None:
        gpu.python(0.7)
        gpu.launch(0.2)

    assert timing._between_events(call) == pytest.approx(0.9)
    assert timing.timed(call, "cuda") == pytest.approx(0.2)
    assert timing.waited(call) == pytest.approx(0.9)


def test_the_lead_is_as_long_as_it_says(gpu: Gpu) -> None:
    assert timing._lead_cycles() == pytest.approx(timing.LEAD_MS * CYCLES_PER_MS)


def test_a_wait_inside_the_call_stays_in_its_time(gpu: Gpu) -> None:
    """Metrics read on the host: what Python does after the wait keeps the device idle, and counts."""

    def call() -> None:
        gpu.python(0.5)
        gpu.launch(0.2)
        gpu.synchronize()
        gpu.python(0.3)
        gpu.launch(0.1)

    assert timing.timed(call, "cuda") == pytest.approx(0.6)


def token_case() -> Case:
    """The case of the token target as on a GPU, with a smaller batch that lies in the host's memory."""
    case = next(c for c in suites.cases("token", "cuda", quick=True) if c.target == "token")
    on_host = dataclasses.replace(case.shape, device="cpu")

    def make(shape: Shape, ragged: bool) -> Inputs:
        return case.make_inputs(dataclasses.replace(shape, device="cpu"), ragged)

    providers = {name: case.providers[name] for name in ("eager", "fastrl")}
    loaded = {n: dataclasses.replace(p, load=lambda _, p=p: p.load(on_host)) for n, p in providers.items()}
    return dataclasses.replace(case, make_inputs=make, providers=loaded)


OWN, TORCH = ("a_triton_kernel", 11.0), ("void at::native::fill", 1.5)


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """The calls that the profiler was given; it sees one Triton kernel and one of torch's in each."""
    calls: list[Callable[[], Any]] = []
    monkeypatch.setattr(kernels, "triton_names", lambda: {OWN[0]})
    monkeypatch.setattr(kernels, "_profiled", lambda call: (calls.append(call), call(), [OWN, TORCH])[-1])
    return calls


def run(case: Case) -> dict[str, dict[str, Any]]:
    rows = runner.run_case(case, list(case.providers), {"copy_gbs": 1.0}, True, lambda _: None, 0.2)
    return {row["provider"]: row for row in rows}


def test_a_case_on_a_gpu(gpu: Gpu, profiled: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm, cold and wall rounds, memory, kernels of the step and of forward, the first call, verdicts, the table."""
    monkeypatch.setattr(memory, "_in_process", lambda *_, **__: {"first_ms": 4000.0})
    rows = run(token_case())
    assert [row["status"] for row in rows.values()] == ["ok", "ok"], [row["reason"] for row in rows.values()]
    ours = rows["fastrl"]
    assert ours["notes"] == []
    assert ours["ms"]["median"] == pytest.approx(0.1) == ours["cold_ms"]["median"]
    assert ours["wall_ms"]["median"] == pytest.approx(0.5)
    assert len(ours["wall_ms"]["samples"]) >= rounds.MIN_SIDE_ROUNDS
    assert ours["forward_kernels"] == {"ms": pytest.approx(0.0125), "launches": 2, "triton": 1} == ours["kernels"]
    assert ours["peak_mib"] == 3.0 and ours["first_ms"] == 4000.0 and gpu.emptied == 1
    assert rows["eager"]["kernels"] is None and len(profiled) == 2 * kernels.PROFILES  # fastrl's only
    met = {v.wanted: v.met for v in targets.verdicts(list(rows.values()))}
    assert met["<= 15 us of kernels in forward"] and met["1 launch of Triton in forward"]
    shown = report.table(list(rows.values()))
    assert "forward 12.5 us in 2 kernels and copies, 1 of them of Triton" in shown.caption
    assert any(column.header == "wall ms" and "0.5" in list(column.cells) for column in shown.columns)


def test_forward_is_the_loss_alone(profiled: list) -> None:
    """Building the batch, backward and reading the metrics are the rest of the step."""
    case = token_case()
    provider = case.providers["fastrl"]
    kernels.of_forward(case, provider, provider.load(case.shape))
    out = profiled[-1]()
    inputs = case.make_inputs(case.shape, False)
    assert out.loss.requires_grad and out.loss.item() == provider.load(case.shape)(inputs)["loss"].item()
    gae = suites.cases("scan", "cpu", quick=True)[0]  # a step of one call
    assert kernels.of_forward(gae, gae.providers["fastrl"], gae.providers["fastrl"].load(gae.shape))["launches"] == 2


def test_a_profiler_that_sees_nothing_measured_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 us would have met every target. One empty profile, as the first may be, is left out."""
    gae = suites.cases("scan", "cpu", quick=True)[0]
    provider = gae.providers["fastrl"]
    monkeypatch.setattr(kernels, "_profiled", lambda _: [])
    assert kernels.of_step(gae, provider, provider.load(gae.shape)) is None
    answers = [[], [("b", 3.0)], [("b", 2.0)]]
    monkeypatch.setattr(kernels, "_profiled", lambda _: answers.pop(0))
    found = kernels.of_step(gae, provider, provider.load(gae.shape))
    assert found == {"ms": 0.003, "launches": 1, "triton": 0}


def test_the_names_of_tritons_kernels() -> None:
    """As their sources define them: `@triton.jit`, maybe more decorators, `def name_kernel`."""
    pytest.importorskip("triton")
    import fastrl_kernels

    folder = Path(fastrl_kernels.__file__).parent
    sources = {path.stem: path.read_text() for path in folder.glob("*.py")}
    written = {
        stem: re.findall(r"@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\(", text) for stem, text in sources.items()
    }
    for stem in written:
        if written[stem]:
            importlib.import_module(f"fastrl_kernels.{stem}")
    names = [name for found in written.values() for name in found]
    assert len(names) > 10 and set(names) <= kernels.triton_names()
    found = kernels.summary([(names[0], 1.0), ("Memcpy DtoH", 1.0), ("void at::native::fill", 1.0)])
    assert found == {"ms": 0.003, "launches": 3, "triton": 1}


@pytest.mark.parametrize("part", ["gpu_peak", "first_call", "of_step", "of_forward"])
def test_a_failing_side_leaves_the_rest(part: str, gpu: Gpu, profiled: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main figure of a provider is not lost with its first call or its profile; the row says what is missing."""

    def fail(*_: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(memory, "_in_process", lambda *_, **__: {"first_ms": 4000.0})
    monkeypatch.setattr(memory if hasattr(memory, part) else kernels, part, fail)
    ours = run(token_case())["fastrl"]
    assert ours["status"] == "ok" and ours["ms"] and ours["rate"]
    (note,) = ours["notes"]
    assert note.endswith("RuntimeError: no luck") and note.startswith("no ")
    sides_of = {"gpu_peak": "peak_mib", "first_call": "first_ms", "of_step": "kernels", "of_forward": "forward_kernels"}
    assert [key for key in sides_of.values() if ours[key] is None] == [sides_of[part]]
    assert "no luck" in report.table([ours]).caption


def test_a_broken_device_does_not_lose_the_row(gpu: Gpu, profiled: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call fails: the one that made it is named, and those after it have rows too."""
    broken: list[str] = []

    def call(*_: Any) -> None:
        if broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def illegal(_: Inputs) -> Inputs:
        broken.append("here")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered, by the culprit")

    case = token_case()
    culprit = dataclasses.replace(case.providers["fastrl"], load=lambda _: illegal)
    case = dataclasses.replace(case, providers={"culprit": culprit, **case.providers})
    monkeypatch.setattr(torch.cuda, "empty_cache", call)
    monkeypatch.setattr(torch.cuda, "synchronize", call)
    rows = run(case)
    assert broken == ["here"] and {row["status"] for row in rows.values()} == {"failed"}
    assert rows["culprit"]["reason"].endswith("by the culprit") and "illegal" in rows["fastrl"]["reason"]


def test_a_fresh_process_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def hang(command: list[str], timeout: float, **_: Any) -> None:
        waited.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(memory.subprocess, "run", hang)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    case = next(c for c in suites.cases("token", "cuda", quick=True) if c.target == "token")
    with pytest.raises(RuntimeError, match="no end after 90 s"):
        memory.first_call(case, "fastrl", quick=True)
    on_cpu = suites.cases("token", "cpu", quick=True)[0]
    with pytest.raises(RuntimeError, match="no end after 600 s"):
        memory.in_fresh_process(on_cpu, "fastrl", quick=True)
    assert waited == [90.0, 600.0]


def test_memory_alone_fails_with_its_reason(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing but memory to measure, a row without it is no result."""
    monkeypatch.setattr(memory, "gpu_peak", lambda *_: 1 / 0)
    case = dataclasses.replace(token_case(), memory_only=True, short=False, first_call=False)
    row = every_row.new(case, "fastrl")
    sides.take(case, {"fastrl": row}, {"fastrl": lambda x: x}, True, lambda _: None)
    assert row["status"] == "failed" and "ZeroDivisionError" in row["reason"]


def test_what_only_an_approximate_provider_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse gradient: how far it is off, and the probability that it left out."""
    monkeypatch.setattr(sides, "take", lambda *_: None)
    case = next(c for c in suites.cases("hidden", "cpu", quick=True) if "peaked" in c.name)
    providers = {name: case.providers[name] for name in ("eager", "fastrl", "fastrl-sparse")}
    rows = run(dataclasses.replace(case, providers=providers, memory_only=True))
    assert rows["fastrl-sparse"]["status"] == "approximate" and rows["fastrl"]["measured"] is None
    assert 0 < rows["fastrl-sparse"]["measured"]["dropped_mass"] < 0.1
    assert 0 < rows["fastrl-sparse"]["errors"]["dweight"]["relative"] < 0.1


@pytest.mark.parametrize("name", ["fastrl-overlap", "fastrl-fp32-logits"])
def test_the_options_still_to_be_chosen_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import hidden

    monkeypatch.setattr(sides, "take", lambda *_: None)
    case = hidden.loss_case(Shape(4, 16, 512, 32, "bf16"), frozen=False, only=("eager", name))
    assert set(case.providers) == {"eager", name}
    rows = run(dataclasses.replace(case, memory_only=True))
    assert rows[name]["status"] == "ok", rows[name]["reason"]


def test_compiled_graphs_are_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes fewer rows: the default would then time a graph for any number of them."""
    from bench import plain

    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda run, **more: seen.update(more) or run)
    plain.compiled(lambda inputs: inputs, Shape(1, 1))
    assert seen == {"dynamic": False}


def test_the_verdicts_name_the_machine() -> None:
    assert report.verdict_table([], "NVIDIA H100 80GB HBM3").title == "Targets for NVIDIA H100 80GB HBM3"


def test_a_provider_may_have_nothing_beside_its_call() -> None:
    assert Provider(lambda _: lambda inputs: inputs).forward is None
