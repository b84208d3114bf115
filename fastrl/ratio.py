"""The log-ratio of each token: its own, or its sequence's."""

from __future__ import annotations

from torch import Tensor

from fastrl.flat import segment_total
from fastrl.spec import LossSpec, RatioLevel


def log_ratio(delta: Tensor, sequence: Tensor, lengths: Tensor, spec: LossSpec) -> Tensor:
    """(n,) log-ratios from delta = logp − old, zero at masked tokens; n rows hold whole sequences.

    token: delta. sequence: log s = Σ delta / length, the same for all tokens of a sequence, gradient through the mean
    (GSPO, arXiv:2507.18071). sequence_token: that value, with the gradient of the token's own delta (GSPO-token, same
    paper). sequence_sum: Σ delta, gradient through the sum.
    """
    if spec.ratio_level == RatioLevel.TOKEN:
        return delta
    total = segment_total(delta, sequence, lengths.shape[0])
    if spec.ratio_level == RatioLevel.SEQUENCE_SUM:
        return total.to(delta.dtype)
    mean = (total / lengths.double().clamp_min(1)[sequence]).to(delta.dtype)
    if spec.ratio_level == RatioLevel.SEQUENCE_TOKEN:
        return delta - delta.detach() + mean.detach()
    return mean
