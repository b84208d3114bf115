"""What trainers report of a batch that `Metrics` does not hold: detached means over the tokens that count.

Nothing here is part of a loss, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastrl.correction import Behaviour, policy_weights
from fastrl.options import CorrectionMode
from fastrl.spec import LossSpec


@torch.no_grad()
def token_mean(values: Tensor, keep: Tensor) -> Tensor:
    """0-d float32: Σ m·x / Σ m, 0 without a token. `values` and `keep` (bool) are of one shape."""
    return (torch.where(keep, values, 0).double().sum() / keep.sum().clamp_min(1)).float()


@torch.no_grad()
def dropped(old_logps: Tensor, rollout_logps: Tensor, keep: Tensor, spec: LossSpec) -> Tensor:
    """(B, T) bool: valid tokens outside the bounds of `spec.rollout`, also where its mode only holds them there."""
    how = spec.rollout
    bounded = how.lower is not None or how.upper is not None
    if bounded:
        how = type(how)(level=how.level, mode=CorrectionMode.MASK, lower=how.lower, upper=how.upper)
    rows = torch.arange(keep.shape[0], device=keep.device)[:, None].expand(keep.shape).reshape(-1)
    old, rollout = (x.detach().reshape(-1) for x in (old_logps, rollout_logps))
    behaviour = Behaviour(old, rollout, keep.reshape(-1), rows, keep.sum(-1).float())
    weights = policy_weights(behaviour, spec.replace(rollout=how))
    return (weights == 0).view(keep.shape) & keep


def to_floats(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Python floats of 0-d tensors (numbers stay), in one transfer from the device."""
    tensors = [value.float() for value in values.values() if isinstance(value, Tensor)]
    moved = iter(torch.stack(tensors).tolist() if tensors else [])
    return {name: next(moved) if isinstance(value, Tensor) else float(value) for name, value in values.items()}
