"""SkyRL 0.4: its policy losses under `fastrl_*`, with its signature and its `AlgorithmConfig`.

    cfg.trainer.algorithm.policy_loss_type = "fastrl_gspo"
    fastrl.adapters.skyrl.register(cfg)      # once, with the whole config, before the trainer is built

SkyRL folds the loss reduction into the advantages of the mini-batch, so every loss is the plain sum over the mask; KL
and entropy terms are added by its worker.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.adapters._batch import no_ids
from fastrl.adapters._config import fields_of
from fastrl.adapters._skyrl_config import ALGORITHM, mapped
from fastrl.adapters._versions import warn_outside
from fastrl.functional import policy_loss
from fastrl.metrics import Metrics
from fastrl.rollouts import Rollouts

TYPES = (
    "regular", "dual_clip", "gspo", "cispo", "sapo", "rollout_is", "importance_sampling", "dppo", "clip_cov", "kl_cov",
)  # fmt: skip
"""The loss types that `register` offers, each as "fastrl_" + type. SkyRL's "cross_entropy" reads no rollouts."""


def policy_loss_fn(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    loss_type: str = "regular",
) -> tuple[Tensor, dict[str, float]]:
    """SkyRL's signature: (B, T) tensors -> (Σ over the mask, metrics), with the advantages as SkyRL has scaled them.

    dppo has SkyRL's gradient, with −min(r, e²⁰)·A·log π as its value. clip_cov draws other tokens, as many of the same
    candidates.

    Metrics: clip_ratio where SkyRL's is that of clipped tokens by the sign of A (regular, dual_clip, gspo, dppo) or of
    dropped ones (rollout_is), cispo/ratio_mean, _max, _min; fastrl's own under fastrl/.

    Raises:
        ValueError: a field of `config` that is not honoured or not known, named.
    """
    spec, anchor = mapped(loss_type, config)
    if loss_type == "clip_cov":  # drawn from torch's own generator, as SkyRL draws its tokens
        spec = spec.replace(seed=int(torch.randint(2**31, ())))
    if rollout_logprobs is None:
        if loss_type == "rollout_is" or (loss_type == "cispo" and anchor == "rollout"):
            ALGORITHM.refuse("rollout_logprobs", None, "let the generator return log-probs")
        spec, anchor = spec.replace(rollout=None), "old"  # SkyRL corrects nothing then
    old = {"old": old_log_probs, "rollout": rollout_logprobs, None: None}[anchor]
    rollouts = Rollouts(no_ids(log_probs), loss_mask, advantages, old_logps=old, rollout_logps=rollout_logprobs)
    out = policy_loss(log_probs, rollouts, spec)
    return out.loss, _metrics(out.metrics, loss_type)


def _metrics(metrics: Metrics, loss_type: str) -> dict[str, float]:
    values = metrics.to_floats()
    named = {f"fastrl/{name}": value for name, value in values.items()}
    if loss_type in ("regular", "dual_clip", "gspo", "dppo"):
        named["clip_ratio"] = values["clip_fraction"]
    elif loss_type == "rollout_is":
        named["clip_ratio"] = values["rollout_rejected_fraction"]
    elif loss_type == "cispo":
        named |= {f"cispo/ratio_{x}": values[f"ratio_{x}"] for x in ("mean", "max", "min")}
    return named


def register(config: Any) -> tuple[str, ...]:
    """Register every loss of `TYPES` with SkyRL's `PolicyLossRegistry`; returns their names.

    `config` is SkyRL's whole config (the object with `trainer`): what its policy_loss_type does not honour raises here,
    before training starts. SkyRL goes by the name of a loss in two places, and ours are not in its sets of names. Its
    fully async trainer refuses losses that read old log-probs, for which it keeps no policy: that refusal is here
    instead. And it saves the forward pass for old log-probs that rollout_is and dppo do not read: with ours it takes
    it.

    Raises:
        ValueError: a field that is not honoured or not known, named; a part of the config; a loss that reads old
            log-probs, with trainer.fully_async.enabled.
    """
    warn_outside("skyrl", "0.4", "0.5")
    trainer = fields_of(config).get("trainer")
    if trainer is None:
        _checks.refuse(
            "config", "SkyRL's whole config", f"a {type(config).__name__}", "pass cfg, the one that has cfg.trainer"
        )
    _check_trainer(fields_of(trainer))
    registry = importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils").PolicyLossRegistry
    names = tuple(f"fastrl_{loss_type}" for loss_type in TYPES)
    for name, loss_type in zip(names, TYPES, strict=True):
        registry.register(name, functools.partial(policy_loss_fn, loss_type=loss_type))
    return names


def _check_trainer(trainer: dict[str, Any]) -> None:
    algorithm = trainer["algorithm"]
    chosen = str(fields_of(algorithm).get("policy_loss_type"))
    if not chosen.startswith("fastrl_"):
        return
    anchor = mapped(chosen.removeprefix("fastrl_"), algorithm).anchor
    if anchor == "old" and fields_of(trainer.get("fully_async") or {}).get("enabled", False):
        ALGORITHM.refuse(
            "policy_loss_type",
            chosen,
            "with trainer.fully_async.enabled use fastrl_rollout_is, fastrl_dppo or fastrl_cispo with "
            "cispo.cispo_anchor='rollout': no stale policy is kept for old log-probs",
        )
