"""Compile every kernel ahead of time, without a GPU, and report what the compiler made of it.

Used as a gate: a kernel must compile for every architecture, must not spill, and must move the vocabulary in 16-byte
accesses. Needs real kernels: not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import batch_groups, fused, groups, logprob, policy, ranking, scale, scan
from .objective_fns import OBJECTIVES
from .tune import RowConfig, TokenConfig, row_config, token_config

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_INT64 = ("ids_ptr", "rows_ptr", "cu_ptr", "stride_b", "stride_t", "out_stride_b", "out_stride_t")
_INT32 = ("sequence_ptr", "ticket_ptr", "T", "out_T", "V", "N", "G", "first_sequence", "numel", "R", "K")
_BYTES = ("mask_ptr", "varies_ptr")
_ALIGNED = ("V", "stride_b", "stride_t", "out_stride_b", "out_stride_t")


@dataclass(frozen=True)
class Build:
    """One specialisation: a kernel, its constexprs, which optional inputs are absent, and the logits dtype."""

    name: str
    kernel: Any
    constexprs: dict[str, Any]
    config: Callable[[int], RowConfig | TokenConfig]  # of the warp size
    vocabulary: bool
    absent: tuple[str, ...] = ()
    logits: str = "bf16"
    logits_names: tuple[str, ...] = field(default=("logits_ptr", "dlogits_ptr", "x_ptr"))


def builds(vocab_size: int = 151936) -> Iterator[Build]:
    """Every kernel in the specialisations that the presets and options reach."""
    plain = ("rows_ptr", "temperature_ptr", "softcap", "mask_ptr")
    for dtype in ("bf16", "fp16", "fp32"):
        yield _row_build(f"logprob_fwd-{dtype}", logprob._logprob_fwd_kernel, vocab_size, {}, plain, dtype)
        absent = (*plain, "dentropy_ptr")
        yield _row_build(f"logprob_bwd-{dtype}", logprob._logprob_bwd_kernel, vocab_size, {}, absent, dtype)
    yield _row_build("logprob_fwd-full", logprob._logprob_fwd_kernel, vocab_size)
    yield _row_build("logprob_bwd-full", logprob._logprob_bwd_kernel, vocab_size)
    yield from _fused_builds(vocab_size, plain)
    yield from _policy_builds()
    yield from _group_builds()
    yield Build("scale", scale._scale_kernel, {"BLOCK": scale._BLOCK}, lambda _: TokenConfig(scale._BLOCK, 8), False)
    for name, carry, absent in (
        ("full", True, ()),
        ("plain", False, ("mask_ptr", "bootstrap_ptr", "lam_ptr", "lam_returns_ptr", "lam_returns")),
        ("returns", True, ("values_ptr", "lam_ptr", "lam_returns_ptr", "lam_returns")),
    ):
        constexprs = {"CARRY_MASKED": carry, "BLOCK": scan._BLOCK}
        config = functools.partial(_fixed, scan._WARPS)
        yield Build(f"scan-{name}", scan._lambda_returns_kernel, constexprs, config, False, absent)
    for name, absent in (("full", ()), ("lean", ("mask_ptr", "dscores_ptr"))):
        constexprs = {"BLOCK_K": ranking._BLOCK_K, "BLOCK_P": ranking._BLOCK_P}
        config = functools.partial(_fixed, 4)
        yield Build(f"ranking-{name}", ranking._ranked_reward_kernel, constexprs, config, False, absent)


def _group_builds() -> Iterator[Build]:
    kernel, blocks, config = groups._group_advantage_kernel, groups.GROUP_BLOCKS, functools.partial(_fixed, 4)
    pairs = [("mean", scaling) for scaling in ("group", "batch", "none", "leave-one-out", "mean")]
    pairs += [("leave-one-out", "leave-one-out"), ("length-weighted", "none"), ("best-of-others", "group")]
    for given, (baseline, scaling) in itertools.product((True, False), pairs):
        name = "-".join(("group-advantage", "ids" if given else "size", baseline, scaling))
        absent = ("lengths_ptr",) if baseline != "length-weighted" else ()
        absent += () if given else ("ids_ptr",)
        yield Build(name, kernel, {"BASELINE": baseline, "SCALE": scaling, **blocks}, config, False, absent)
    for finish, given in itertools.product(("batch", "tokens", "signal", "none"), (True, False)):
        constexprs = {"SCALE": "none" if finish == "signal" else "group", "FINISH": finish, **blocks}
        constexprs["BLOCK"] = batch_groups._BLOCK
        absent = ("lengths_ptr",) if finish != "tokens" else ()
        absent += () if given else ("ids_ptr", "weights_ptr")
        name = f"batch-advantage-{'ids' if given else 'size'}-{finish}"
        yield Build(name, batch_groups._batch_advantage_kernel, constexprs, config, False, absent)


def _row_build(
    name: str,
    kernel: Any,
    vocab_size: int,
    constexprs: dict[str, Any] | None = None,
    absent: tuple[str, ...] = (),
    dtype: str = "bf16",
) -> Build:
    softcap = "softcap" not in absent
    block = {"BLOCK_V": row_config(vocab_size, softcap, 32).block_v}
    config = functools.partial(row_config, vocab_size, softcap)
    return Build(name, kernel, {**block, **(constexprs or {})}, config, True, absent, dtype)


_NO_CORRECTION = {"CORRECTION": "off", "MODE": "truncate", "REJECT": "off"}
_BOUNDS = ("lower", "upper", "reject_lower", "reject_upper")


def _objective(name: str, kl: str = "k3", gradient: str = "plain") -> tuple[dict[str, Any], tuple[str, ...]]:
    """Constexprs of an objective without a correction, and the numbers that are then absent."""
    constexprs = {"OBJECTIVE": name, "KL": kl, "KL_GRADIENT": gradient, **_NO_CORRECTION}
    absent = tuple(f"p{i}" for i in range(OBJECTIVES[name].numbers, 4))
    return constexprs, absent if name == "ppo_clip" else (*absent, "delta", "dual_clip")


def _fused_builds(vocab_size: int, plain: tuple[str, ...]) -> Iterator[Build]:
    def build(name: str, constexprs: dict[str, Any], absent: tuple[str, ...], dtype: str = "bf16") -> Build:
        return _row_build(name, fused._fused_kernel, vocab_size, constexprs, absent, dtype)

    uncorrected = ("rollout_ptr", "policy_weights_ptr", *_BOUNDS)
    names, own = _objective("ppo_clip")
    for kl in ("k1", "abs", "k2", "k3"):
        yield build(f"fused-{kl}-full", {**names, "KL": kl}, (*own, *uncorrected))
    for gradient in ("importance_weighted", "straight_through"):
        yield build(f"fused-{gradient}", {**names, "KL_GRADIENT": gradient}, (*own, *uncorrected))
    lean = (
        *plain,
        "ref_ptr",
        "kl_coef",
        "kl_clamp",
        "entropy_coef",
        "dentropy_ptr",
        "delta",
        "dual_clip",
        *uncorrected,
    )
    for dtype in ("bf16", "fp32"):
        yield build(f"fused-grpo-{dtype}", names, (*own, *lean), dtype)
    yield build("fused-unbounded", names, (*own, *lean, "low", "high", "bound", "old_ptr"))
    for objective in OBJECTIVES:
        constexprs, own = _objective(objective)
        if objective == "ppo_clip" or not OBJECTIVES[objective].one_pass:
            continue
        yield build(f"fused-{objective}", constexprs, (*own, *lean))
    corrected = tuple(name for name in lean if name not in uncorrected)
    for mode, reject in (("truncate", "off"), ("mask", "k3"), ("truncate", "binary_kl")):
        constexprs = {**names, "CORRECTION": "token", "MODE": mode, "REJECT": reject}
        absent = (*_objective("ppo_clip")[1], *corrected, "policy_weights_ptr")
        yield build(f"fused-rollout-{mode}-{reject}", constexprs, absent)
    yield build("fused-weights", names, (*_objective("ppo_clip")[1], *corrected, "rollout_ptr", *_BOUNDS))


def _policy_build(name: str, changes: dict[str, Any], absent: tuple[str, ...] = ()) -> Build:
    constexprs, own = _objective(changes.pop("OBJECTIVE", "ppo_clip"))
    constexprs |= {
        "LEVEL": "token",
        "BY_SEQUENCE": False,
        "FOLDS": False,
        "READS_SELECTED": False,
        "REJECT_LEVEL": "token",
        "PER_SEQUENCE_MEAN": False,
        "PER_TOKEN_ADVANTAGE": False,
        "BASELINE": "mean",
        "SCALE": "group",
        "COLUMNS": policy._COLUMNS,
    } | changes
    config = token_config(constexprs["BY_SEQUENCE"])
    constexprs |= {"BLOCK_N": config.block_n, "BLOCK_P": config.block_p}
    absent = (*own, *absent, "advantages_ptr")
    size = functools.partial(_token, constexprs["BY_SEQUENCE"])
    return Build(f"policy-{name}", policy._policy_fwd_kernel, constexprs, size, False, absent)


def _policy_builds() -> Iterator[Build]:
    padded = ("sequence_ptr", "cu_ptr")
    bare = ("policy_weights_ptr", "selected_ptr", "off_policy", *_BOUNDS)
    lean = (*bare, "ref_ptr", "kl_coef", "kl_clamp", "rollout_ptr", "dual_clip", "delta")
    sequence = {"LEVEL": "sequence", "BY_SEQUENCE": True, "PER_SEQUENCE_MEAN": True}
    for packed, full in itertools.product((False, True), (False, True)):
        for baseline, scaling in (
            ("mean", "group"),
            ("mean", "none"),
            ("leave-one-out", "leave-one-out"),
            ("mean", "mean"),
        ):
            for level in ({}, sequence):
                parts = ("sequence" if level else "token", "packed" if packed else "padded", "full" if full else "lean")
                changes = {**level, "BASELINE": baseline, "SCALE": scaling}
                absent = (*(() if packed else padded), *(bare if full else lean))
                yield _policy_build("-".join((*parts, baseline, scaling)), changes, absent)
    for objective, device in OBJECTIVES.items():
        kept = tuple(name for name in bare if name != "selected_ptr" or not device.reads_selected)
        structure = {
            "OBJECTIVE": objective,
            "LEVEL": "sequence" if device.sequence_ratio else "token",
            "BY_SEQUENCE": device.sequence_ratio or device.folds,
            "FOLDS": device.folds,
            "READS_SELECTED": device.reads_selected,
        }
        yield _policy_build(objective, structure, (*padded, *kept))
    for level in ("sequence_token", "sequence_sum"):
        yield _policy_build(level, {"LEVEL": level, "BY_SEQUENCE": True}, (*padded, *bare))
    yield from _corrected_policy_builds(padded)
    for gradient in ("importance_weighted", "straight_through"):
        yield _policy_build(gradient, {"KL_GRADIENT": gradient, **sequence}, (*padded, *bare))


def _corrected_policy_builds(padded: tuple[str, ...]) -> Iterator[Build]:
    selections = ("policy_weights_ptr", "selected_ptr")
    for level, reject, at in (
        ("token", "k3", "token"),
        ("token", "binary_kl", "sequence-mean"),
        ("sequence", "k1", "sequence-sum"),
        ("geometric", "tv", "sequence-max"),
        ("none", "k2", "token"),
    ):
        by_sequence = level in ("sequence", "geometric") or at != "token"
        changes = {
            "CORRECTION": level,
            "MODE": "mask",
            "REJECT": reject,
            "REJECT_LEVEL": at,
            "BY_SEQUENCE": by_sequence,
        }
        absent = (*padded, *selections, *(() if by_sequence else ("off_policy",)))
        yield _policy_build(f"rollout-{level}-{reject}-{at}", changes, absent)
    yield _policy_build("given-weights", {}, (*padded, "off_policy", *_BOUNDS))


def _token(by_sequence: bool, _: int) -> TokenConfig:
    return token_config(by_sequence)


def _fixed(num_warps: int, _: int) -> TokenConfig:
    return TokenConfig(0, num_warps)


def _argument_type(name: str, build: Build) -> str:
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


def compile_build(build: Build, target: GPUTarget) -> Any:
    """The compiled kernel of one build."""
    names = build.kernel.arg_names
    absent = {name: None for name in build.absent if name in names}
    constexprs = {**build.constexprs, **absent}
    signature = {name: "constexpr" if name in constexprs else _argument_type(name, build) for name in names}
    aligned = [
        i for i, name in enumerate(names) if name not in constexprs and (name.endswith("_ptr") or name in _ALIGNED)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(build.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options={"num_warps": build.config(target.warp_size).num_warps})


def report(build: Build, arch: str) -> dict[str, Any]:
    """Registers, spills, shared memory and the widths of global accesses of one build for one architecture.

    Widths are in bytes: the narrowest load and store of the vocabulary's dtype inside the loops over it, 0 where there
    is none. `error` is the compiler's message, or None.
    """
    row: dict[str, Any] = {"kernel": build.name, "arch": arch, "vocabulary": build.vocabulary, "error": None}
    try:
        compiled = compile_build(build, ARCHITECTURES[arch])
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

    def narrowest(kind: str) -> int:
        widths = [
            int(v or 1) * int(bits) // 8
            for v, bits in re.findall(rf"{kind}\.global(?:\.[A-Za-z0-9_:]+)*?(?:\.v(\d))?\.b(\d+)", loop)
        ]
        return min(widths, default=0)

    return narrowest("ld"), narrowest("st")


def _gcn_widths(text: str, build: Build) -> tuple[int, int]:
    if not build.vocabulary:
        return 0, 0
    loop = _loop_text(text, r"^(\.L\w+):.*Loop", r"s_c?branch\w*\s+(\.L\w+)")
    width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}

    def narrowest(kind: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{kind}_(\w+?)(?:_d16\w*)?\s", loop)
        return min((width.get(name, 1) for name in found), default=0)

    return narrowest("load"), narrowest("store")
