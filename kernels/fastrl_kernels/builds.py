"""Every kernel, each of its options at least once in a specialisation that a spec reaches: what `codegen.py` compiles.

The options combine to more specialisations than can be compiled on every change."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import batch_groups, fused, groups, logprob, policy, ranking, scale, scan, sparse, ticket
from .objective_fns import OBJECTIVES
from .tune import TokenConfig, row_config, tile_config, token_config, warp_size


@dataclass(frozen=True)
class Build:
    """One specialisation: a kernel, its constexprs, which optional inputs are absent, the logits dtype, whether
    rows start at multiples of 16 bytes (those of an odd vocabulary without padding do not), and whether a program takes
    one tile, without a loop over the vocabulary."""

    name: str
    kernel: Any
    constexprs: dict[str, Any]
    config: Callable[[str], Any]  # of the architecture: something with `num_warps`; a RowConfig adds its constexprs
    vocabulary: bool
    absent: tuple[str, ...] = ()
    logits: str = "bf16"
    aligned: bool = True
    by_tile: bool = False
    dlogits: str | None = None  # where the gradient has another dtype than the logits
    logits_names: tuple[str, ...] = field(default=("logits_ptr", "dlogits_ptr", "x_ptr"))


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
    yield from _policy_builds()
    yield from _group_builds()
    yield from _sparse_builds(vocab_size)
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


def _wide_logits_builds(vocab_size: int, plain: tuple[str, ...]) -> Iterator[Build]:
    """fp32 logits of half-precision operands, whose gradient is rounded to theirs."""
    names, own = _objective("ppo_clip")
    for kernel, constexprs, absent in (
        (logprob._logprob_bwd_kernel, {}, (*plain, "dentropy_ptr")),
        (fused._fused_kernel, names, (*own, "rollout_ptr", "policy_weights_ptr", *_BOUNDS)),
    ):
        build = _row_build("", kernel, vocab_size, constexprs, absent, "fp32")
        name = "logprob_bwd-wide" if kernel is logprob._logprob_bwd_kernel else "fused-wide"
        yield dataclasses.replace(build, name=name, dlogits="bf16")


_SPARSE_CAPACITY = 256
_HIDDEN = 4096


def _sparse_builds(vocab_size: int) -> Iterator[Build]:
    """Emission of kept columns, and the two sums over them."""
    lists = {"CAPACITY": _SPARSE_CAPACITY, "BLOCK_C": _SPARSE_CAPACITY}
    emission = functools.partial(_by_warps, sparse.emission_config, vocab_size)
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
    rows = functools.partial(_by_warps, sparse.gather_config, _HIDDEN)
    columns = functools.partial(_by_warps, sparse.column_config, _HIDDEN)
    row_sums, column_sums = sparse.gather_config(_HIDDEN), sparse.column_config(_HIDDEN)
    for dtype in ("bf16", "fp32"):
        names = ("weight_ptr", "hidden_ptr", "dhidden_ptr")
        blocks = {"BLOCK_E": row_sums.block_e, "BLOCK_H": row_sums.block_h}
        yield Build(
            f"sparse-gather-{dtype}", sparse._gather_columns_kernel, {**lists, **blocks}, rows, False, (), dtype,
            logits_names=names,
        )  # fmt: skip
        blocks = {"BLOCK_E": column_sums.block_e, "BLOCK_H": column_sums.block_h}
        constexprs = {"CAPACITY": _SPARSE_CAPACITY, "COLUMNS": sparse._COLUMNS, **blocks}
        for part, absent in (("both", ()), ("weight", ("dbias_ptr",)), ("bias", ("dweight_ptr",))):
            yield Build(
                f"sparse-columns-{part}-{dtype}", sparse._sum_by_column_kernel, constexprs, columns, False, absent,
                dtype, logits_names=names,
            )  # fmt: skip


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


def _policy_build(name: str, changes: dict[str, Any], absent: tuple[str, ...] = (), given: bool = False) -> Build:
    """The token kernel with some constexprs changed; `given`: with advantages instead of rewards."""
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
    absent = (*own, *absent, "rewards_ptr" if given else "advantages_ptr")
    size = functools.partial(_token, constexprs["BY_SEQUENCE"])
    return Build(f"policy-{name}", policy._policy_fwd_kernel, constexprs, size, False, absent)


def _policy_builds() -> Iterator[Build]:
    padded = ("sequence_ptr", "cu_ptr")
    bare = ("policy_weights_ptr", "selected_ptr", "entropy_weights_ptr", "off_policy", *_BOUNDS)
    lean = (*bare, "ref_ptr", "kl_coef", "kl_clamp", "rollout_ptr", "dual_clip", "delta")
    sequence = {"LEVEL": "sequence", "BY_SEQUENCE": True, "PER_SEQUENCE_MEAN": True}
    # Every advantage scale once at each level, with either layout and with everything on or off.
    advantages = (("mean", "group"), ("mean", "none"), ("leave-one-out", "leave-one-out"), ("mean", "mean"))
    for n, (baseline, scaling) in enumerate(advantages):
        for level in ({}, sequence):
            packed, full = n % 2 == 1, n < 2
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
    on_policy = (
        *padded,
        *lean,
        "old_ptr",
        "mask_ptr",
        "denominator_ptr",
        "entropy_ptr",
        "entropy_coef",
        "dentropy_ptr",
    )
    for per_token, level in itertools.product((False, True), ({}, sequence)):
        parts = ("sequence" if level else "token", "on-policy", "per", "token" if per_token else "sequence")
        changes = {**level, "PER_TOKEN_ADVANTAGE": per_token}
        yield _policy_build("-".join(parts), changes, on_policy, given=True)
    yield _policy_build("measured", {}, (*padded, *lean, "dlogp_ptr", "dentropy_ptr"), given=True)
    for level in ("sequence_token", "sequence_sum"):
        yield _policy_build(level, {"LEVEL": level, "BY_SEQUENCE": True}, (*padded, *bare))
    yield from _corrected_policy_builds(padded)
    for gradient in ("importance_weighted", "straight_through"):
        yield _policy_build(gradient, {"KL_GRADIENT": gradient, **sequence}, (*padded, *bare))


def _corrected_policy_builds(padded: tuple[str, ...]) -> Iterator[Build]:
    selections = ("policy_weights_ptr", "selected_ptr", "entropy_weights_ptr")
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


def _token(by_sequence: bool, _: str) -> TokenConfig:
    return token_config(by_sequence)


def _fixed(num_warps: int, _: str) -> TokenConfig:
    return TokenConfig(0, num_warps)


def _by_warps(config: Callable[[int, int], Any], size: int, arch: str) -> Any:
    return config(size, warp_size(arch))
