"""The kernels without a loop over the vocabulary that have many options: token loss and group advantages."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from . import batch_groups, groups, policy
from .build import BOUNDS, Build, fixed, objective_constexprs
from .objective_fns import OBJECTIVES
from .tune import TokenConfig, token_config


def group_builds() -> Iterator[Build]:
    kernel, blocks, config = groups._group_advantage_kernel, groups.GROUP_BLOCKS, functools.partial(fixed, 4)
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


def _policy_build(name: str, changes: dict[str, Any], absent: tuple[str, ...] = (), given: bool = False) -> Build:
    """The token kernel with some constexprs changed; `given`: with advantages instead of rewards."""
    constexprs, own = objective_constexprs(changes.pop("OBJECTIVE", "ppo_clip"))
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


def policy_builds() -> Iterator[Build]:
    padded = ("sequence_ptr", "cu_ptr")
    bare = ("policy_weights_ptr", "selected_ptr", "entropy_weights_ptr", "off_policy", *BOUNDS)
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
    yield _policy_build("given-weights", {}, (*padded, "off_policy", *BOUNDS))


def _token(by_sequence: bool, _: str) -> TokenConfig:
    return token_config(by_sequence)
