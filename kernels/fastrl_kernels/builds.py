"""Every kernel, each of its options at least once in a specialisation that a spec reaches: what `codegen.py` compiles.

The options combine to more specialisations than can be compiled on every change."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from . import fused, logprob, ranking, scale, scan, sparse, sparse_sums, ticket
from .build import BOUNDS, Build, by_warps, fixed, objective_constexprs
from .objective_fns import OBJECTIVES
from .token_builds import group_builds, policy_builds
from .tune import TokenConfig, row_config, tile_config

VOCABULARY = 151936
OTHER_VOCABULARIES = (32000, 262144)
"""Each chooses another number of threads than `VOCABULARY` on some architecture."""
_BY_VOCABULARY = (
    "logprob_fwd-bf16", "logprob_fwd-unaligned", "fused-grpo-bf16", "fused-grpo-fp32", "fused-k3-full",
    "fused-unaligned", "fused-ticket-full",
)  # fmt: skip


def builds() -> Iterator[Build]:
    """Every kernel in the specialisations that the presets and options reach, for one vocabulary; the largest of those
    that sum a row for others as well."""
    yield from builds_of(VOCABULARY)
    for vocab_size in OTHER_VOCABULARIES:
        for build in builds_of(vocab_size):
            if build.name in _BY_VOCABULARY:
                yield dataclasses.replace(build, name=f"{build.name}-V{vocab_size}")


def builds_of(vocab_size: int) -> Iterator[Build]:
    """Every kernel for one vocabulary."""
    plain = ("rows_ptr", "temperature_ptr", "softcap", "mask_ptr")
    forward, backward = logprob._logprob_fwd_kernel, logprob._logprob_bwd_kernel
    for dtype in ("bf16", "fp16", "fp32"):
        yield _row_build(f"logprob_fwd-{dtype}", forward, vocab_size, {}, plain, dtype)
        yield _row_build(f"logprob_bwd-{dtype}", backward, vocab_size, {}, (*plain, "dentropy_ptr"), dtype)
    odd = vocab_size - 1
    yield _row_build("logprob_fwd-unaligned", forward, odd, {}, plain, aligned=False)
    yield _row_build("logprob_bwd-unaligned", backward, odd, {}, plain, aligned=False)
    yield _row_build("logprob_fwd-full", forward, vocab_size)
    yield _row_build("logprob_bwd-full", backward, vocab_size)
    for name, absent in (("lean", plain), ("full", ())):
        yield _row_build(f"tile_statistics-{name}", logprob._tile_statistics_kernel, vocab_size, {}, absent)
        yield _row_build(f"parts_to_scores-{name}", logprob._parts_to_scores_kernel, vocab_size, {}, absent)
    yield from _fused_builds(vocab_size, plain)
    yield from _wide_logits_builds(vocab_size, plain)
    yield from policy_builds()
    yield from group_builds()
    yield from _sparse_builds(vocab_size)
    yield Build("scale", scale._scale_kernel, {"BLOCK": scale._BLOCK}, lambda _: TokenConfig(scale._BLOCK, 8), False)
    for name, carry, absent in (
        ("full", True, ()),
        ("plain", False, ("mask_ptr", "bootstrap_ptr", "lam_ptr", "lam_returns_ptr", "lam_returns")),
        ("returns", True, ("values_ptr", "lam_ptr", "lam_returns_ptr", "lam_returns")),
    ):
        constexprs = {"CARRY_MASKED": carry, "BLOCK": scan._BLOCK}
        config = functools.partial(fixed, scan._WARPS)
        yield Build(f"scan-{name}", scan._lambda_returns_kernel, constexprs, config, False, absent)
    for name, absent in (("full", ()), ("lean", ("mask_ptr", "dscores_ptr"))):
        constexprs = {"BLOCK_K": ranking._BLOCK_K, "BLOCK_P": ranking._BLOCK_P}
        config = functools.partial(fixed, 4)
        yield Build(f"ranking-{name}", ranking._ranked_reward_kernel, constexprs, config, False, absent)


def _wide_logits_builds(vocab_size: int, plain: tuple[str, ...]) -> Iterator[Build]:
    """fp32 logits of half-precision operands, whose gradient is rounded to theirs."""
    yield _row_build("tile_statistics-fp32", logprob._tile_statistics_kernel, vocab_size, {}, plain, "fp32")
    absent = (*plain, "dentropy_ptr")
    backward = _row_build("logprob_bwd-wide", logprob._logprob_bwd_kernel, vocab_size, {}, absent, "fp32")
    yield dataclasses.replace(backward, dlogits="bf16")


_SPARSE_CAPACITY = 256
_HIDDEN = 4096


def _sparse_builds(vocab_size: int) -> Iterator[Build]:
    """Emission of kept columns, and the two sums over them."""
    lists = {"CAPACITY": _SPARSE_CAPACITY, "BLOCK_C": _SPARSE_CAPACITY}
    emission = functools.partial(by_warps, sparse.emission_config, vocab_size)
    constexprs = {**lists, "BLOCK_V": sparse.emission_config(vocab_size).block_v}
    lean = ("temperature_ptr", "softcap", "dentropy_ptr")
    for name, absent, dtype, aligned in (
        ("bf16", lean, "bf16", True),
        ("fp32", lean, "fp32", True),
        ("full", (), "bf16", True),
        ("unaligned", lean, "bf16", False),
    ):
        yield Build(
            f"sparse-emit-{name}", sparse._sparsify_kernel, constexprs, emission, True, absent, dtype, aligned
        )  # fmt: skip
    rows = functools.partial(by_warps, sparse_sums.gather_config, _HIDDEN)
    columns = functools.partial(by_warps, sparse_sums.column_config, _HIDDEN)
    row_sums, column_sums = sparse_sums.gather_config(_HIDDEN), sparse_sums.column_config(_HIDDEN)
    for dtype in ("bf16", "fp32"):
        names = ("weight_ptr", "hidden_ptr", "dhidden_ptr")
        blocks = {"BLOCK_E": row_sums.block_e, "BLOCK_H": row_sums.block_h}
        yield Build(
            f"sparse-gather-{dtype}", sparse_sums._gather_columns_kernel, {**lists, **blocks}, rows, False, (), dtype,
            logits_names=names,
        )  # fmt: skip
        blocks = {"BLOCK_E": column_sums.block_e, "BLOCK_H": column_sums.block_h}
        constexprs = {"CAPACITY": _SPARSE_CAPACITY, "COLUMNS": sparse_sums._COLUMNS, **blocks}
        for part, absent in (("both", ()), ("weight", ("dbias_ptr",)), ("bias", ("dweight_ptr",))):
            yield Build(
                f"sparse-columns-{part}-{dtype}", sparse_sums._sum_by_column_kernel, constexprs, columns, False, absent,
                dtype, logits_names=names,
            )  # fmt: skip


def _row_build(
    name: str,
    kernel: Any,
    vocab_size: int,
    constexprs: dict[str, Any] | None = None,
    absent: tuple[str, ...] = (),
    dtype: str = "bf16",
    aligned: bool = True,
) -> Build:
    softcap = "softcap" not in absent
    if kernel is logprob._logprob_bwd_kernel:
        config = functools.partial(tile_config, vocab_size, softcap=softcap)
    else:
        config = functools.partial(row_config, vocab_size, _BYTES[dtype], softcap=softcap)
    reads_rows = "logits_ptr" in kernel.arg_names
    by_tile = kernel in (logprob._logprob_bwd_kernel, logprob._tile_statistics_kernel, ticket._fused_ticket_kernel)
    return Build(name, kernel, dict(constexprs or {}), config, reads_rows, absent, dtype, aligned, by_tile)


_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _fused_builds(vocab_size: int, plain: tuple[str, ...]) -> Iterator[Build]:
    def build(name: str, constexprs: dict[str, Any], absent: tuple[str, ...], dtype: str = "bf16") -> Build:
        return _row_build(name, fused._fused_kernel, vocab_size, constexprs, absent, dtype)

    uncorrected = ("rollout_ptr", "policy_weights_ptr", *BOUNDS)
    names, own = objective_constexprs("ppo_clip")
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
        "entropy_weights_ptr",
        "delta",
        "dual_clip",
        *uncorrected,
    )
    for dtype in ("bf16", "fp32"):
        yield build(f"fused-grpo-{dtype}", names, (*own, *lean), dtype)
    absent = (*own, *lean)
    yield _row_build("fused-unaligned", fused._fused_kernel, vocab_size - 1, names, absent, aligned=False)
    for name, kernel in (("ticket", ticket._fused_ticket_kernel), ("parts", fused._parts_to_cotangents_kernel)):
        yield _row_build(f"fused-{name}-grpo-bf16", kernel, vocab_size, names, absent)
        yield _row_build(f"fused-{name}-full", kernel, vocab_size, names, uncorrected)
    yield _row_build("fused-ticket-grpo-fp32", ticket._fused_ticket_kernel, vocab_size, names, absent, "fp32")
    yield build("fused-unbounded", names, (*own, *lean, "low", "high", "bound", "old_ptr"))
    for objective in OBJECTIVES:
        constexprs, own = objective_constexprs(objective)
        if objective == "ppo_clip" or not OBJECTIVES[objective].one_pass:
            continue
        yield build(f"fused-{objective}", constexprs, (*own, *lean))
    corrected = tuple(name for name in lean if name not in uncorrected)
    for mode, reject in (("truncate", "off"), ("mask", "k3"), ("truncate", "binary_kl")):
        constexprs = {**names, "CORRECTION": "token", "MODE": mode, "REJECT": reject}
        absent = (*objective_constexprs("ppo_clip")[1], *corrected, "policy_weights_ptr")
        yield build(f"fused-rollout-{mode}-{reject}", constexprs, absent)
    yield build("fused-weights", names, (*objective_constexprs("ppo_clip")[1], *corrected, "rollout_ptr", *BOUNDS))
