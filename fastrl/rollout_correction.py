"""What to do about a sampler whose probabilities are not the policy's: plain data, checked at construction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastrl.options import (
    CorrectionLevel,
    CorrectionMode,
    Divergence,
    DivergenceLevel,
    check_flag,
    check_number,
    option,
)


@dataclass(frozen=True, kw_only=True)
class RolloutCorrection:
    """Importance weights and rejections from ρ = π_old / π_rollout, the policy that the ratio is against over the one
    that sampled (`Rollouts.rollout_logps`; NaN there means ρ = 1).

    A weight multiplies the token's policy term (not its KL, not its entropy bonus), without gradient; a rejected token
    has weight 0. Exponents (log ρ, or its sum or mean over the sequence) are held to ±log_ratio_clamp once, after the
    sum; k1, k2 and k3 are taken of the held log ρ of each token.

    Which settings are whose:
        TIS (Yao et al. 2025; TRL "token_truncate", slime, verl "token"): level "token", mode "truncate", upper 2.
        IcePop (TRL "token_mask", slime, verl "lo_hi"): level "token", mode "mask", lower 0.5, upper 5.
        TRL's default "sequence_mask": level "sequence", mode "mask", upper 3. verl "sequence": mode "truncate".
        verl's rejection "seq_mean_k1" etc.: reject "k1", reject_level "sequence-mean", rejected_in_denominator False.
        OpenRLHF's sequence gate: level "token" without bounds, reject "k1" at "sequence-mean" between −log upper and
        −log lower. M2PO (AReaL): level None, second_moment 0.04.

    Raises ValueError or TypeError at construction, naming the field, for a combination without a meaning.
    """

    level: str | None = CorrectionLevel.TOKEN
    """Of what the weight is the ratio: a token, a sequence (product) or its geometric mean; None = no weight, only
    rejections."""
    mode: str = CorrectionMode.TRUNCATE
    lower: float | None = None
    """Lower bound on the weight; None = 0."""
    upper: float | None = None
    """Upper bound on the weight; None = unbounded."""
    normalize: bool = False
    """Divide the weights by their mean over the batch's valid tokens (level "token") or sequences (else), the zeros of
    mode "mask" included, before anything else is rejected (verl)."""
    reject: str | None = None
    """Reject where this divergence between old and rollout policy leaves [reject_lower, reject_upper]."""
    reject_level: str = DivergenceLevel.TOKEN
    """Whether a token is judged by its own divergence, or a whole sequence by the mean, sum or maximum over its tokens
    (which are then rejected together)."""
    reject_lower: float | None = None
    reject_upper: float | None = None
    """Bounds on the divergence, in nats (tv: in probability). k1 is signed: −log ρ."""
    second_moment: float | None = None
    """M2PO (arXiv:2510.01161): reject the fewest tokens, largest (log ρ)² first, that leave its mean below this; one
    token always stays."""
    rejected_in_denominator: bool = True
    """True: rejected tokens still count in the aggregation's denominators and keep their KL and entropy terms (TRL,
    AReaL, slime). False: they are masked in every term and every count of the loss (verl), after weights and
    divergences were taken over all tokens; needs `old_logps`."""

    def __post_init__(self) -> None:
        def put(name: str, enum: type) -> None:
            object.__setattr__(self, name, option(enum, getattr(self, name), f"rollout.{name}"))

        if self.level is not None:
            put("level", CorrectionLevel)
        put("mode", CorrectionMode)
        if self.reject is not None:
            put("reject", Divergence)
        put("reject_level", DivergenceLevel)
        check_number("rollout.lower", self.lower, 0.0, optional=True)
        check_number("rollout.upper", self.upper, 0.0, inclusive=False, optional=True)
        check_number("rollout.reject_lower", self.reject_lower, -math.inf, optional=True)
        check_number("rollout.reject_upper", self.reject_upper, -math.inf, optional=True)
        check_number("rollout.second_moment", self.second_moment, 0.0, inclusive=False, optional=True)
        check_flag("rollout.normalize", self.normalize)
        check_flag("rollout.rejected_in_denominator", self.rejected_in_denominator)
        self._check_bounds()
        self._check_combinations()

    def _check_bounds(self) -> None:
        for low, high in (("lower", "upper"), ("reject_lower", "reject_upper")):
            a, b = getattr(self, low), getattr(self, high)
            if a is not None and b is not None and a > b:
                raise ValueError(f"rollout.{low}: expected at most {high} = {b!r}, got {a!r}")

    def _check_combinations(self) -> None:
        bounded = self.lower is not None or self.upper is not None
        if self.level is None and (bounded or self.normalize or self.mode == CorrectionMode.MASK):
            raise ValueError(
                "rollout.level: None has no weight to bound, mask or normalise; "
                "choose 'token', 'sequence' or 'geometric', or leave mode, lower, upper and normalize alone"
            )
        if self.mode == CorrectionMode.MASK and not bounded:
            raise ValueError("rollout.mode: 'mask' needs rollout.lower or rollout.upper; e.g. upper=3.0")
        if self.reject is None and (self.reject_lower is not None or self.reject_upper is not None):
            raise ValueError("rollout.reject: the reject bounds need a divergence; e.g. reject='k3'")
        if self.reject is None and self.reject_level != DivergenceLevel.TOKEN:
            raise ValueError("rollout.reject: reject_level needs a divergence; e.g. reject='k3'")
        if self.reject is not None and self.reject_lower is None and self.reject_upper is None:
            raise ValueError("rollout.reject: needs reject_upper or reject_lower; e.g. reject_upper=0.1")
        if self.level is None and self.reject is None and self.second_moment is None:
            raise ValueError("rollout.level: None without reject or second_moment corrects nothing; use rollout=None")
        if not self.rejected_in_denominator and not self.rejects:
            raise ValueError(
                "rollout.rejected_in_denominator: nothing is rejected; set mode='mask', reject or second_moment"
            )

    @property
    def rejects(self) -> bool:
        """Whether a token can be rejected at all."""
        return self.mode == CorrectionMode.MASK or self.reject is not None or self.second_moment is not None

    @property
    def by_sequence(self) -> bool:
        """Whether a token's weight depends on its whole sequence."""
        by_weight = self.level in (CorrectionLevel.SEQUENCE, CorrectionLevel.GEOMETRIC)
        return by_weight or (self.reject is not None and self.reject_level != DivergenceLevel.TOKEN)

    @property
    def by_batch(self) -> bool:
        """Whether it depends on the whole batch, and is therefore taken from the data before the loss."""
        return self.normalize or self.second_moment is not None or not self.rejected_in_denominator
