"""The one way exponents are bounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clamp_log_ratio(log_ratio: Tensor, spec: Any) -> Tensor:
    """The log-ratio held to ±`spec.log_ratio_clamp` before any exp; zero gradient outside, NaN stays NaN."""
    return hold(log_ratio, spec.log_ratio_clamp)


def hold(x: Tensor, bound: float | None) -> Tensor:
    """x held to ±bound, zero gradient outside; None = unbounded."""
    if bound is None:
        return x
    # Not clamp() alone: its gradient at NaN is 0, which would hide the NaN.
    return torch.where(beyond(x, bound), x.detach().clamp(-bound, bound), x)


def beyond(x: Tensor, bound: float | None) -> Tensor:
    """Where `hold` changes x."""
    return torch.zeros_like(x, dtype=torch.bool) if bound is None else x.abs() > bound
