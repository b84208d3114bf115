"""What the benchmarks say of a run: README figures, losses, verdicts on the targets, growth curves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="needs rich")

from bench import __main__ as command
from bench import figures, plots, readme, targets
from bench.rows import UNQUIET

SHAPE = {"rows": 8, "vocab": 100, "hidden": 4, "dtype": "fp32", "device": "cuda"}


def row(provider: str, ms: float | None, *, case: str = "scan-gae-B512-T8192", **more: Any) -> dict[str, Any]:
    """A row of a run of three rounds that all took `ms`."""
    speed = None if ms is None else {"median": ms, "q25": ms, "q75": ms, "samples": [ms] * 3}
    made = {
        "case": case, "suite": case.split("-")[0], "target": None, "provider": provider, "status": "ok", "ms": speed,
        "shape": SHAPE, "rate": {"share": 0.5}, "vs_eager": {"median": 2.0, "steady": True}, "peak_mib": None,
        "reason": None, "disturbed_rounds": 0, "forward_kernels": None,
    }  # fmt: skip
    return made | more


def document(rows: list[dict[str, Any]], date: str = "2026-01-01", device: str = "cpu") -> dict[str, Any]:
    machine = {"cpu": "a processor", "cores": 2, "gpu": "an accelerator"}
    versions = {"torch": "2.13.0", "trl": None}
    return {
        "date": date, "device": device, "quick": False, "machine": machine, "versions": versions, "rows": rows,
    }  # fmt: skip


def test_the_readme_is_up_to_date() -> None:
    assert command.main(["readme", "--check"]) == 0


def test_check_fails_on_a_stale_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "README.md"
    before, section = (readme.ROOT / "README.md").read_text().split(readme.BEGIN)
    stale.write_text(before + readme.BEGIN + re.sub(r"\| \d+\.\d \|", "| 98.7 |", section, count=1))
    assert command.main(["readme", "--check", "--readme", str(stale)]) == 1
    assert "README.md is out of date" in capsys.readouterr().err
    page = tmp_path / "benchmarks.md"
    assert command.main(["readme", "--check", "--page", str(page)]) == 1 and not page.exists()
    assert "benchmarks.md is out of date" in capsys.readouterr().err
    assert command.main(["readme", "--page", str(page)]) == 0
    assert page.read_text() == (readme.ROOT / "docs" / "benchmarks.md").read_text()
    assert command.main(["readme", "--readme", str(stale)]) == 0
    assert stale.read_text() == (readme.ROOT / "README.md").read_text()
    stale.write_text("no markers")
    assert command.main(["readme", "--readme", str(stale)]) == 2


def test_quick_runs_are_no_figures(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document([row("fastrl", 1.0)]) | {"quick": True}))
    assert figures.load(tmp_path) == {}
    assert "No GPU figure" in readme.section({})


def test_a_case_comes_from_its_newest_steady_run() -> None:
    scattered = {"ms": {"median": 1.0, "q25": 1.0, "q75": 1.6, "samples": [1.0, 1.0, 2.2]}}
    runs = {
        "old.json": document([row("eager", 9.0), row("fastrl", 3.0)], "2026-01-01"),
        "new.json": document([row("eager", 8.0), row("fastrl", 2.0)], "2026-01-02"),
        "noisy.json": document([row("eager", 7.0), row("fastrl", 1.0) | scattered], "2026-01-03"),
    }
    text = figures.page(runs)
    assert "| GAE, 512 x 8192 | 8.0 | 2.0 |" in text
    assert "No correct provider was faster." in text
    text = figures.page({"noisy.json": runs["noisy.json"]})
    assert "GAE, 512 x 8192 (the rounds differed too much)." in text and "7.0" not in text


def test_steady_does_not_depend_on_eager() -> None:
    """Where eager runs out of memory, or is scattered, fastrl's own figures stand."""
    failed = row("eager", None, status="failed", reason="OutOfMemoryError", vs_eager=None)
    rows = [failed, row("trl", 4.0, vs_eager=None), row("fastrl", 2.0, vs_eager=None)]
    text = figures.page({"a.json": document(rows)})
    assert "| GAE, 512 x 8192 | 4.0 | 2.0 |" in text and "differed" not in text
    assert "| GAE | 1 | - | 2 | - |" in readme.section({"a.json": document(rows)})
    disturbed = [r | {"disturbed_rounds": UNQUIET} for r in rows]
    assert "(the rounds differed too much)" in figures.page({"a.json": document(disturbed)})


