"""torchtitan's logits under tensor parallelism, and the metrics by which it compares trainer and generator."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from fastrl import _checks

LOG_RATIO_LIMIT = 10.0
"""torchtitan holds the log-ratio to ±10 before it takes the exponential."""
_DIFFERENT = 1e-6
"""From here on torchtitan counts a log-ratio, or a clipped ratio, as different."""


def whole_vocabulary(logits: Tensor, global_vocab_size: int | None) -> Tensor:
    """The logits of all V columns, gathered where tensor parallelism has split them; the gradient is sliced back.

    torchtitan splits in two ways. A DTensor says so itself. In the backend "spmd_types", its default, the logits are a
    plain tensor with the columns of one rank, and only torchtitan's mesh says so: without the gather an id of that
    rank's shard would get a log-prob over a part of the vocabulary, and nothing would fail.

    Raises:
        ValueError: a DTensor of partial sums, or V != global_vocab_size where that is known.
    """
    if any(kind.__name__ == "DTensor" for kind in type(logits).__mro__):
        logits = _of_dtensor(logits)
    else:
        logits = _of_shard(logits)
    if global_vocab_size is not None and logits.shape[-1] != global_vocab_size:
        _checks.refuse(
            "logits",
            f"{global_vocab_size} columns (global_vocab_size)",
            logits,
            "gather the vocabulary before the loss",
        )
    return logits


def _of_dtensor(logits: Any) -> Tensor:
    from torch.distributed.tensor import Replicate

    if any(p.is_partial() for p in logits.placements):
        _checks.refuse("logits", "a DTensor without partial sums", str(logits.placements), "reduce it first")
    last = (-1, logits.ndim - 1)
    placements = [Replicate() if any(p.is_shard(dim) for dim in last) else p for p in logits.placements]
    gathered: Tensor = logits.redistribute(placements=placements).to_local()
    return gathered


def _of_shard(logits: Tensor) -> Tensor:
    theirs = sys.modules.get("torchtitan.distributed.spmd_types")  # there, if torchtitan is what calls
    if theirs is None or theirs.get_spmd_backend() != "spmd_types" or theirs.spmd_mesh_size("tp") == 1:
        return logits
    spmd = importlib.import_module("spmd_types")
    group = theirs.current_spmd_mesh().get_group("tp")
    # to I, not R: every rank computes the same loss, so its gradient is sliced, not summed over the ranks
    whole: Tensor = spmd.redistribute(logits, group, src=spmd.S(-1), dst=spmd.I)
    return whole


@torch.no_grad()
def comparison(
    logps: Tensor, generator: Tensor, keep: Tensor, bounds: tuple[float, float], denominator: Any
) -> dict[str, Tensor]:
    """How far apart trainer and generator are; the clipped fraction goes by the ratio alone, not by the sign of A."""
    apart = torch.where(keep, logps - generator, 0.0)
    ratio = apart.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped = (ratio - ratio.clamp(*bounds)).abs() > _DIFFERENT
    return {
        "loss/ratio_clipped_frac": clipped.sum() / denominator,
        "bit_wise/ratio_tokens_different/mean": (apart.abs() > _DIFFERENT).sum() / denominator,
        "bit_wise/logprob_diff/max": apart.abs().max(),
    }
