"""Coefficients that are steered between optimizer steps: KL and entropy. Plain Python numbers, for checkpoints too.

`value` is the coefficient to use now. A tensor given to `update` is read on the host, once per call.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastrl import _checks


def _measured(name: str, value: float | Tensor) -> float:
    """A measurement as a Python number; NaN would stay in the coefficient for ever."""
    if isinstance(value, Tensor):
        _checks.shape(name, value, (), "one number")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        _checks.refuse(name, "a number or a 0-d tensor", value, error=TypeError)
    if not math.isfinite(value):
        _checks.refuse(name, "a finite measurement", repr(value), "skip the update of a step that diverged")
    return float(value)


def _restored(state: dict[str, Any], names: tuple[str, ...]) -> list[float]:
    """The numbers of a state, which must hold these names and no others."""
    if not isinstance(state, dict) or set(state) != set(names):
        came = f"the names {sorted(state)}" if isinstance(state, dict) else state
        _checks.refuse("state", f"the names {sorted(names)}", came, "pass what state_dict() of the same class gave")
    return [float(state[name]) for name in names]


class FixedKLController:
    """The KL coefficient that never changes.

    Raises:
        ValueError, TypeError: `coef` is not a number of at least 0.
    """

    def __init__(self, coef: float) -> None:
        _checks.number_from_zero("coef", coef)
        self.value = float(coef)

    def update(self, kl: float | Tensor, n_steps: int) -> float:
        """`value`; the measurement is not read."""
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (self.value,) = _restored(state, ("value",))


class AdaptiveKLController:
    """The KL coefficient that holds the KL near a target: β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon).

    Args:
        initial: β at first, above 0 (at 0 it would stay there).
        target: the KL to hold, above 0.
        horizon: the number of steps over which an error is made up for, above 0.

    Source: arXiv:1909.08593, section 2.2; the same rule in verl, OpenRLHF, SkyRL and ROLL.
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        for name, value in (("initial", initial), ("target", target), ("horizon", horizon)):
            _checks.number(name, value)
        self.value, self.target, self.horizon = float(initial), float(target), float(horizon)

    def update(self, kl: float | Tensor, n_steps: int) -> float:
        """The new `value` after `n_steps` samples (verl: the batch size) whose mean KL was `kl`."""
        _checks.number("n_steps", n_steps)
        error = min(max(_measured("kl", kl) / self.target - 1, -0.2), 0.2)
        # Held at 0: with n_steps over 5 horizons the factor would be negative.
        self.value *= max(1 + error * n_steps / self.horizon, 0.0)
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (self.value,) = _restored(state, ("value",))


class AdaptiveEntropyController:
    """The entropy coefficient that holds the entropy near a target, by steps of one size.

    c ← min(c + delta, maximum) where H <= target, else max(c − delta, minimum); `value` is c while the last H was at or
    below the target, and 0 while it was above, or before any was measured.

    Args:
        initial: c at first, within [minimum, maximum].
        target: the entropy per token to hold, in nats.
        delta: the step of c per update, above 0.

    Source: arXiv:2505.22312 (Skywork-OR1); the rule and the defaults of TRL's use_adaptive_entropy.
    """

    def __init__(
        self, initial: float, target: float, delta: float = 0.005, minimum: float = 0.0, maximum: float = 1.0
    ) -> None:
        _checks.number("delta", delta)
        for name, value in (("minimum", minimum), ("maximum", maximum), ("initial", initial), ("target", target)):
            _checks.number(name, value, above=-math.inf)
        if not minimum <= initial <= maximum:
            _checks.refuse("initial", f"a number within [minimum, maximum] = [{minimum}, {maximum}]", repr(initial))
        self.coefficient, self.target, self.delta = float(initial), float(target), float(delta)
        self.minimum, self.maximum = float(minimum), float(maximum)
        self.last_entropy = math.inf

    @property
    def value(self) -> float:
        """The coefficient of the next step: `spec.replace(entropy_coef=controller.value)`."""
        return self.coefficient if self.last_entropy <= self.target else 0.0

    def update(self, entropy: float | Tensor) -> float:
        """The new `value` after an optimizer step with this mean entropy over the tokens of all ranks."""
        self.last_entropy = _measured("entropy", entropy)
        if self.last_entropy <= self.target:
            self.coefficient = min(self.coefficient + self.delta, self.maximum)
        else:
            self.coefficient = max(self.coefficient - self.delta, self.minimum)
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient, self.last_entropy = _restored(state, ("coefficient", "last_entropy"))
