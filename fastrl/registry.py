"""What an objective is: the registry that `objectives.py` fills, and what the rest of the library asks of an entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

TOKEN, SEQUENCE, SEQUENCE_TOKEN, SEQUENCE_SUM = "token", "sequence", "sequence_token", "sequence_sum"
EVERY_LEVEL = (TOKEN, SEQUENCE, SEQUENCE_TOKEN, SEQUENCE_SUM)


class Terms(NamedTuple):
    """What an objective sees of n tokens, all (n,)."""

    logps: Tensor  # log π, differentiable
    log_ratio: Tensor  # log of the ratio at the spec's level, held to ±log_ratio_clamp, differentiable
    advantages: Tensor
    old_logps: Tensor  # the policy that the ratio is against; no gradient
    selected: Tensor | None  # 1 where `selection.py` picked the token, for an objective that reads it
    sequence_log_weight: Tensor | None  # Σ over the sequence, of an objective that weighs whole sequences itself


class Flags(NamedTuple):
    """Which tokens an objective clipped, (n,) bool each: at the lower and at the upper bound, and by the dual clip."""

    low: Tensor
    high: Tensor
    dual: Tensor | None = None


class Definition(NamedTuple):
    """An objective and what `LossSpec` must know of it."""

    loss: Callable[[Terms, Any], Tensor]
    levels: tuple[str, ...]
    """The ratio levels that it is defined at, the default first."""
    reads: tuple[str, ...]
    """Which of epsilon_low, epsilon_high, delta and dual_clip it reads; the others must stay at their defaults."""
    numbers: tuple[str, ...]
    """Its own numbers, those that the kernel takes first (at most four) and in its order."""
    centre: float
    """Its bounds are centre − epsilon_low and centre + epsilon_high."""
    flags: Callable[[Terms, Any], Flags] | None
    """Which tokens were clipped; None = it does not clip."""
    prepare: Callable[[Tensor, Tensor, Any], Tensor] | None
    """Changes a token's own log-ratio, given its advantage, before the sequence averages them."""
    weighs_sequences: bool
    """Whether it reads `Terms.sequence_log_weight`, rollout weights included; they then do not multiply its loss."""
    selects: bool
    """Whether `selection.py` picks tokens for it within the batch; unless `reads_selected`, the others lose their
    policy term."""
    reads_selected: bool
    """Whether it makes its own use of the pick."""
    vanishes: bool
    """Whether a zero advantage means a zero gradient."""


OBJECTIVES: dict[str, Definition] = {}


def define(
    name: str,
    *,
    levels: tuple[str, ...] = EVERY_LEVEL,
    reads: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
    centre: float = 1.0,
    flags: Callable[[Terms, Any], Flags] | None = None,
    prepare: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
    weighs_sequences: bool = False,
    selects: bool = False,
    reads_selected: bool = False,
    vanishes: bool = True,
) -> Callable[[Any], Any]:
    """Enter a function `(Terms, LossSpec) -> loss` as the objective called `name`."""

    def enter(loss: Any) -> Any:
        OBJECTIVES[name] = Definition(
            loss, levels, reads, numbers, centre, flags, prepare, weighs_sequences, selects, reads_selected, vanishes
        )
        return loss

    return enter


def bounds(spec: Any) -> tuple[float | None, float | None]:
    """(lower, upper) bound of the spec's objective; None = no bound on that side."""
    centre = OBJECTIVES[spec.objective].centre
    low = None if spec.epsilon_low is None else centre - spec.epsilon_low
    return low, None if spec.epsilon_high is None else centre + spec.epsilon_high


def clip(values: Tensor, low: float | None, high: float | None) -> Tensor:
    """Values held to [low, high], gradient kept at the bounds themselves."""
    return values if low is None and high is None else values.clamp(low, high)
