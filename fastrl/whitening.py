"""Masked whitening: zero mean and unit variance over the values that count."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import _checks


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x − μ)/σ over the unmasked values; 0 under the mask.

    μ = Σ m·x / n,  q = Σ m·(x − μ)², the variance in two passes.
    unbiased: σ⁻¹ = 1/√(q/(n − 1) + eps) (verl, TRL, SkyRL, ROLL, slime).
    biased:   σ⁻¹ = 1/√max(q/n, eps) (OpenRLHF, NeMo-RL's REINFORCE++).

    Args:
        values: floats of any shape.
        mask: same shape, bool or 0/1, the values that count; None = all. Nothing is read where it is 0.
        shift_mean: False keeps the mean: (x − μ)/σ + μ.

    Returns:
        Same shape, float32 (float64 for float64 values), differentiable. No host synchronisation. A single value, or
        values that are all equal, have variance 0 and give 0 (μ without the shift).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or eps not above 0.
    """
    _checks.floating("values", values)
    _checks.number("eps", eps)
    keep = _checks.keep(mask, values, "values")
    x = values if values.dtype in _checks.WIDE_FLOATS else values.float()
    if keep is None:
        keep = torch.ones_like(x, dtype=torch.bool)
    n = keep.sum()
    mean = torch.where(keep, x, 0).sum() / n.clamp_min(1)
    centred = torch.where(keep, x - mean, 0)
    squares = (centred * centred).sum()
    if unbiased:
        scale = (squares / (n - 1).clamp_min(1) + eps).rsqrt()
    else:
        scale = (squares / n.clamp_min(1)).clamp_min(eps).rsqrt()
    whitened = centred * scale
    return whitened if shift_mean else torch.where(keep, whitened + mean, 0)