def test_a_wrong_result_is_called_wrong() -> None:
    """Also where an older run was right: nothing of it stands for the code of today."""
    wrong = row("fastrl", None, status="wrong", reason="returns is off by 1, allowed 0.1", vs_eager=None)
    older = document([row("eager", 3.0), row("fastrl", 1.0)])
    text = figures.page({"a.json": older, "b.json": document([row("eager", 3.0), wrong], date="2026-02-01")})
    assert "GAE, 512 x 8192 (wrong: returns is off by 1, allowed 0.1)." in text
    assert "| GAE, 512 x 8192 |" not in text and "differed" not in text


def test_losses_are_stated() -> None:
    case = "hidden-frozen-N8-H4-V100-fp32"
    rows = [
        row("eager", 4.0, case=case, peak_mib=500.0),
        row("fastrl", 2.0, case=case, peak_mib=60.0),
        row("trl", 1.0, case=case, peak_mib=50.0),  # ten MiB are not worth a word
        row("liger", 3.0, case=case, peak_mib=5.0),
        row("floor", 0.5, case=case, peak_mib=1.0, status="floor"),  # no implementation
    ]
    for made in (readme.section, figures.page):
        text = " ".join(made({"a.json": document(rows)}).split())
        label = "GRPO from hidden states, frozen head, 8 x 4 x 100 fp32"
        assert f"slower at: {label} (trl is 2.0 times as fast)." in text
        assert f"more memory at: {label} (liger 5.0 against 60.0 MiB)." in text


def test_the_summary_spans_the_cases_of_a_kind() -> None:
    """A line per kind: least and greatest speed-up over eager and over the fastest other, part of eager's memory."""
    cases = ["hidden-frozen-N8-H4-V100-fp32", "hidden-frozen-N8-H4-V200-fp32"]
    rows = [row("eager", 4.0, case=cases[0], peak_mib=500.0), row("fastrl", 2.0, case=cases[0], peak_mib=50.0)]
    rows += [row("trl", 3.0, case=cases[0]), row("liger", 1.0, case=cases[0]), row("floor", 0.1, status="floor")]
    rows += [row("eager", 4.0, case=cases[1], peak_mib=500.0), row("fastrl", 5.0, case=cases[1], peak_mib=100.0)]
    rows += [row("eager", 6.0), row("fastrl", 2.0)]
    text = readme.section({"a.json": document(rows)})
    assert "| GRPO from hidden states, frozen head | 2 | 0.8 to 2 | 0.5 | 0.1 to 0.2 |" in text
    assert "| GAE | 1 | 3 | - | - |" in text


def test_the_summary_counts_the_targets() -> None:
    rows = [row("eager", 4.0, target="gae"), row("fastrl", 0.05, target="gae", forward_kernels={"ms": 0.02})]
    text = readme.section({"a.json": document(rows, device="cuda")})
    assert "Of 2 targets 1 are met; missed in some cases of: GAE." in text


def test_gpu_runs_bring_verdicts() -> None:
    rows = [row("eager", 4.0, target="gae"), row("fastrl", 0.02, target="gae", forward_kernels={"ms": 0.02})]
    rows[1]["wall_ms"] = {"median": 0.7}
    text = figures.page({"a.json": document(rows, device="cuda")})
    assert "an accelerator" in text and "No GPU figure" not in text
    assert "| GAE, 512 x 8192 | >= 100x as fast as eager | 200.00x |" in text
    assert "by the wall clock" in text and "| GAE, 512 x 8192 | 0.7 |" in text


def test_what_was_not_decided_is_listed_per_device() -> None:
    """Also once a GPU file exists, and where its cases were skipped."""
    rows = [row("eager", 4.0, target="gae"), row("fastrl", 0.02, target="gae")]
    late = [row(name, None, case="token-policy-N9", target="token", status="skipped") for name in ("eager", "fastrl")]
    late = [r | {"reason": "the budget of 480 s was spent"} for r in late]
    found = {"a.json": document(rows + late, device="cuda")}
    for made in (figures.page, readme.section):
        text = " ".join(made(found).split())
        assert "No CPU figure has been measured yet." in text and "No GPU figure" not in text
        gpu, cpu = text.split("Targets that wait for a GPU: ")[1].split("Targets that wait for a CPU: ")
        assert "token loss with metrics" in gpu and "GAE, 512 x 8192" not in gpu and "GAE, 512 x 8192, CPU" in cpu
        assert "loss and metrics from log-probs, 9 tokens" in text
    assert "9 tokens (the budget of 480 s was spent)" in " ".join(figures.page(found).split())
    unknown = [r | {"ms": None} for r in rows]  # a case without any verdict decides nothing
    assert "GAE, 512 x 8192." in figures.unmeasured({"a.json": document(unknown, device="cuda")})[0]


