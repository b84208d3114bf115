"""From a batch that TRL has scored to `Rollouts`, and the denominators of TRL's losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.adapters.trl.config import refuse
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec

FORWARD_KEYS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
"""What a vision-language model is called with besides ids and mask."""

_COMMON = {
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch", *FORWARD_KEYS
}  # fmt: skip
_KEYS = {
    "GRPO": _COMMON
    | {
        "tool_mask", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps",
        "importance_sampling_ratio",
    },
    "RLOO": _COMMON | {"old_logps"},
}  # fmt: skip


def check_keys(inputs: dict[str, Any], kind: str) -> None:
    """Raise ValueError for an input that this adapter does not know; None is no input."""
    unknown = sorted(key for key, value in inputs.items() if key not in _KEYS[kind] and value is not None)
    if unknown:
        expected = f"the inputs of TRL 1.16's {kind}Trainer"
        raise ValueError(f"inputs: expected {expected}, got {unknown} too, which the loss would ignore; remove them")


def rollouts_from_batch(inputs: dict[str, Any], *, weighted: bool | None = None) -> Rollouts:
    """The scored batch of a `GRPOTrainer` as `Rollouts` over the completion tokens.

    mask = completion_mask·tool_mask; old_logps, ref_logps and rollout_logps are old_, ref_ and
    sampling_per_token_logps; rollout_weights is importance_sampling_ratio, (B, T) or (B, 1).

    Args:
        inputs: TRL's batch.
        weighted: whether the loss is multiplied by importance_sampling_ratio; None = if it is there.

    Raises:
        ValueError: an input that is not known, or a ratio that is missing.
    """
    check_keys(inputs, "GRPO")
    mask = inputs["completion_mask"]
    if inputs.get("tool_mask") is not None:
        mask = mask * inputs["tool_mask"]
    weights = inputs.get("importance_sampling_ratio")
    if weighted and weights is None:
        remedy = "score the batch with vLLM's log-probs, or set vllm_importance_sampling_correction=False"
        refuse("importance_sampling_ratio", None, remedy)
    if weights is not None:
        weights = weights.expand(mask.shape) if weighted is not False else None
    return Rollouts(
        inputs["completion_ids"],
        mask,
        inputs["advantages"],
        old_logps=inputs.get("old_per_token_logps"),
        ref_logps=inputs.get("ref_per_token_logps"),
        rollout_logps=inputs.get("sampling_per_token_logps"),
        rollout_weights=weights,
    )


def rloo_rollouts_from_batch(inputs: dict[str, Any]) -> Rollouts:
    """The scored batch of an `RLOOTrainer`; its old_logps (B,) are sums over the completion."""
    check_keys(inputs, "RLOO")
    mask = inputs["completion_mask"]
    old = _spread(inputs["old_logps"], mask)
    return Rollouts(inputs["completion_ids"], mask, inputs["advantages"], old_logps=old)


def _spread(total: Tensor, mask: Tensor) -> Tensor:
    """(B,) sums -> (B, T) log-probs that add up to them over the mask, nearly equal ones.

    Only their sum enters the ratio. The first token takes what the rounding of the others left.
    """
    valid = mask != 0
    share = (total / valid.sum(-1).clamp_min(1)).unsqueeze(-1) * valid
    first = valid & (valid.cumsum(-1) == 1)
    rest = torch.where(first, 0.0, share).double().sum(-1)
    return torch.where(first, (total.double() - rest).to(share.dtype).unsqueeze(-1), share)


def normalizer(trainer: Any, inputs: dict[str, Any], rollouts: Rollouts, spec: LossSpec) -> Tensor | float:
    """The denominator D of TRL's loss on this micro-batch, gradient accumulation included where TRL includes it.

    All sequences, empty ones too (grpo, sapo, dr_grpo, luspo, RLOO); the local tokens (bnpo); or the share of a
    process and an accumulation window in the tokens of the generation batch (dapo, cispo, vespo).
    """
    if trainer_kind(trainer) == "RLOO":  # transformers divides by the accumulation
        return float(rollouts.num_sequences)
    steps = accumulation(trainer)
    if trainer.loss_type in ("dapo", "cispo", "vespo"):
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        return tokens * (steps / trainer.args.steps_per_generation) if trainer.model.training else tokens
    if trainer.loss_type == "bnpo":
        return rollouts.normalizer(spec) * steps
    return float(rollouts.num_sequences * steps)


def accumulation(trainer: Any) -> int:
    """The micro-batches of this optimizer step; 1 in evaluation."""
    if not trainer.model.training:
        return 1
    # transformers sets the attribute when training starts
    return getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)


def trainer_kind(trainer: Any) -> str:
    """GRPO or RLOO."""
    return "GRPO" if hasattr(trainer, "loss_type") else "RLOO"
