"""The log-ratio of each token: its own, or its sequence's mean."""

from __future__ import annotations

from torch import Tensor

from fastrl.flat import segment_sum
from fastrl.spec import LossSpec, RatioLevel


def log_ratio(delta: Tensor, sequence: Tensor, lengths: Tensor, spec: LossSpec) -> Tensor:
    """(n,) log-ratios from delta = logp − old, zero at masked tokens; n rows hold whole sequences.

    token: delta. sequence: log s = Σ delta / length, the same for all tokens of a sequence, gradient through the mean
    (GSPO, arXiv:2507.18071).
    """
    if spec.ratio_level == RatioLevel.TOKEN:
        return delta
    # Sums one after the other, forward here and backward in the gather: float64, or 65,536 tokens cost four digits.
    total = segment_sum(delta.double(), sequence, lengths.shape[0])
    return (total / lengths.double().clamp_min(1))[sequence].to(delta.dtype)
