"""Compile every kernel ahead of time, without a GPU, and report what the compiler made of it.

Used as a gate: a kernel must compile for every architecture, must not spill, and must move the vocabulary in 16-byte
accesses. Needs real kernels: not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .builds import Build, builds
from .tune import ROWS, STRIDES, RowConfig

__all__ = ["ARCHITECTURES", "Build", "builds", "compile_build", "report"]

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_STRIDES = ("stride_b", "stride_t", "out_stride_b", "out_stride_t", "stride_w", "stride_h")
_INT64 = ("ids_ptr", "rows_ptr", "cu_ptr", "order_ptr", "numel", *_STRIDES)
_INT32 = (
    "sequence_ptr", "ticket_ptr", "arrived_ptr", "columns_ptr", "number_ptr", "offsets_ptr", "T", "out_T", "V", "H",
    "N", "G", "first_sequence", "first", "R", "K",
)  # fmt: skip
_BYTES = ("mask_ptr", "varies_ptr")
_ALIGNED = ("V", "H", *_STRIDES)


def _argument_type(name: str, build: Build) -> str:
    if name == "dlogits_ptr" and build.dlogits:
        return f"*{build.dlogits}"
    if name in build.logits_names:
        return f"*{build.logits}"
    if name in _BYTES:
        return "*u8"
    pointer = "*" if name.endswith("_ptr") else ""
    if name in _INT64:
        return f"{pointer}i64"
    if name in _INT32:
        return f"{pointer}i32"
    return f"{pointer}fp32"


def compile_build(build: Build, arch: str) -> Any:
    """The compiled kernel of one build."""
    names, config = build.kernel.arg_names, build.config(arch)
    absent = {name: None for name in build.absent if name in names}
    constexprs = {**build.constexprs, **absent}
    if "ALIGNED" in names:
        constexprs["ALIGNED"] = build.aligned
    if isinstance(config, RowConfig):
        constexprs |= {name: x for name, x in (("BLOCK_V", config.block_v), ("TILES", config.tiles)) if name in names}
    signature = {name: "constexpr" if name in constexprs else _argument_type(name, build) for name in names}
    untold = (*ROWS, *STRIDES) if "ALIGNED" in names else ()  # as the launch does not specialise on them
    unaligned = untold if build.aligned else (*build.logits_names, *_ALIGNED)
    aligned = [
        i
        for i, name in enumerate(names)
        if name not in (*constexprs, *unaligned) and (name.endswith("_ptr") or name in _ALIGNED)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(build.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=ARCHITECTURES[arch], options={"num_warps": config.num_warps})


def report(build: Build, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory and the widths of global accesses of one build for one architecture.

    Widths are in bytes: the narrowest load and store inside the loops over the vocabulary, 0 where there is none; see
    `_width` for kernels that take one tile each. `error` is the compiler's message, or None.
    """
    row: dict[str, Any] = {"kernel": build.name, "arch": arch, "vocabulary": build.vocabulary, "error": None}
    try:
        compiled = compile_build(build, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        return row | {"error": f"{type(error).__name__}: {error}"}
    row["shared_bytes"] = compiled.metadata.shared
    if ARCHITECTURES[arch].backend == "cuda":
        registers, spills = _resources(compiled.asm["cubin"])
        loads, stores = _ptx_widths(compiled.asm["ptx"], build)
    else:
        registers, spills = _amd_resources(compiled.asm["amdgcn"])
        loads, stores = _gcn_widths(compiled.asm["amdgcn"], build)
    return row | {"registers": registers, "spill_bytes": spills, "load_bytes": loads, "store_bytes": stores}


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_resources(text: str) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"{name}:?\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), 4 * number("vgpr_spill_count") + 4 * number("sgpr_spill_count")


def _loop_text(text: str, label: str, branch: str) -> str:
    """The instructions of innermost loops: from a label to a later branch back to it, with no such pair between."""
    lines = text.splitlines()
    places = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(label, line))}
    loops = [
        (places[m.group(1)], i)
        for i, line in enumerate(lines)
        if (m := re.search(branch, line)) and places.get(m.group(1), i) < i
    ]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return "\n".join(line for start, stop in inner for line in lines[start : stop + 1])


def _ptx_widths(ptx: str, build: Build) -> tuple[int, int]:
    if not build.vocabulary:
        return 0, 0
    loop = _loop_text(ptx, r"^(\$L\S+):", r"bra(?:\.uni)?\s+(\$L\w+)")

    def widths(kind: str, text: str) -> list[int]:
        pattern = rf"{kind}\.(?:\w+\.)?global(?:\.[A-Za-z0-9_:]+)*?(?:\.v(\d))?\.b(\d+)"
        return [int(v or 1) * int(bits) // 8 for v, bits in re.findall(pattern, text)]

    loads, stores = ((widths(kind, loop), widths(kind, ptx)) for kind in ("ld", "st"))
    return _width(build, *loads), _width(build, *stores)


def _width(build: Build, in_loops: list[int], everywhere: list[int]) -> int:
    """The narrowest access in the loops. A kernel that takes its tile without a loop reads narrow numbers per row
    beside it: there 16 if any access is that wide, which no such number is, else the width by which most bytes move."""
    if not build.by_tile:
        return min(in_loops, default=0)
    return max(everywhere, key=lambda width: (width == 16, width * everywhere.count(width)), default=0)


def _gcn_widths(text: str, build: Build) -> tuple[int, int]:
    if not build.vocabulary:
        return 0, 0
    loop = _loop_text(text, r"^(\.L\w+):.*Loop", r"s_c?branch\w*\s+(\.L\w+)")
    width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}

    def widths(kind: str, text: str) -> list[int]:
        found = re.findall(rf"(?:global|buffer)_{kind}_(\w+?)(?:_d16\w*)?\s", text)
        return [width.get(name, 1) for name in found]

    loads, stores = ((widths(kind, loop), widths(kind, text)) for kind in ("load", "store"))
    return _width(build, *loads), _width(build, *stores)
