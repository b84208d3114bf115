"""Which loss: a frozen, hashable description of a policy loss. Plain data, no tensors.

Four axes stay apart: the objective, the level of its ratio, the penalties, and the aggregation. A paper is one
value of this class (see `presets.py`); every combination is checked here, once, and nothing below checks it again.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastrl.objectives import OBJECTIVES, OwnNumbers
from fastrl.options import (
    AdvantageBaseline,
    AdvantageScale,
    Aggregation,
    KLEstimator,
    KLGradient,
    RatioLevel,
    option,
)
from fastrl.registry import Definition
from fastrl.rollout_correction import RolloutCorrection
from fastrl.spec_checks import check

_next_key = itertools.count()
_specs: weakref.WeakValueDictionary[int, LossSpec] = weakref.WeakValueDictionary()


def spec_of(key: int) -> LossSpec:
    """The living spec with this `LossSpec.key`."""
    return _specs[key]


CustomObjective = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class LossSpec(OwnNumbers):
    """The loss L = Σₜ wₜ·(vₜ·ℓ(ratioₜ, Aₜ) + kl_coef·KLₜ − entropy_coef·Hₜ), v the rollout weights.

    Raises ValueError or TypeError at construction, naming the field, for any value or combination without a meaning.
    The fields of `OwnNumbers` belong to the objective that they are named after.
    """

    objective: str | CustomObjective = "ppo_clip"
    """A name of `objectives.OBJECTIVES`, or `fn(log_ratio, advantages) -> loss` on flat fp32 tensors, one loss per
    token. The function must treat every token by itself: the hidden level calls it on chunks of tokens."""
    ratio_level: str = RatioLevel.TOKEN
    epsilon_low: float | None = 0.2
    """Lower bound, as an offset: the ratio is clipped below at 1 − epsilon_low (gmpo: the log-ratio at −epsilon_low;
    dppo: the probability shift, or divergence, at epsilon_low); None = no bound on that side."""
    epsilon_high: float | None = 0.2
    """Upper bound, likewise: 1 + epsilon_high; None = no bound on that side. Above −1 with cispo, else at least 0."""
    delta: float | None = None
    """Raw upper bound on the unclipped ratio (two-sided clipping, INTELLECT-2): r ← min(r, delta), delta > 1 + ε₊."""
    dual_clip: float | None = None
    """For A < 0, ℓ ← min(ℓ, −dual_clip·A) with dual_clip > 1 (Ye et al. 2020)."""
    log_ratio_clamp: float | None = 20.0
    """Exponents are held to ±this before exp, with zero gradient outside; None = unbounded."""
    kl_coef: float = 0.0
    """Weight of the KL penalty against `Rollouts.ref_logps`."""
    kl_estimator: str = KLEstimator.K3
    kl_gradient: str = KLGradient.PLAIN
    kl_clamp: float | None = None
    """The KL estimate of a token is held to ±this, with zero gradient outside, except that of straight_through (verl:
    10); None = unbounded."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; it shares the weights of the loss unless `entropy_aggregation` is set."""
    entropy_aggregation: str | None = None
    """How the entropy bonus adds up, over the tokens that `top_entropy_quantile` keeps and by their own local count,
    never by `normalizer`: "token-mean" is TRL's bonus, whatever its loss_type. None = as the loss."""
    top_entropy_quantile: float = 1.0
    """Only this fraction of the batch's valid tokens, those with the highest entropy, keeps its policy term: H at or
    above the 1 − fraction quantile, as `torch.quantile` interpolates it, at least one (arXiv:2506.01939); 1 = all."""
    aggregation: str = Aggregation.TOKEN_MEAN
    max_length: int | None = None
    """The constant divisor of seq-mean-token-sum-norm (Dr. GRPO), in tokens."""
    advantage_baseline: str = AdvantageBaseline.MEAN
    advantage_scale: str = AdvantageScale.GROUP
    advantage_eps: float = 1e-4
    """Added to the scale of the advantages."""
    rollout: RolloutCorrection | None = None
    """Importance weights and rejections from `Rollouts.rollout_logps`; None = they are only measured."""
    off_policy_threshold: float | None = None
    """Drop the policy term of tokens with A < 0 in sequences whose mean of rollout − logp (old − logp without
    rollout_logps) exceeds this, in nats (DeepSeek-V3.2's off-policy sequence mask, arXiv:2512.02556); a token that the
    sampler did not score counts as 0 in that mean. None = off."""
    seed: int | None = None
    """clip_cov draws tokens by this number and their place in the batch: change it every step."""

    def __post_init__(self) -> None:
        self._check_options()
        check(self)
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

    @property
    def definition(self) -> Definition | None:
        """The entry of the objective; None for the user's own function."""
        return OBJECTIVES[self.objective] if isinstance(self.objective, str) else None

    @property
    def by_sequence(self) -> bool:
        """Whether a token's coefficient depends on its whole sequence."""
        correction = self.rollout is not None and not self.rollout.by_batch and self.rollout.by_sequence
        weighs = self.definition is not None and self.definition.weighs_sequences
        return self.ratio_level != RatioLevel.TOKEN or correction or weighs or self.off_policy_threshold is not None

    @property
    def by_batch(self) -> bool:
        """Whether it depends on the whole batch's log-probs or entropies."""
        return self.top_entropy_quantile < 1 or (self.definition is not None and self.definition.selects)

    @property
    def vanishes(self) -> bool:
        """Whether a token with zero advantage has no gradient."""
        return self.definition is not None and self.definition.vanishes and not (self.kl_coef or self.entropy_coef)

    def _check_options(self) -> None:
        def put(name: str, enum: type) -> None:
            object.__setattr__(self, name, option(enum, getattr(self, name), name))

        if not callable(self.objective) and not (isinstance(self.objective, str) and self.objective in OBJECTIVES):
            raise ValueError(
                f"objective: expected one of {', '.join(map(repr, OBJECTIVES))}, got {self.objective!r}; "
                "or pass a function fn(log_ratio, advantages) -> loss"
            )
        put("ratio_level", RatioLevel)
        put("kl_estimator", KLEstimator)
        put("kl_gradient", KLGradient)
        put("aggregation", Aggregation)
        if self.entropy_aggregation is not None:
            put("entropy_aggregation", Aggregation)
        put("advantage_baseline", AdvantageBaseline)
        put("advantage_scale", AdvantageScale)


def _rebuild(fields: dict[str, Any]) -> LossSpec:
    return LossSpec(**fields)
