"""Every kernel compiles for every architecture without a GPU: no spills, 16-byte accesses in the loop over the
vocabulary; and rows are addressed with 64 bits."""

from __future__ import annotations

import json
import os
import re
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


ORDER = """
import json, re
from fastrl_kernels import codegen
orders = []
for build in codegen.builds():
    if build.name.startswith(("logprob_fwd", "tile_statistics", "parts_to_scores", "fused")):
        text = codegen.compile_build(build, {arch!r}).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\\w+) = (.*>)", text, re.MULTILINE))
        found = re.findall(r"\\}}\\) : \\(tensor<(\\d+)xf32, (#\\w+)>", text)
        kind = (build.logits, build.aligned, "softcap" in build.absent, build.config({arch!r}).tiles)
        orders += [(build.name, kind, int(length), layouts[name]) for length, name in set(found)]
print(json.dumps(orders))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_all_kernels_sum_a_row_in_one_order(arch):
    """Scoring and training must meet to the bit, however many programs share a row: for each dtype, alignment and size
    every kernel spreads a tile, and the statistics of a row's tiles, over its threads in the same way."""
    orders = json.loads(real_kernels(ORDER.format(arch=arch)))
    layouts = {}
    for name, kind, length, layout in orders:
        layouts.setdefault((*kind, length), {}).setdefault(layout, []).append(name)
    for kind, by_layout in layouts.items():
        assert len(by_layout) == 1, (kind, by_layout)
    assert max(len(names) for by_layout in layouts.values() for names in by_layout.values()) >= 10
    assert {kind[:2] for kind in layouts} == {("bf16", True), ("bf16", False), ("fp16", True), ("fp32", True)}


PTX = """
import json
from fastrl_kernels import codegen
names = ("logprob_fwd-bf16", "logprob_fwd-fp32", "logprob_fwd-full", "parts_to_scores-lean", "fused-grpo-bf16",
         "fused-k3-full", "fused-ticket-full", "fused-parts-full", "fused-grpo-bf16-V262144")
print(json.dumps({build.name: codegen.compile_build(build, "sm_90").asm["ptx"]
                  for build in codegen.builds() if build.name in names}))
"""


@pytest.mark.slow
def test_all_lanes_have_the_same_sums():
    """Lanes exchange partial sums and add each other's: the same in both only if they add what they exchange. A product
    contracted into that addition is rounded in the partner's lane and not in its own."""
    for name, text in json.loads(real_kernels(PTX)).items():
        exchanged = set(re.findall(r"shfl\.sync\S*\s+(%r\d+)", text))
        assert exchanged, name
        for line in text.splitlines():
            found = re.match(r"\s*mov\.b32\s+(%\w+), (%\w+);", line)
            if found and found.group(2) in exchanged:
                exchanged.add(found.group(1))
        fused = re.findall(r"fma\.\S+\s+(%\w+), (%\w+), (%\w+), (%\w+);", text)
        assert fused and not [line for line in fused if exchanged & set(line[1:])], name
