"""Verdicts on memory and on the CPU, from made-up rows."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rich", reason="needs rich")

from test_bench_report import SHAPE, document, row

from bench import figures, targets

LARGE = {"rows": 4096, "vocab": 151936, "hidden": 4096, "dtype": "bf16", "device": "cuda"}


@pytest.mark.parametrize(
    ("target", "rows_of_logits", "peak", "met"),
    # 4096 rows, in one buffer: dhidden 32 MiB, the head's gradient 1187 MiB, buffer 1187 MiB (all logits), slack 64 MiB;
    # 8192 rows, all at once as well: 64, 1187, 2374, 64; 16384 rows in several: dhidden 128 MiB, the head's gradient in
    # fp32 and bf16 3561 MiB, buffer 1280 MiB, slack 64 MiB
    [
        ("hidden", 4096, 2469.0, True),
        ("hidden", 4096, 2471.0, False),
        ("hidden", 8192, 3688.0, True),
        ("hidden", 8192, 3690.0, False),
        ("hidden", 16384, 5032.0, True),
        ("hidden", 16384, 5034.0, False),
        ("hidden-frozen", 8192, 2501.0, True),
        ("hidden-frozen", 8192, 2503.0, False),
        ("hidden-frozen", 16384, 1471.0, True),
        ("hidden-frozen", 16384, 1473.0, False),
        ("hidden-frozen", 4096, 1282.0, True),
        ("hidden-frozen", 4096, 1284.0, False),
    ],
)
def test_peak_memory_is_the_gradients_and_one_buffer(target: str, rows_of_logits: int, peak: float, met: bool) -> None:
    shape = LARGE | {"rows": rows_of_logits}
    rows = [row("fastrl", 1.0, target=target, shape=shape, peak_mib=peak)]
    (verdict,) = (v for v in targets.verdicts(rows) if "one buffer" in v.wanted)
    assert verdict.met is met
    (verdict,) = (v for v in targets.verdicts([rows[0] | {"peak_mib": None}]) if "one buffer" in v.wanted)
    assert verdict.met is None


@pytest.mark.parametrize(("width", "bound"), [(1536, 1.17), (4096, 1.08), (8192, 1.05)])
def test_the_floor_of_a_frozen_head_depends_on_its_width(width: int, bound: float) -> None:
    """The kernel between the products is the more of them the narrower the head."""
    shape = LARGE | {"hidden": width}
    for ours, met in ((bound, True), (bound + 0.02, False)):
        rows = [row("fastrl", ours, target="hidden-frozen", shape=shape), row("floor", 1.0, target="hidden-frozen")]
        (verdict,) = (v for v in targets.verdicts(rows) if "the floor" in v.wanted)
        assert verdict.met is met and verdict.target == "hidden-frozen"


@pytest.mark.parametrize(("triton", "met"), [(1, True), (2, False)])
def test_forward_launches_are_counted(triton: int, met: bool) -> None:
    found = {"ms": 0.014, "launches": 4, "triton": triton}
    whole = {"ms": 0.09, "launches": 45, "triton": 1}
    rows = [row("fastrl", 1.0, target="token", forward_kernels=found, kernels=whole)]
    kernels, launches = list(targets.verdicts(rows))[:2]
    assert kernels.met and kernels.found == "14 us"
    assert launches.met is met and launches.found == f"{triton} of Triton, {4 - triton} of torch"


@pytest.mark.parametrize(("floor", "met"), [(2.1, True), (1.9, False)])
def test_the_sparse_gradient_is_held_to_the_dense_products(floor: float, met: bool) -> None:
    """With its errors beside the figure: speed bought with a wrong gradient is none."""
    errors = {name: {"error": 1.0, "bar": 0.1, "relative": 2e-3} for name in ("loss", "dhidden", "dweight")}
    sparse = row("fastrl-sparse", 1.0, status="approximate", errors=errors, measured={"dropped_mass": 1e-4})
    rows = [sparse, row("fastrl", 3.0), row("floor", floor, status="floor")]
    (verdict,) = targets.verdicts([r | {"target": "sparse"} for r in rows])
    assert verdict.met is met and verdict.wanted == ">= 2x as fast as floor"
    assert "dhidden off by 2.0e-03 of its norm" in verdict.found and "dropped mass 1.0e-04" in verdict.found
    assert "loss" not in verdict.found
    (verdict,) = targets.verdicts(
        [r | {"target": "sparse"} for r in rows[1:]] + [sparse | {"ms": None, "target": "sparse"}]
    )
    assert verdict.met is None


def test_verdicts_on_the_cpu() -> None:
    """Parts of eager's time and memory; beside them what nobody can avoid. Targets of another device say nothing."""
    shape = {"rows": 2048, "vocab": 32000, "hidden": 64, "dtype": "fp32", "device": "cpu"}
    case = "cpu-hidden-trainable-N2048-H64-V32000-fp32"

    def found(ours: float, peak: float) -> list[targets.Verdict]:
        rows = [
            row("eager", 10.0, case=case, shape=shape, target="cpu-hidden", peak_mib=750.0),
            row("fastrl", ours, case=case, shape=shape, target="cpu-hidden", peak_mib=peak),
            row("floor", 5.0, case=case, shape=shape, target="cpu-hidden", status="floor"),
        ]
        return list(targets.verdicts(rows))

    assert [v.met for v in found(5.9, 89.0)] == [True, True] and [v.met for v in found(6.1, 91.0)] == [False, False]
    assert found(5.9, 75.0)[0].found == "0.59x (the bare products 0.50x)"
    assert found(5.9, 75.0)[1].found == "0.100x (the gradients 0.011x)"
    assert [v.met for v in found(5.9, 0.0)][1] is True
    gae = [row("eager", 21.0, target="cpu-gae"), row("fastrl", 1.0, target="cpu-gae")]
    assert list(targets.verdicts(gae)) == []
    on_cpu = [r | {"shape": SHAPE | {"device": "cpu"}} for r in gae]
    assert [v.met for v in targets.verdicts(on_cpu)] == [True]
    assert list(targets.verdicts([r | {"target": "gae"} for r in on_cpu])) == []
    assert "| 0.59x (the bare products 0.50x) |" in figures.page({"a.json": document(_cpu_rows(case, shape))})


def _cpu_rows(case: str, shape: dict[str, Any]) -> list[dict[str, Any]]:
    times = {"eager": 10.0, "fastrl": 5.9, "floor": 5.0}
    return [row(name, ms, case=case, shape=shape, target="cpu-hidden") for name, ms in times.items()]
