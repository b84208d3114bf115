"""TRL's entropy bonus around the loss: its metrics and the adaptive coefficient, kept in the trainer's own state."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.adapters.trl.batch import accumulation
from fastrl.adapters.trl.metrics import append
from fastrl.controllers import AdaptiveEntropyController
from fastrl.functional import LossOutput
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec
from fastrl.token_metrics import TokenMetrics

_NAMES = {
    "initial": "entropy_coef",
    "target": "entropy_target",
    "delta": "entropy_coef_delta",
    "minimum": "entropy_coef_min",
    "maximum": "entropy_coef_max",
}


def controller(trainer: Any) -> AdaptiveEntropyController:
    """The rule of use_adaptive_entropy at the trainer's present coefficient.

    Raises:
        ValueError, TypeError: naming the option whose value has no meaning.
    """
    args = trainer.args
    bounds = args.entropy_target, args.entropy_coef_delta, args.entropy_coef_min, args.entropy_coef_max
    try:
        return AdaptiveEntropyController(trainer.entropy_coef, *bounds)
    except (ValueError, TypeError) as error:
        name, colon, rest = str(error).partition(":")
        raise type(error)(f"{_NAMES.get(name, name)}{colon}{rest}") from None


def account(trainer: Any, out: LossOutput, rollouts: Rollouts, spec: LossSpec, tokens: TokenMetrics) -> None:
    """Log policy_loss and entropy_coef, and steer the coefficient at the end of an optimizer step.

    policy_loss is the loss without the bonus, and without the accumulation where TRL divides by it last.
    """
    mask = rollouts.flat.valid().view(rollouts.shape)
    if tokens.high_entropy is not None:
        mask = mask & tokens.high_entropy
    stats = torch.stack([torch.where(mask, out.entropy, 0.0).sum(), mask.sum().to(out.entropy.dtype)])
    policy_loss = out.loss.detach() + spec.entropy_coef * stats[0] / stats[1].clamp(min=1.0)
    if trainer.loss_type not in ("dapo", "cispo", "vespo"):
        policy_loss = policy_loss * accumulation(trainer)
    append(trainer, {"policy_loss": trainer.accelerator.gather(policy_loss).nanmean()})
    if not trainer.model.training:
        return
    if trainer.use_adaptive_entropy:
        _steer(trainer, stats)
    if trainer.accelerator.sync_gradients:
        trainer._metrics["train"]["entropy_coef"].append(trainer.entropy_coef)


def _steer(trainer: Any, stats: torch.Tensor) -> None:
    """Add (entropy, tokens) to the accumulation window; at its end, one step of the controller over all processes."""
    window = trainer._entropy_window_stats
    trainer._entropy_window_stats = stats if window is None else window + stats
    if not trainer.accelerator.sync_gradients:
        return
    total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum")
    rule = controller(trainer)
    rule.update(total / count.clamp(min=1.0))
    trainer.entropy_coef, trainer._last_world_entropy = rule.coefficient, rule.last_entropy
    trainer._entropy_window_stats = None
