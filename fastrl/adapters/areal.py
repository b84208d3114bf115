"""AReaL 1.0.4: `grpo_loss_fn`, with its arguments, on its packed (or padded) batches, and actor engines that use it.

    import areal.engine
    from fastrl.adapters.areal import FSDPPPOActor       # or MegatronPPOActor, ArchonPPOActor

    areal.engine.FSDPPPOActor = FSDPPPOActor             # before PPOTrainer is built

The loss runs where the engine is: in AReaL's single-controller mode, its default, in worker processes, which import the
engine's class by its path. Setting `areal.trainer.ppo.actor.grpo_loss_fn` in the launcher does nothing there. With an
engine of your own: `engine.train_batch(batch, functools.partial(grpo_loss_fn, eps_clip=..., ...), loss_weight_fn)`.

The loss is the mean over the micro-batch's own tokens; the engine weighs micro-batches by `loss_weight_fn`. AReaL's KL
is in the reward, its entropy a metric.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from typing import Any

from torch import Tensor

from fastrl.adapters._areal_engine import ENGINES, engine_class
from fastrl.adapters._batch import flat_offsets, k1_bounds, no_ids, sequence_means
from fastrl.adapters._config import Options, fields_of
from fastrl.adapters._versions import warn_outside
from fastrl.functional import policy_loss
from fastrl.metrics import Metrics
from fastrl.rollout_correction import RolloutCorrection
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec

logger = logging.getLogger("fastrl")
_ARGUMENTS = Options(
    framework="AReaL 1.0",
    honoured={
        "eps_clip": 0.2, "eps_clip_higher": None, "c_clip": None, "rejection_sampling": None, "m2_threshold": None,
        "importance_sampling_level": "token", "prox_logp_method": "recompute", "use_sapo_loss": False,
        "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05, "use_decoupled_loss": False,
    },
    elsewhere={
        "current_version", "vocab_min_logits", "vocab_max_logits", "vocab_mean_logits", "vocab_norm_logits",
    },
    refused={
        "use_cispo_loss": (False, "leave it False"),
        "behave_imp_weight_cap": (None, "set rejection_sampling (AReaL 1.0)"),
        "behave_imp_weight_mode": ("disabled", "set rejection_sampling (AReaL 1.0)"),
    },
    own_loss="use AReaL's own grpo_loss_fn",
)  # fmt: skip
_REJECTION = dataclasses.replace(
    _ARGUMENTS,
    honoured={"level": "token", "action": "mask", "metric": "ratio", "agg": "mean", "upper": 5.0, "lower": None},
    elsewhere=(),
    refused={},
)


def spec_from_arguments(arguments: dict[str, Any]) -> LossSpec:
    """The `LossSpec` of AReaL's keyword arguments; ValueError names what is not honoured."""
    f = _ARGUMENTS.read(arguments)
    level = _ARGUMENTS.choose(
        "importance_sampling_level", f["importance_sampling_level"], {"token": "token", "sequence": "sequence"}
    )
    methods = dict.fromkeys(("recompute", "metrics", "reuse_train_logp"))
    _ARGUMENTS.choose("prox_logp_method", str(getattr(f["prox_logp_method"], "value", f["prox_logp_method"])), methods)
    rollout = _correction(f)
    common: dict[str, Any] = {"ratio_level": level, "rollout": rollout, "log_ratio_clamp": None}
    if f["use_sapo_loss"]:
        for name in ("use_decoupled_loss", "rejection_sampling"):
            if f[name]:
                _ARGUMENTS.refuse(name, f[name], "leave it off with use_sapo_loss")
        tau = {"sapo_temperature_positive": f["sapo_tau_pos"], "sapo_temperature_negative": f["sapo_tau_neg"]}
        return LossSpec(objective="sapo", **tau, **common)
    higher = f["eps_clip"] if f["eps_clip_higher"] is None else f["eps_clip_higher"]
    return LossSpec(epsilon_low=f["eps_clip"], epsilon_high=higher, dual_clip=f["c_clip"], **common)


