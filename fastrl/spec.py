"""Which loss: a frozen, hashable description of a policy loss. Plain data, no tensors.

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
from typing import Any

from fastrl.objectives import OBJECTIVES, OwnNumbers
from fastrl.options import (
    AdvantageBaseline,
    AdvantageScale,
    Aggregation,
    CorrectionLevel,
    DivergenceLevel,
    KLEstimator,
    KLGradient,
    RatioLevel,
    check_number,
    option,
)
from fastrl.registry import Definition
from fastrl.rollout_correction import RolloutCorrection

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

    def _check_numbers(self) -> None:
        check_number("epsilon_low", self.epsilon_low, 0.0, optional=True)
        caps = self.objective == "cispo"  # its upper bound caps a weight, at any positive number; a clip range holds 1
        check_number("epsilon_high", self.epsilon_high, -1.0 if caps else 0.0, inclusive=not caps, optional=True)
        for name in ("delta", "dual_clip"):
            check_number(name, getattr(self, name), 1.0, inclusive=False, optional=True)
        for name in ("log_ratio_clamp", "kl_clamp"):
            check_number(name, getattr(self, name), 0.0, inclusive=False, optional=True)
        for name in ("kl_coef", "advantage_eps"):
            check_number(name, getattr(self, name), 0.0)
        check_number("entropy_coef", self.entropy_coef, -math.inf)
        check_number("off_policy_threshold", self.off_policy_threshold, -math.inf, optional=True)
        check_number("top_entropy_quantile", self.top_entropy_quantile, 0.0)
        for field in dataclasses.fields(OwnNumbers):
            lowest = -math.inf if field.name in ("clip_cov_low", "clip_cov_high") else 0.0
            check_number(field.name, getattr(self, field.name), lowest, inclusive=False)
        if self.top_entropy_quantile > 1:
            raise ValueError(
                f"top_entropy_quantile: expected a fraction from 0 to 1, got {self.top_entropy_quantile!r}"
            )
        if self.log_ratio_clamp is not None and self.log_ratio_clamp > 80:
            raise ValueError(
                f"log_ratio_clamp: expected at most 80 (exp overflows float32 above 88), got {self.log_ratio_clamp!r};"
                " use None to leave the ratio unbounded"
            )
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed: expected an int or None, got {self.seed!r}")

    def _check_combinations(self) -> None:
        self._check_aggregation()
        if self.definition is None:
            self._check_reads("a custom objective does its own clipping", (), "clip inside the function")
            if self.ratio_level not in (RatioLevel.TOKEN, RatioLevel.SEQUENCE):
                raise ValueError(
                    f"ratio_level: a custom objective takes 'token' or 'sequence', got {str(self.ratio_level)!r}"
                )
        else:
            self._check_objective(self.definition)
        if self.delta is not None and self.epsilon_high is not None and self.delta <= 1 + self.epsilon_high:
            raise ValueError(
                f"delta: expected more than 1 + epsilon_high = {1 + self.epsilon_high:g} (it is a raw bound on the "
                f"ratio, beyond the clip range), got {self.delta!r}"
            )
        if self.objective != "clip_cov" and self.seed is not None:
            raise ValueError(f"seed: only objective 'clip_cov' draws at random, got {self.seed!r}; leave it None")
        self._check_kl()
        self._check_rollout()

    def _check_aggregation(self) -> None:
        if self.entropy_aggregation == Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
            raise ValueError(
                "entropy_aggregation: 'seq-mean-token-sum-norm' has no length of its own to divide by; use "
                "'seq-mean-token-sum' and divide entropy_coef"
            )
        if self.entropy_aggregation is not None and not self.entropy_coef:
            raise ValueError(
                f"entropy_aggregation: {str(self.entropy_aggregation)!r} has no effect while entropy_coef is 0; set "
                "entropy_coef or leave it None"
            )
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

    def _check_objective(self, definition: Definition) -> None:
        name = str(self.objective)
        self._check_reads(f"objective {name!r} does not read it", (*definition.reads, *definition.numbers))
        if str(self.ratio_level) not in definition.levels:
            levels = " or ".join(map(repr, definition.levels))
            raise ValueError(
                f"ratio_level: objective {name!r} is defined at {levels}, got {str(self.ratio_level)!r}; use that, or "
                "another objective"
            )
        if self.epsilon_low is not None and self.epsilon_low > 1 and definition.centre == 1:
            raise ValueError(
                f"epsilon_low: expected an offset from 1 of at most 1, got {self.epsilon_low!r};"
                " use None for no lower bound"
            )
        if None not in (self.epsilon_low, self.epsilon_high) and self.epsilon_high < -self.epsilon_low:
            raise ValueError(
                f"epsilon_high: expected an upper bound of at least the lower one, 1 - epsilon_low = "
                f"{1 - self.epsilon_low:g}, got 1 + {self.epsilon_high!r}; set epsilon_low=None"
            )
        if name == "clip_cov" and self.seed is None:
            raise ValueError(
                "seed: objective 'clip_cov' draws tokens at random and needs an int, got None; change it every step: "
                "spec.replace(seed=step)"
            )
        if definition.selects and self.top_entropy_quantile < 1:
            raise ValueError(
                f"top_entropy_quantile: objective {name!r} picks tokens by itself, got {self.top_entropy_quantile!r}; "
                "use objective 'ppo_clip' with it"
            )
        if name == "gmpo" and self.top_entropy_quantile < 1:
            raise ValueError(
                f"top_entropy_quantile: undefined with objective 'gmpo', whose loss is one number per sequence, got "
                f"{self.top_entropy_quantile!r}; leave it 1"
            )
        if name == "clip_cov" and self.clip_cov_low >= self.clip_cov_high:
            raise ValueError(
                f"clip_cov_low: expected less than clip_cov_high = {self.clip_cov_high!r}, got {self.clip_cov_low!r}"
            )

    def _check_reads(self, why: str, reads: tuple[str, ...], remedy: str = "") -> None:
        """A number that the objective does not read must stay at its default."""
        clipping = ("epsilon_low", "epsilon_high", "delta", "dual_clip")
        own = tuple(field.name for field in dataclasses.fields(OwnNumbers))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in (*clipping, *own):
            if name not in reads and getattr(self, name) != defaults[name]:
                readers = [key for key, other in OBJECTIVES.items() if name in (*other.reads, *other.numbers)]
                raise ValueError(
                    f"{name}: {why}, got {getattr(self, name)!r}; leave it at its default {defaults[name]!r}, "
                    f"{remedy or 'or use objective ' + ' or '.join(map(repr, readers))}"
                )

    def _check_kl(self) -> None:
        if self.kl_coef == 0:
            for name, default in (
                ("kl_estimator", KLEstimator.K3),
                ("kl_gradient", KLGradient.PLAIN),
                ("kl_clamp", None),
            ):
                if getattr(self, name) != default:
                    value = getattr(self, name)
                    shown = repr(str(value)) if isinstance(value, str) else repr(value)
                    raise ValueError(f"{name}: {shown} has no effect while kl_coef is 0; set kl_coef or leave it")
        if self.kl_gradient == KLGradient.IMPORTANCE_WEIGHTED and self.objective == "gmpo":
            raise ValueError(
                "kl_gradient: 'importance_weighted' is undefined with objective 'gmpo', whose ratio is clipped token "
                "by token; use 'plain' or 'straight_through'"
            )

    def _check_rollout(self) -> None:
        if self.rollout is None:
            return
        if not isinstance(self.rollout, RolloutCorrection):
            raise TypeError(f"rollout: expected a fastrl.RolloutCorrection or None, got {self.rollout!r}")
        by_token = self.rollout.level == CorrectionLevel.TOKEN or (
            self.rollout.reject is not None and self.rollout.reject_level == DivergenceLevel.TOKEN
        )
        whole = self.objective == "gmpo" or self.ratio_level == RatioLevel.SEQUENCE_SUM
        if whole and (by_token or self.rollout.second_moment is not None):
            what = "objective 'gmpo'" if self.objective == "gmpo" else "ratio_level 'sequence_sum'"
            raise ValueError(
                f"rollout: a weight per token is undefined with {what}, whose loss is one number per sequence; use "
                "level='sequence' or 'geometric', and a reject_level of sequences"
            )
        if self.objective == "vespo" and self.rollout.level == CorrectionLevel.GEOMETRIC:
            raise ValueError(
                "rollout.level: objective 'vespo' folds the weight into its product of ratios, got 'geometric'; "
                "use 'token' or 'sequence'"
            )
        if self.objective == "vespo" and self.rollout.by_batch:
            raise ValueError(
                "rollout: objective 'vespo' folds each sequence's weights in; leave normalize, second_moment and "
                "rejected_in_denominator at their defaults"
            )


def _rebuild(fields: dict[str, Any]) -> LossSpec:
    return LossSpec(**fields)
