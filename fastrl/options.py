"""The named options of a `LossSpec`, and the checks of its numbers. No torch."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any


class Option(str, Enum):
    """A string enum whose members compare equal to, and print as, their value (`StrEnum` needs Python 3.11)."""

    def __str__(self) -> str:
        return str(self.value)


class RatioLevel(Option):
    TOKEN = "token"
    """r = exp(log π − log π_old) of the token itself."""
    SEQUENCE = "sequence"
    """s = exp(mean of log r over the sequence), shared by its tokens, gradient through the mean (GSPO)."""
    SEQUENCE_TOKEN = "sequence_token"
    """The value of `sequence`, the gradient of the token's own log-prob: sg(s)·π/sg(π) (GSPO-token)."""
    SEQUENCE_SUM = "sequence_sum"
    """s = exp(sum of log r), the probability ratio of the whole answer (RLOO)."""


class KLEstimator(Option):
    K1 = "k1"
    """x = log π − log π_ref: unbiased, of either sign."""
    ABS = "abs"
    """|x|."""
    K2 = "k2"
    """x²/2: its gradient, x, is that of the KL on policy."""
    K3 = "k3"
    """e⁻ˣ − 1 + x: unbiased and never negative."""


class KLGradient(Option):
    PLAIN = "plain"
    """Differentiate the estimator as it stands."""
    IMPORTANCE_WEIGHTED = "importance_weighted"
    """Multiply it by the ratio, at the spec's level and not detached (TRL's bias correction)."""
    STRAIGHT_THROUGH = "straight_through"
    """The estimator's value, the gradient of k2 (verl's "k3+")."""


class Aggregation(Option):
    TOKEN_MEAN = "token-mean"
    """Σ ℓ / D, D the tokens that count."""
    SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
    """Σᵢ (meanₜ ℓ) / D, D the sequences with such a token."""
    SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"
    """Σᵢ (Σₜ ℓ) / D, D as above."""
    SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"
    """Σᵢ (Σₜ ℓ) / (D · max_length), D as above."""
    TOKEN_SUM = "token-sum"
    """Σ ℓ."""


class AdvantageBaseline(Option):
    MEAN = "mean"
    """The mean of the group."""
    LEAVE_ONE_OUT = "leave-one-out"
    """The mean of the others (RLOO)."""
    NONE = "none"
    """Rewards as they are."""
    LENGTH_WEIGHTED = "length-weighted"
    """Σ len·r / Σ len of the group (OPO); only outside the loss, see `advantages.group_advantages`."""


class AdvantageScale(Option):
    GROUP = "group"
    """The unbiased std of the group."""
    BATCH = "batch"
    """The unbiased std of the batch."""
    NONE = "none"
    """No division (Dr. GRPO)."""
    LEAVE_ONE_OUT = "leave-one-out"
    """The unbiased std of the others, divided by only where it is above 0 (NeMo-RL)."""
    MEAN = "mean"
    """The group's mean, 0 where it is not positive (MaxRL)."""


class CorrectionLevel(Option):
    TOKEN = "token"
    """ρ_t of the token itself."""
    SEQUENCE = "sequence"
    """The product over the sequence, exp(Σ log ρ)."""
    GEOMETRIC = "geometric"
    """Its geometric mean, exp(mean log ρ)."""


class CorrectionMode(Option):
    TRUNCATE = "truncate"
    """Hold the weight to [lower, upper] (truncated importance sampling)."""
    MASK = "mask"
    """Keep it as it is inside [lower, upper], 0 outside (IcePop, sequence masks)."""


class Divergence(Option):
    K1 = "k1"
    """−log ρ."""
    K2 = "k2"
    """(log ρ)²/2."""
    K3 = "k3"
    """ρ − 1 − log ρ."""
    TV = "tv"
    """|π_old − π_rollout| of the token, the total variation between "this token" and "another", both kept 1e-6 from 0
    and 1 (as for binary_kl)."""
    BINARY_KL = "binary_kl"
    """KL(rollout ‖ old) between those two outcomes."""


class DivergenceLevel(Option):
    TOKEN = "token"
    """Each token by its own divergence."""
    SEQUENCE_MEAN = "sequence-mean"
    """The whole sequence by the mean over its tokens."""
    SEQUENCE_SUM = "sequence-sum"
    """By the sum."""
    SEQUENCE_MAX = "sequence-max"
    """By the maximum."""


def option(enum: type[Option], value: Any, name: str) -> Any:
    """`value` as a member of `enum`, or a ValueError that lists the accepted names."""
    try:
        return enum(value)
    except ValueError:
        accepted = ", ".join(repr(str(member)) for member in enum)
        raise ValueError(f"{name}: expected one of {accepted}, got {value!r}") from None


def check_number(name: str, value: Any, lowest: float, *, inclusive: bool = True, optional: bool = False) -> None:
    """Raise unless `value` is a finite number from `lowest` on (or None, if that is allowed)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number{' or None' * optional}, got {value!r}")
    if not math.isfinite(value) or value < lowest or (value == lowest and not inclusive):
        raise ValueError(f"{name}: expected a finite number {'≥' if inclusive else '>'} {lowest:g}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