@pytest.mark.parametrize(
    ("target", "rows", "met"),
    [
        ("gae", [row("eager", 3.0), row("fastrl", 0.02, forward_kernels={"ms": 0.029})], [True, True]),
        ("gae", [row("eager", 1.0), row("fastrl", 0.05, forward_kernels={"ms": 0.031})], [False, False]),
        ("gae", [row("eager", 3.0), row("fastrl", 0.02, kernels={"ms": 0.02})], [None, True]),  # of the whole step
        ("gae", [row("fastrl", 0.02)], [None, None]),  # a clock of calls says nothing of the kernels
        ("gae", [row("eager", 3.0), row("fastrl", None)], [None, None]),
        (
            "token",
            [row("eager", 1.0), row("torch.compile", 0.2), row("fastrl", 0.1, first_ms=4900.0)],
            [None, None, True, True, True],
        ),
        (
            "token",
            [row("eager", 1.0), row("torch.compile", 0.2), row("fastrl", 0.1, first_ms=5100.0)],
            [None, None, True, True, False],
        ),
        ("score", [row("fastrl", 1.0, rate={"share": 0.91}), row("trl", 1.1)], [True, True]),
        (
            "score",
            [row("fastrl", 1.0, rate={"share": 0.91}, notes=["no first call, OutOfMemoryError"]), row("trl", 1.1)],
            [True, True, None],
        ),
        ("score", [row("fastrl", 1.0, rate={"share": 0.89}), row("trl", 0.9)], [False, False]),
        ("score", [row("fastrl", 1.0, rate={"share": None}), row("trl", 1.1)], [None, True]),
        ("logits", [row("fastrl", 1.19), row("floor", 1.0), row("liger", 1.7)], [True, True]),
        ("logits", [row("fastrl", 1.21), row("floor", 1.0), row("liger", 1.6)], [False, False]),
        ("logits-sequence", [row("fastrl", 1.19), row("floor", 1.0), row("liger", 2.4)], [True, True]),
        ("realistic", [row("fastrl", 1.0), row("fastrl-dense", 1.79)], [False]),
    ],
)
def test_verdicts(target: str, rows: list[dict[str, Any]], met: list[bool | None]) -> None:
    found = list(targets.verdicts([r | {"target": target} for r in rows]))
    assert [verdict.met for verdict in found] == met
    assert all((verdict.found == "not measured") == (verdict.met is None) for verdict in found)


def test_verdicts_pair_the_rounds() -> None:
    """The median of ratios, not the ratio of medians: a slow phase hits both in the same round."""
    ours = row("fastrl", 2.0) | {"ms": {"median": 2.0, "samples": [1.0, 2.0, 30.0]}}
    theirs = row("trl", 6.0) | {"ms": {"median": 6.0, "samples": [3.0, 6.0, 30.0]}}
    assert targets.ratio(ours, theirs) == 3.0


def test_growth_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    sizes = [(64, 32000), (128, 32000), (256, 32000), (64, 8000), (64, 64000)]
    rows = [
        row(provider, None, case=f"memory-logits-grpo-N{n}-V{v}", suite="memory", peak_mib=float(n * v))
        | {"shape": {"rows": n, "vocab": v}}
        for n, v in sizes
        for provider in ("eager", "fastrl")
    ]
    at, curves = plots.curve(rows, "rows")
    assert at["vocab"] == 32000 and curves["fastrl"] == ([64, 128, 256], [64 * 32e3, 128 * 32e3, 256 * 32e3])
    at, curves = plots.curve(rows, "vocab")
    assert at["rows"] == 64 and curves["eager"][0] == [8000, 32000, 64000]
    assert [panel[1:3] for panel in plots.growth_panels(rows)] == [("peak_mib", "rows"), ("peak_mib", "vocab")]
    timed = [r | {"ms": {"median": r["peak_mib"] / 1e3}} for r in rows]
    assert [panel[1:3] for panel in plots.growth_panels(timed)][2:] == [("ms", "rows"), ("ms", "vocab")]
    assert plots.curve(timed, "rows", "ms")[1]["eager"][1] == [64 * 32.0, 128 * 32.0, 256 * 32.0]
    assert [path.name for path in plots.draw(tmp_path / "run.json", rows, "title")] == ["run-growth.png"]
    assert [path.name for path in plots.draw(tmp_path / "run.json", [row("fastrl", 1.0)], "title")] == ["run.png"]
