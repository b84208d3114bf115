"""Every kernel compiles for every architecture without a GPU: no spills, 16-byte accesses in the loop over the
vocabulary; and rows are addressed with 64 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

# In a process of its own: under TRITON_INTERPRET=1, as here, the decorator makes interpreted functions.
SCRIPT = """
import json
from fastrl_kernels import codegen
print(json.dumps([codegen.report(build, {arch!r}) for build in codegen.builds()]))
"""
TTIR = """
from fastrl_kernels import codegen
for build in codegen.builds():
    if build.vocabulary:
        print(codegen.compile_build(build, "sm_90").asm["ttir"])
"""


def real_kernels(script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["sm_80", "sm_90", "sm_100", "gfx942"])
def reports(request):
    return json.loads(real_kernels(SCRIPT.format(arch=request.param)))


# Scores are one number per row, statistics three per tile, and a list is written one kept column at a time.
_STORE_NO_ROW = ("logprob_fwd", "tile_statistics", "sparse-emit")


@pytest.mark.slow
def test_every_build_compiles_clean(reports):
    """No error, no spill, and 16-byte accesses in the loops over the vocabulary."""
    assert len({row["kernel"] for row in reports}) >= 80
    for row in reports:
        assert row["error"] is None, row
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        _moves_in_16_bytes(row)


def _moves_in_16_bytes(row):
    if "unaligned" in row["kernel"]:  # element by element, as the hardware demands
        assert row["load_bytes"] == 2, row
    elif row["vocabulary"]:
        assert row["load_bytes"] == 16, row
        assert row["store_bytes"] == 16 or row["kernel"].startswith(_STORE_NO_ROW), row


@pytest.mark.slow
def test_row_offsets_are_64_bit():
    """Liger#803, fla#1082: a 32-bit product of row and stride wraps silently. Every multiplication by a 64-bit stride is
    a 64-bit one, and no 32-bit value is stretched after the product."""
    text = real_kernels(TTIR)
    products = [line for line in text.splitlines() if "arith.muli" in line and "stride" in line]
    assert products and all("i64" in line.rsplit(":", 1)[1] for line in products)
