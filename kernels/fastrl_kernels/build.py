"""One specialisation of a kernel, and what `builds.py` and `token_builds.py` share in listing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .objective_fns import OBJECTIVES
from .tune import TokenConfig, warp_size


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


_NO_CORRECTION = {"CORRECTION": "off", "MODE": "truncate", "REJECT": "off"}
BOUNDS = ("lower", "upper", "reject_lower", "reject_upper")


def objective_constexprs(name: str, kl: str = "k3", gradient: str = "plain") -> tuple[dict[str, Any], tuple[str, ...]]:
    """Constexprs of an objective without a correction, and the numbers that are then absent."""
    constexprs = {"OBJECTIVE": name, "KL": kl, "KL_GRADIENT": gradient, **_NO_CORRECTION}
    absent = tuple(f"p{i}" for i in range(OBJECTIVES[name].numbers, 4))
    return constexprs, absent if name == "ppo_clip" else (*absent, "delta", "dual_clip")


def fixed(num_warps: int, _: str) -> TokenConfig:
    return TokenConfig(0, num_warps)


def by_warps(config: Callable[[int, int], Any], size: int, arch: str) -> Any:
    return config(size, warp_size(arch))
