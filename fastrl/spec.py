"""Which loss: a frozen, hashable description of a policy loss. Plain data, no tensors, no torch.

Four axes stay apart: the objective, the level of its ratio, the penalties, and the aggregation. A paper is one
value of this class (see `presets.py`); every combination is checked here, once, and nothing below checks it again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class _Option(str, Enum):
    """A string enum whose members compare equal to, and print as, their value (`StrEnum` needs Python 3.11)."""

    def __str__(self) -> str:
        return str(self.value)


class Objective(_Option):
    PPO_CLIP = "ppo_clip"


class RatioLevel(_Option):
    TOKEN = "token"
    """r_t = exp(logp_t - old_t)."""
    SEQUENCE = "sequence"
    """s = exp(mean over the sequence of logp_t - old_t), shared by its tokens, gradient through the mean (GSPO)."""


class KLEstimator(_Option):
    K1 = "k1"
    ABS = "abs"
    K2 = "k2"
    K3 = "k3"


class KLGradient(_Option):
    PLAIN = "plain"
    """Differentiate the estimator as it stands."""


class Aggregation(_Option):
    TOKEN_MEAN = "token-mean"
    SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"
    SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"
    SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"
    TOKEN_SUM = "token-sum"


class AdvantageBaseline(_Option):
    MEAN = "mean"
    LEAVE_ONE_OUT = "leave-one-out"
    NONE = "none"
    LENGTH_WEIGHTED = "length-weighted"
    """Σ len·r / Σ len of the group (OPO); only outside the loss, see `advantages.group_advantages`."""


class AdvantageScale(_Option):
    GROUP = "group"
    BATCH = "batch"
    NONE = "none"
    LEAVE_ONE_OUT = "leave-one-out"
    """The unbiased std of the others, divided by only where it is above 0 (NeMo-RL)."""
    MEAN = "mean"
    """The group's mean, 0 where it is not positive (MaxRL)."""


def option(enum: type[_Option], value: Any, name: str) -> Any:
    """`value` as a member of `enum`, or a ValueError that lists the accepted names."""
    try:
        return enum(value)
    except ValueError:
        accepted = ", ".join(repr(str(member)) for member in enum)
        raise ValueError(f"{name}: expected one of {accepted}, got {value!r}") from None


_next_key = itertools.count()
_specs: weakref.WeakValueDictionary[int, LossSpec] = weakref.WeakValueDictionary()


def spec_of(key: int) -> LossSpec:
    """The living spec with this `LossSpec.key`."""
    return _specs[key]


