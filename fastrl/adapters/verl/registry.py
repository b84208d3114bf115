"""Entering fastrl's losses and estimators into verl's registries, and standing in for verl's own, reversibly."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from fastrl.adapters._versions import warn_outside
from fastrl.adapters.verl.advantages import ADVANTAGE_ESTIMATORS
from fastrl.adapters.verl.config import PREFIX
from fastrl.adapters.verl.losses import POLICY_LOSSES

TESTED = ("0.9.1", "0.10")
"""0.9.0 has other fields in its ActorConfig, and its gspo one aggregation only."""


def _core() -> Any:
    warn_outside("verl", *TESTED)
    try:
        return importlib.import_module("verl.trainer.ppo.core_algos")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("verl"):
            raise
        span = "verl>={},<{}".format(*TESTED)
        message = f"fastrl.adapters.verl: verl is not installed; pip install '{span}'"
        raise ModuleNotFoundError(message, name="verl") from error


def register() -> list[str]:
    """Enter every policy loss and advantage estimator into verl's registries under `fastrl_<verl's name>`.

    The plug-in entry point calls this when verl is imported; call it yourself where plug-ins are off. A second call
    changes nothing.

    Returns:
        The names. Use them as `actor.policy_loss.loss_mode` and `algorithm.adv_estimator`.

    Raises:
        ModuleNotFoundError: verl is not installed.
    """
    core = _core()
    for name, loss in POLICY_LOSSES.items():
        core.register_policy_loss(name)(loss)
    for name, estimator in ADVANTAGE_ESTIMATORS.items():
        core.register_adv_est(name)(estimator)
    return [*POLICY_LOSSES, *ADVANTAGE_ESTIMATORS]


_replaced: list[tuple[dict[str, Any], str, Any]] = []


def install(names: Iterable[str] | None = None) -> None:
    """Stand in for verl's own losses and estimators, so that its own names run fastrl in this process.

    verl's trainers hand some data to an estimator of its own name only (gae, gdpo, remax, the optimal token baselines),
    score the last output of a session under the name grpo only, and set loss_mode themselves in bypass mode: there a
    name of ours cannot be used, and this is the way. `restore()` undoes it. Every worker process that computes a loss
    or an advantage needs the call.

    Args:
        names: verl's names of losses and estimators ("vanilla", "gae", ...); None = all. A name that is both a loss
            and an estimator (gpg) stands for both.

    Raises:
        ValueError: a name that fastrl has no loss or estimator for.
    """
    core = _core()
    ours: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (core.POLICY_LOSS_REGISTRY, {name.removeprefix(PREFIX): fn for name, fn in POLICY_LOSSES.items()}),
        (core.ADV_ESTIMATOR_REGISTRY, {name.removeprefix(PREFIX): fn for name, fn in ADVANTAGE_ESTIMATORS.items()}),
    ]
    known = {name for _, table in ours for name in table}
    chosen = known if names is None else set(names)
    unknown = sorted(chosen - known)
    if unknown:
        raise ValueError(f"names: expected some of {', '.join(sorted(known))}, got {unknown[0]!r}")
    for registry, table in ours:
        for name in sorted(chosen & set(table)):
            theirs = registry[name]
            if theirs is table[name]:
                continue
            _replace(registry, name, table[name])
            # verl calls some of them (gae, grpo, vanilla) by the name of the function
            if vars(core).get(theirs.__name__) is theirs:
                _replace(vars(core), theirs.__name__, table[name])


def _replace(table: dict[str, Any], name: str, ours: Any) -> None:
    _replaced.append((table, name, table[name]))
    table[name] = ours


def restore() -> None:
    """Put back whatever `install` replaced; nothing happens where nothing was."""
    while _replaced:
        table, name, theirs = _replaced.pop()
        table[name] = theirs
