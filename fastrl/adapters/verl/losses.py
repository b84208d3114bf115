"""verl's policy losses with fastrl's: one function per loss mode, of verl's signature, for its registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.adapters.verl import config as configs
from fastrl.adapters.verl.measures import Scored, measure
from fastrl.correction import sequence_weights
from fastrl.dtypes import wide
from fastrl.functional import policy_loss
from fastrl.options import Aggregation
from fastrl.rollouts import Rollouts

_DEFAULT_AGGREGATION = {"gspo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean"}
_COUNTS = ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")
_LARGEST_SEED = 2**62

PolicyLossFn = Callable[..., tuple[Tensor, dict[str, Any]]]


def policy_loss_of(mode: str) -> PolicyLossFn:
    """verl's policy loss `mode` (without "fastrl_"), computed by fastrl."""
    default = _DEFAULT_AGGREGATION.get(mode, "token-mean")

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = default,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        values = configs.read(config)
        batch = _Batch(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, rollout_is_weights)
        if mode == configs.BYPASS:
            return _bypass(batch, values)
        return _loss(mode, batch, values)

    loss.__name__ = loss.__qualname__ = f"{configs.PREFIX}{mode}"
    loss.__doc__ = f"""verl 0.9.1's policy loss "{mode}": the same value, gradient and metrics.

    Args:
        old_log_prob, log_prob, advantages: (B, T).
        response_mask: (B, T) bool or 0/1; nothing is read where it is 0.
        loss_agg_mode: verl's aggregation.
        config: verl's ActorConfig, its `global_batch_info` being the normaliser.
        rollout_is_weights: (B, T) factors of each token's loss; None = 1. Bypass mode computes its own.

    Returns:
        The loss, 0-d, and verl's metrics of this mode as Python floats.

    Raises:
        ValueError, TypeError: an option that is unknown or not honoured, named as verl names it.
    """
    return loss


class _Batch:
    """What verl hands to a policy loss."""

    def __init__(
        self, old: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor, aggregation: str, weights: Tensor | None
    ) -> None:
        for name, value in (("old_log_prob", old), ("advantages", advantages), ("response_mask", mask)):
            _checks.tensor(name, value)
            _checks.shape(name, value, tuple(logps.shape), "the shape of log_prob")
        self.old, self.logps, self.advantages, self.mask = old, logps, advantages, mask
        self.aggregation, self.weights = aggregation, weights


def _loss(mode: str, batch: _Batch, values: dict[str, Any], metrics: str | None = None) -> tuple[Tensor, dict]:
    """The loss of an inner mode, and what verl reports in the mode `metrics` (None = the same)."""
    info = _global_info(values["global_batch_info"])
    aggregation = configs.aggregation_of(mode, batch.aggregation)
    length = _length(info["loss_scale_factor"], batch.logps.shape[1])
    seed = int(torch.randint(_LARGEST_SEED, ()).item()) if mode == "clip_cov" else None
    spec = configs.build(mode, values, aggregation, length, seed)
    keep = batch.mask if batch.mask.dtype == torch.bool else batch.mask != 0
    weights = batch.weights
    if weights is not None and mode == "geo_mean":
        weights = sequence_weights(weights, keep)
    rollouts = Rollouts(
        keep.int(), keep, batch.advantages.detach(), old_logps=batch.old.detach(), rollout_weights=weights
    )
    sequences = batch.logps.shape[0] if mode == "geo_mean" else None
    out = policy_loss(batch.logps, rollouts, spec, normalizer=_normalizer(aggregation, info, sequences))
    dtype = wide(batch.logps.dtype)
    logps, old, advantages = (x.detach().to(dtype) for x in (batch.logps, batch.old, batch.advantages))
    return out.loss, measure(metrics or mode, Scored(logps, old, advantages, keep, rollouts, spec, out))


def _bypass(batch: _Batch, values: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """old_log_prob is the sampler's. Weights, rejections and their metrics come from verl's own rollout correction of
    π/π_rollout; "reinforce" is weighted by them, "ppo_clip" is not, its ratio being the same."""
    inner = configs.inner_mode(configs.BYPASS, values)
    helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    names = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs", "rollout_rs_threshold")
    with torch.no_grad():
        proto, mask, measured = helper.compute_rollout_correction_and_rejection_mask(
            old_log_prob=batch.logps,
            rollout_log_prob=batch.old,
            response_mask=batch.mask,
            **{name: values[name] for name in names},
        )
    reinforce = inner != "vanilla"
    weights = proto.batch["rollout_is_weights"] if reinforce and proto else None
    kept = _Batch(batch.old, batch.logps, batch.advantages, mask, batch.aggregation, weights)
    loss, metrics = _loss(inner, kept, values, metrics="reinforce" if reinforce else None)
    return loss, metrics | measured


def _global_info(given: Mapping[str, Any] | None) -> dict[str, Any]:
    info = dict(given or {})
    unknown = sorted(set(info) - set(_COUNTS))
    if unknown:
        expected = f"a field of global_batch_info ({', '.join(_COUNTS)})"
        _checks.refuse(unknown[0], expected, repr(info[unknown[0]]), "written for verl 0.9.1")
    return {name: info.get(name) for name in _COUNTS}


def _length(factor: float | None, width: int) -> Any:
    """What seq-mean-token-sum-norm divides by: verl's constant, or the width of the batch."""
    if factor is None:
        return max(width, 1)
    return int(factor) if isinstance(factor, float) and factor.is_integer() else factor


def _normalizer(aggregation: str, info: Mapping[str, Any], sequences: int | None) -> float | Tensor | None:
    """The denominator D of this micro-batch on this rank: its share of verl's global count, or None = the local one."""
    if sequences is not None:  # geo_mean: every sequence of the micro-batch, empty or not, whatever the global counts
        return float(max(sequences, 1))
    ranks = info["dp_size"] or 1
    if aggregation == Aggregation.TOKEN_SUM:
        return 1 / ranks
    name = "batch_num_tokens" if aggregation == Aggregation.TOKEN_MEAN else "global_batch_size"
    if info[name] is not None:
        return info[name] / ranks
    if ranks > 1:
        _checks.refuse(name, f"the global count, as dp_size is {ranks}", "None", f"set global_batch_info[{name!r}]")
    return None


POLICY_LOSSES: dict[str, PolicyLossFn] = {
    f"{configs.PREFIX}{mode}": policy_loss_of(mode) for mode in (*configs.MODES, configs.BYPASS)
}
"""Every policy loss by the name that it is registered under."""