CustomObjective = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The loss L = Σₜ wₜ·(ℓ(ratioₜ, Aₜ) + kl_coef·KLₜ − entropy_coef·Hₜ).

    Raises ValueError or TypeError at construction, naming the field, for any value or combination without a meaning.
    """

    objective: str | CustomObjective = Objective.PPO_CLIP
    """A registered name, or `fn(log_ratio, advantages) -> loss` on flat fp32 tensors, one loss per token. The function
    must treat every token by itself: the hidden level calls it on chunks of tokens."""
    ratio_level: str = RatioLevel.TOKEN
    epsilon_low: float | None = 0.2
    """The ratio is clipped below at 1 − epsilon_low; None = no bound on that side."""
    epsilon_high: float | None = 0.2
    """The ratio is clipped above at 1 + epsilon_high; None = no bound on that side."""
    delta: float | None = None
    """Raw upper bound on the unclipped ratio (two-sided clipping, INTELLECT-2): r ← min(r, delta), delta > 1 + ε₊."""
    dual_clip: float | None = None
    """For A < 0, ℓ ← min(ℓ, −dual_clip·A) with dual_clip > 1 (Ye et al. 2020)."""
    log_ratio_clamp: float | None = 20.0
    """Exponents are held to ±this before exp, with zero gradient outside; None = unbounded."""
    kl_coef: float = 0.0
    kl_estimator: str = KLEstimator.K3
    kl_gradient: str = KLGradient.PLAIN
    entropy_coef: float = 0.0
    aggregation: str = Aggregation.TOKEN_MEAN
    max_length: int | None = None
    """The constant divisor of seq-mean-token-sum-norm (Dr. GRPO), in tokens."""
    advantage_baseline: str = AdvantageBaseline.MEAN
    advantage_scale: str = AdvantageScale.GROUP
    advantage_eps: float = 1e-4

    def __post_init__(self) -> None:
        self._check_options()
        self._check_numbers()
        self._check_combinations()
        object.__setattr__(self, "_key", next(_next_key))
        _specs[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and unpickled specs are constructed anew, with a key of their own."""
        return _rebuild, ({field.name: getattr(self, field.name) for field in dataclasses.fields(self)},)

    @property
    def key(self) -> int:
        """A number that stands for this object where only numbers can pass (custom operators)."""
        return self._key  # type: ignore[attr-defined]

    @property
    def is_custom(self) -> bool:
        """Whether the objective is the user's own function."""
        return callable(self.objective)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LossSpec:
        """The preset called `name`, in any case, with fields replaced: `LossSpec.preset("dapo", kl_coef=0.01)`."""
        from fastrl import presets

        return presets.preset(name, **overrides)

    def replace(self, **overrides: Any) -> LossSpec:
        """This spec with some fields changed, checked again."""
        return dataclasses.replace(self, **overrides)

    def _check_options(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if not callable(self.objective):
            try:
                put("objective", option(Objective, self.objective, "objective"))
            except ValueError as error:
                raise ValueError(f"{error}; or pass a function fn(log_ratio, advantages) -> loss") from None
        put("ratio_level", option(RatioLevel, self.ratio_level, "ratio_level"))
        put("kl_estimator", option(KLEstimator, self.kl_estimator, "kl_estimator"))
        put("kl_gradient", option(KLGradient, self.kl_gradient, "kl_gradient"))
        put("aggregation", option(Aggregation, self.aggregation, "aggregation"))
        put("advantage_baseline", option(AdvantageBaseline, self.advantage_baseline, "advantage_baseline"))
        put("advantage_scale", option(AdvantageScale, self.advantage_scale, "advantage_scale"))

    def _check_numbers(self) -> None:
        bounds = {  # field: (may be None, lowest, whether the lowest itself is allowed)
            "epsilon_low": (True, 0.0, True),
            "epsilon_high": (True, 0.0, True),
            "delta": (True, 1.0, False),
            "dual_clip": (True, 1.0, False),
            "log_ratio_clamp": (True, 0.0, False),
            "kl_coef": (False, 0.0, True),
            "entropy_coef": (False, -math.inf, True),
            "advantage_eps": (False, 0.0, True),
        }
        for name, (optional, lowest, inclusive) in bounds.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number{' or None' * optional}, got {value!r}")
            if not math.isfinite(value) or value < lowest or (value == lowest and not inclusive):
                sign = "≥" if inclusive else ">"
                raise ValueError(f"{name}: expected a finite number {sign} {lowest:g}, got {value!r}")
        if self.log_ratio_clamp is not None and self.log_ratio_clamp > 80:
            raise ValueError(
                f"log_ratio_clamp: expected at most 80 (exp overflows float32 above 88), got {self.log_ratio_clamp!r};"
                " use None to leave the ratio unbounded"
            )
        if self.epsilon_low is not None and self.epsilon_low > 1:
            raise ValueError(
                f"epsilon_low: expected an offset from 1 of at most 1, got {self.epsilon_low!r};"
                " use None for no lower bound"
            )

    def _check_combinations(self) -> None:
        if self.aggregation == Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
            if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
                raise ValueError(
                    "max_length: aggregation 'seq-mean-token-sum-norm' needs a positive int (the longest completion, "
                    f"in tokens), got {self.max_length!r}; e.g. LossSpec.preset('dr_grpo', max_length=1024)"
                )
        elif self.max_length is not None:
            raise ValueError(
                f"max_length: only aggregation 'seq-mean-token-sum-norm' divides by it, got {self.max_length!r} with "
                f"aggregation {str(self.aggregation)!r}; leave it None"
            )
        if self.advantage_baseline == AdvantageBaseline.LENGTH_WEIGHTED:
            raise ValueError(
                "advantage_baseline: 'length-weighted' needs the lengths of the whole group, which a loss on a "
                "micro-batch does not have; use group_advantages(rewards, ..., baseline='length-weighted', "
                "lengths=...) and pass Rollouts(advantages=...)"
            )
        if self.is_custom:
            self._check_custom()
        if self.delta is not None and self.epsilon_high is not None and self.delta <= 1 + self.epsilon_high:
            raise ValueError(
                f"delta: expected more than 1 + epsilon_high = {1 + self.epsilon_high:g} (it is a raw bound on the "
                f"ratio, beyond the clip range), got {self.delta!r}"
            )
        if self.kl_coef == 0 and self.kl_estimator != KLEstimator.K3:
            raise ValueError(
                f"kl_estimator: {str(self.kl_estimator)!r} has no effect while kl_coef is 0; set kl_coef or leave it"
            )

    def _check_custom(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("epsilon_low", "epsilon_high", "delta", "dual_clip"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}: a custom objective does its own clipping, got {getattr(self, name)!r}; "
                    "leave it at its default and clip inside the function"
                )


def _rebuild(fields: dict[str, Any]) -> LossSpec:
    return LossSpec(**fields)
