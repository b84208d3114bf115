"""verl's metrics of each loss mode, under its names: ours where the definition is one, else measured as verl does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import inputs
from fastrl.adapters._measures import to_floats, token_mean
from fastrl.clamping import hold
from fastrl.functional import LossOutput
from fastrl.registry import Terms, bounds, clip
from fastrl.rollouts import Rollouts
from fastrl.selection import select
from fastrl.spec import LossSpec

_HOLD = 20.0  # nats, in the modes whose log-ratio verl holds


class Scored(NamedTuple):
    """A batch and its loss."""

    logps: Tensor  # (B, T), detached
    old: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    keep: Tensor  # (B, T) bool
    rollouts: Rollouts
    spec: LossSpec
    out: LossOutput

    @property
    def gap(self) -> Tensor:
        """(B, T) log π − log π_old."""
        return self.logps - self.old

    def mean(self, values: Tensor) -> Tensor:
        return token_mean(values, self.keep)


def _ours(name: str) -> Callable[[Scored], Tensor]:
    return lambda s: s.out.metrics[name]


def _held_kl(s: Scored) -> Tensor:
    return s.mean(-hold(s.gap, _HOLD))


def _absolute_kl(s: Scored) -> Tensor:
    return s.mean(s.gap.abs())


def _zero(s: Scored) -> float:
    return 0.0


def _capped(s: Scored) -> Tensor:
    """Tokens that dppo keeps, and whose ratio it truncates."""
    flags = s.spec.definition.flags(Terms(s.logps, s.gap, s.advantages, s.old, None, None), s.spec)
    return s.mean((hold(s.gap, _HOLD).exp() > s.spec.dppo_ratio_cap) & ~(flags.low | flags.high))


def _outside(values: Tensor, s: Scored) -> Tensor:
    return clip(values, *bounds(s.spec)) != values


def _ratio_outside(s: Scored) -> Tensor:
    """Whatever the sign of A."""
    return s.mean(_outside(hold(s.gap, _HOLD).exp(), s))


def _log_ratio_outside(sign: int) -> Callable[[Scored], Tensor]:
    """On either side, with A of this sign."""
    return lambda s: s.mean(_outside(s.gap, s) & (sign * s.advantages > 0))


def _picked(s: Scored) -> Tensor:
    """Tokens that clip_cov drew."""
    flat = inputs.flat(s.rollouts, s.spec, s.logps.dtype)
    selected = select(s.logps.reshape(-1), None, s.advantages.reshape(-1), flat, s.spec).selected
    return s.mean(selected.view(s.keep.shape) == 0)


_CLIPPED, _KL, _LOWER = "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"
_clip_fraction, _plain_kl = _ours("clip_fraction"), _ours("approx_kl")

METRICS: dict[str, dict[str, Callable[[Scored], Any]]] = {
    "vanilla": {_CLIPPED: _clip_fraction, _KL: _held_kl, _LOWER: _ours("dual_clip_fraction")},
    "dppo_tv": {_CLIPPED: _clip_fraction, _KL: _held_kl, _LOWER: _capped},
    "dppo_kl": {_CLIPPED: _clip_fraction, _KL: _held_kl, _LOWER: _capped},
    "gspo": {_CLIPPED: _clip_fraction, _KL: _plain_kl, _LOWER: _zero},
    "sapo": {_CLIPPED: _zero, _KL: _held_kl, _LOWER: _zero},
    "gpg": {},
    "clip_cov": {_CLIPPED: _picked, _KL: _plain_kl},
    "kl_cov": {_KL: _absolute_kl},
    "geo_mean": {_CLIPPED: _log_ratio_outside(1), _KL: _plain_kl, _LOWER: _log_ratio_outside(-1)},
    "dro": {_KL: _plain_kl},
    "cispo": {_CLIPPED: _ratio_outside, _KL: _held_kl, _LOWER: _zero},
    "reinforce": {_KL: _plain_kl},
}
"""What verl reports in each mode ("reinforce": bypass mode with that loss_type)."""


@torch.no_grad()
def measure(mode: str, scored: Scored) -> dict[str, float]:
    """The metrics as Python floats, in one transfer from the device."""
    return to_floats({name: of(scored) for name, of in METRICS[mode].items()})
