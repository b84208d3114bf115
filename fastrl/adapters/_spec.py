"""A `LossSpec` from a foreign config, whose refusals name the foreign field."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fastrl.rollout_correction import RolloutCorrection
from fastrl.spec import LossSpec


def lower_bound(offset: float) -> float | None:
    """`epsilon_low` of a ratio clip at 1 − offset: a bound below 0 is never reached, and is none."""
    return None if offset > 1 else offset


def named_spec(names: Mapping[str, str], **fields: Any) -> LossSpec:
    """`LossSpec(**fields)`, where `rollout` may be a mapping of the fields of a `RolloutCorrection`.

    Raises:
        ValueError, TypeError: as `LossSpec`, with the field renamed by `names`.
    """
    rollout = fields.pop("rollout", None)
    try:
        if rollout is not None:
            fields["rollout"] = RolloutCorrection(**rollout)
        return _spec(**fields)
    except (ValueError, TypeError) as error:
        field, colon, rest = str(error).partition(":")
        if field not in names:
            raise
        raise type(error)(f"{names[field]} ({field}){colon}{rest}") from None


@functools.lru_cache(maxsize=256)
def _spec(**fields: Any) -> LossSpec:
    return LossSpec(**fields)
