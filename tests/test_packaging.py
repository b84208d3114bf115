"""What is shipped: wheel contents, no shadowing of Hugging Face `kernels`, import without triton, import time."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, *flags: str) -> str:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="needs hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_contents(wheel):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastrl", "fastrl_kernels"}
    assert (
        "fastrl/py.typed" in names and "fastrl_kernels/softmax.py" in names and "fastrl/adapters/trl/plugin.py" in names
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "bench", "kernels/")) for name in names)
    metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Name: fastrl-kernels" in metadata and "Requires-Dist: torch>=2.8" in metadata


def test_no_top_level_kernels_package():
    """It would shadow, and on uninstall delete, Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernel_package_stands_alone():
    """Relative imports only, and never `fastrl`: it can be published by itself."""
    import ast

    for path in (ROOT / "kernels" / "fastrl_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] not in ("fastrl", "fastrl_kernels") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] not in ("fastrl", "fastrl_kernels"), path


def test_dependencies_point_downwards():
    """adapters -> functional, nn -> autograd -> levels -> reference ...; the spec imports nothing of ours."""
    import ast

    order = [
        "options", "rollout_correction", "registry", "objectives", "spec_checks", "spec", "presets", "_checks", "clamping", "kl", "whitening", "dtypes", "flat",
        "ratio", "correction", "selection", "reduction", "backend", "operators", "grouping", "advantages", "batch_advantages", "metrics",
        "token_inputs", "reference", "rollout_checks", "rollouts", "head_weights", "head_adapters", "head_model", "head", "plan", "rows", "chunking", "cpu_products", "torch_backend",
        "triton_backend", "torch_sparse", "triton_sparse", "projection", "compaction", "levels", "double_backward",
        "ops", "op_gradients", "calls", "autograd",
        "inputs", "functional", "token_metrics", "nn", "scan", "lambda_returns", "returns", "token_advantages", "reward_shaping", "controllers", "critic",
        "reward_model", "_info", "__main__",
    ]  # fmt: skip
    package = ROOT / "fastrl"
    assert {path.stem for path in package.glob("*.py")} == {*order, "__init__"}
    for name in order:
        for node in ast.parse((package / f"{name}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastrl":
                parts = node.module.split(".")
                used = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                for other in used:
                    assert order.index(other) < order.index(name), f"{name} imports {other}"


def test_imports_without_triton_transformers_or_trl():
    code = """
import sys
for name in ("triton", "transformers", "trl", "fastrl_kernels"):
    sys.modules[name] = None  # importing it raises
import importlib.util, torch, fastrl
from fastrl import backend
backend.has_triton = lambda: False
out = fastrl.policy_loss(-torch.ones(1, 2), fastrl.Rollouts(torch.zeros(1, 2).long(), advantages=torch.ones(1)))
assert out.loss == -1
try:
    fastrl.policy_loss(-torch.ones(1, 2), fastrl.Rollouts(torch.zeros(1, 2).long(), advantages=torch.ones(1)), backend="triton")
except ValueError as error:
    assert "triton not installed" in str(error)
else:
    raise SystemExit("no error")
"""
    python(code)


def test_import_does_nothing_else():
    """Neither triton nor dynamo is loaded, nothing is patched, and asserts are not needed (-O)."""
    code = "import torch, sys; before = set(sys.modules); import fastrl; print(*sorted(set(sys.modules) - before))"
    loaded = python(code, "-O").split()
    assert not any(name.startswith(("triton", "torch._dynamo", "transformers", "fastrl_kernels")) for name in loaded)


@pytest.mark.slow
def test_import_time():
    """Under 50 ms of CPU time beyond torch; the best of five processes, since a shared machine only ever adds."""
    code = "import torch, time; t = time.process_time(); import fastrl; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.05