def _correction(f: dict[str, Any]) -> RolloutCorrection | None:
    """M2PO takes its tokens out of the mean; rejection_sampling leaves them in it, without a loss."""
    if f["rejection_sampling"] is None:
        threshold = f["m2_threshold"]
        how = {"level": None, "second_moment": threshold, "rejected_in_denominator": False}
        return None if threshold is None else RolloutCorrection(**how)
    if f["m2_threshold"] is not None:
        _ARGUMENTS.refuse("m2_threshold", f["m2_threshold"], "leave it None with rejection_sampling")
    r = _REJECTION.read(f["rejection_sampling"])
    by_sequence = _REJECTION.choose("rejection_sampling.level", r["level"], {"token": False, "sequence": True})
    mode = _REJECTION.choose("rejection_sampling.action", r["action"], {"mask": "mask", "clamp": "truncate"})
    if mode == "mask" and not by_sequence and f["importance_sampling_level"] == "sequence":
        _REJECTION.refuse(
            "rejection_sampling.level", "token", "use 'sequence' with importance_sampling_level='sequence'"
        )
    low, high = r["lower"], r["upper"]
    if r["metric"] == "ratio" and (not by_sequence or r["agg"] == "mean"):
        return RolloutCorrection(level="geometric" if by_sequence else "token", mode=mode, lower=low, upper=high)
    levels = {"mean": "sequence-mean", "sum": "sequence-sum"} | (
        {"max": "sequence-max"} if r["metric"] == "kl_k2" else {}
    )
    where = _REJECTION.choose("rejection_sampling.agg", r["agg"], levels) if by_sequence else "token"
    rejections = {
        "ratio": {"reject": "k1", **k1_bounds(low, high)},
        "kl_k1": {"reject": "k1", "reject_lower": -high, "reject_upper": None if low is None else -low},
        "kl_k2": {"reject": "k2", "reject_lower": low, "reject_upper": high},
    }
    if mode == "truncate":
        _REJECTION.refuse("rejection_sampling.action", "clamp", "use metric='ratio' and agg='mean' with it, or 'mask'")
    # "kl_k3" is the k3 of the inverse ratio in AReaL, which the library does not have
    how = _REJECTION.choose("rejection_sampling.metric", r["metric"], rejections)
    level = "geometric" if by_sequence and r["metric"] == "ratio" else "token"
    return RolloutCorrection(level=level, reject_level=where, **how)


def grpo_loss_fn(logprobs: Tensor, entropy: Tensor, input_data: dict[str, Any], **arguments: Any) -> Tensor:
    """AReaL's loss: (N,) packed with input_data["cu_seqlens"], or (B, T); log-probs of the next token, as AReaL rolls
    them.

    `arguments` are those of AReaL's grpo_loss_fn, with PPOActorConfig's defaults. Metrics go to AReaL's stats_tracker
    as fastrl/<name>, and the first call of a process is logged (logger "fastrl", INFO): without either it is not this
    loss that trains.

    Raises:
        ValueError: an argument or an input that is not honoured or not known, named.
    """
    _started()
    spec = spec_from_arguments(arguments)
    for name, value in input_data.items():
        if value is not None and (name == "teacher_logp" or "loss_weight" in name):
            _ARGUMENTS.refuse(name, "a value", "train without a teacher and without loss weights")
    mask, advantages, behaviour = input_data["loss_mask"].bool(), input_data["advantages"], input_data["logprobs"]
    cu_seqlens = input_data.get("cu_seqlens") if logprobs.ndim == 1 else None
    if logprobs.ndim == 1 and cu_seqlens is None:
        if spec.by_sequence:
            _ARGUMENTS.refuse("cu_seqlens", None, "pass it with a 1-D batch")
        cu_seqlens = flat_offsets(logprobs)
    proximal = input_data.get("prox_logp")
    if "reuse_train_logp" in str(arguments.get("prox_logp_method")):
        proximal = None
    elif spec.objective == "sapo":
        proximal = behaviour
    elif proximal is None:
        _ARGUMENTS.refuse("prox_logp", None, "compute it (prox_logp_method='recompute')")
    rollouts = Rollouts(
        no_ids(logprobs), mask, advantages, old_logps=proximal, rollout_logps=behaviour, cu_seqlens=cu_seqlens
    )
    if spec.ratio_level == "sequence":  # AReaL's advantage of a sequence: the mean over what M2PO leaves of it
        left = rollouts.corrected(spec).mask if spec.rollout is not None and spec.rollout.by_batch else mask
        rollouts = dataclasses.replace(rollouts, advantages=sequence_means(advantages, left, cu_seqlens))
    out = policy_loss(logprobs, rollouts, spec, entropy=entropy.detach())
    _log(out.metrics)
    return out.loss


@functools.cache
def _started() -> None:
    warn_outside("areal", "1.0", "1.1")
    logger.info("fastrl.adapters.areal.grpo_loss_fn is the loss of process %d", os.getpid())


def _log(metrics: Metrics) -> None:
    tracker = sys.modules.get("areal.utils.stats_tracker")  # there, if AReaL is what calls
    if tracker is not None:
        tracker.scalar(**{f"fastrl/{name}": value for name, value in metrics.to_floats().items()})


def check_actor_config(config: Any) -> None:
    """Refuse of a `PPOActorConfig` what the loss would refuse of the arguments that AReaL makes of it."""
    fields = fields_of(config)
    known = (*_ARGUMENTS.honoured, *_ARGUMENTS.refused)
    spec_from_arguments({name: fields[name] for name in known if name in fields})


def __getattr__(name: str) -> Any:
    """AReaL's actor engines with this loss, built when they are first asked for."""
    if name not in ENGINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = engine_class(name, __name__, grpo_loss_fn, check_actor_config)
    return globals()[name]
