"""The precision that a loss is computed in."""

from __future__ import annotations

import torch


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any of the inputs is float64, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
