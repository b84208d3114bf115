"""`python -m bench` as a user runs it: the promised JSON, and no speed for a provider that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="needs rich")

ROOT = Path(__file__).parents[1]
DOCUMENT = {"date", "command", "git", "machine", "versions", "device", "quick", "ceilings", "rows"}
ROW = {
    "case", "suite", "target", "shape", "provider", "status", "reason", "notes", "errors", "checked_rows", "measured",
    "ms", "cold_ms", "wall_ms", "kernels", "forward_kernels", "first_ms", "peak_mib", "first_peak_mib", "rate",
    "vs_eager", "disturbed_rounds",
}  # fmt: skip


def bench(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["OMP_NUM_THREADS"] = "1"  # beside other test workers, threads that wait for each other take minutes
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment |= settings
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def quick(out: Path, *arguments: str) -> dict:
    done = bench("--quick", "--device", "cpu", "--providers", "eager", "fastrl", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stderr
    assert "say nothing about the Triton kernels" in " ".join(done.stdout.split())
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "case"), [("hidden", "trainable")])
def test_quick_run_writes_the_promised_json(tmp_path: Path, suite: str, case: str) -> None:
    document = quick(tmp_path, "--suite", suite, "--case", case)
    assert set(document) == DOCUMENT
    assert {"cpu", "cores", "memory_gib", "gpu"} <= set(document["machine"])
    assert {"python", "torch", "triton", "transformers", "trl", "liger"} <= set(document["versions"])
    assert document["git"].keys() == {"commit", "dirty"}
    assert document["ceilings"]["copy_gbs"] > 0
    assert {row["provider"] for row in document["rows"]} == {"eager", "fastrl"}
    for row in document["rows"]:
        assert set(row) == ROW
        assert row["status"] == "ok", row["reason"]
        assert 0 < row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert len(row["ms"]["samples"]) >= 5 <= len(row["cold_ms"]["samples"])
        assert row["first_ms"] > 0
        assert row["rate"]["share"] > 0
        assert all(error["error"] <= error["bar"] for error in row["errors"].values())
        assert all(0 <= error["relative"] < 1e-3 for error in row["errors"].values())
        assert row["notes"] == [] and row["wall_ms"] is None  # every clock of a CPU is the wall's
    assert str(tmp_path) not in json.dumps(document)


@pytest.mark.slow
def test_a_wrong_provider_gets_no_speed(tmp_path: Path) -> None:
    document = quick(tmp_path, "--suite", "logits", "--case", "grpo", "--inject-wrong")
    rows = {row["provider"]: row for row in document["rows"]}
    assert rows["fastrl"]["status"] == "ok" and rows["fastrl"]["ms"]
    wrong = rows["wrong"]
    assert wrong["status"] == "wrong" and "dlogits is off by" in wrong["reason"]
    assert wrong["errors"]["loss"]["error"] > wrong["errors"]["loss"]["bar"]
    for speed in ("ms", "first_ms", "rate", "peak_mib", "vs_eager"):
        assert wrong[speed] is None


def test_codegen_reports_json() -> None:
    pytest.importorskip("triton")
    done = bench("codegen", "--json", "--kernel", "scale", "--arch", "sm_90")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["kernel"] == "scale" and row["arch"] == "sm_90" and row["spill_bytes"] == 0 and row["error"] is None


@pytest.mark.slow
def test_cost_sets_what_it_needs() -> None:
    """`bench` takes TRITON_INTERPRET out of the environment: the command sets it before it imports Triton."""
    pytest.importorskip("triton")
    done = bench("cost", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(done.stdout)}
    assert rows["log-probs and entropies"]["read_issued"] > 0


def test_cost_refuses_real_kernels() -> None:
    pytest.importorskip("triton")
    done = bench("cost", TRITON_INTERPRET="0")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    done = bench("--quick", "--case", "nothing-is-called-this", "--out", str(tmp_path))
    assert done.returncode == 2 and "--case" in done.stderr
