"""TRL: `GRPOTrainer`, a drop-in subclass of TRL 1.16's whose loss is fastrl's, fused from hidden states.

    from fastrl.adapters.trl import GRPOTrainer   # instead of: from trl import GRPOTrainer

It maps a `GRPOConfig` to a `LossSpec` and a scored batch to `Rollouts`; it holds no math. An option that it does not
honour, and a field that it does not know, raise before training starts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from trl import GRPOConfig
from trl import GRPOTrainer as _GRPOTrainer

from fastrl.functional import LossOutput, policy_loss_from_hidden
from fastrl.head import LMHead
from fastrl.rollouts import Rollouts
from fastrl.spec import Aggregation, LossSpec

_AGGREGATIONS = {
    "grpo": Aggregation.SEQ_MEAN_TOKEN_MEAN,
    "bnpo": Aggregation.TOKEN_MEAN,
    "dr_grpo": Aggregation.SEQ_MEAN_TOKEN_SUM_NORM,
    "dapo": Aggregation.TOKEN_MEAN,
}

# Fields of GRPOConfig that shape the loss and are mapped by `spec_from_config`.
_MAPPED = {
    "beta", "epsilon", "epsilon_high", "delta", "loss_type", "importance_sampling_level", "max_completion_length",
    "temperature", "steps_per_generation",
}  # fmt: skip

# Fields that act before the loss (generation, rewards, data, logging) or around it, in TRL's own code.
_ELSEWHERE = {
    "learning_rate", "model_init_kwargs", "trust_remote_code", "disable_dropout", "remove_unused_columns",
    "num_generations", "num_generations_eval", "ds3_gather_for_generation", "shuffle_dataset", "pad_to_multiple_of",
    "generation_batch_size", "generation_kwargs", "chat_template_kwargs", "repetition_penalty", "cache_implementation",
    "num_iterations", "reward_weights", "multi_objective_aggregation", "scale_rewards", "mask_truncated_completions",
    "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "max_tool_calling_iterations",
    "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo",
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    "top_p", "top_k", "min_p", "router_aux_loss_coef", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
    "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "entropy_coef_min", "entropy_coef_max",
    "entropy_coef_delta", "entropy_target", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
    "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization",
    "vllm_max_model_length", "vllm_tensor_parallel_size",
}  # fmt: skip

# Options that this adapter refuses: the value that switches them off, and what to do.
_REFUSED: dict[str, tuple[Any, str]] = {
    "entropy_coef": (0.0, "leave it 0"),
    "use_adaptive_entropy": (False, "leave it False"),
    "top_entropy_quantile": (1.0, "leave it 1.0"),
    "off_policy_mask_threshold": (None, "leave it None"),
    "use_vllm": (False, "generate with transformers"),
    "cast_lm_head_to_fp32": (False, "load the model in float32"),
}

_BATCH_KEYS = {
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages", "num_items_in_batch",
    "old_per_token_logps", "ref_per_token_logps",
}  # fmt: skip


def _refuse(name: str, value: Any, remedy: str) -> None:
    raise ValueError(f"{name}: fastrl.adapters.trl does not honour {value!r}; {remedy}, or use TRL's own GRPOTrainer")


def spec_from_config(args: GRPOConfig) -> LossSpec:
    """The `LossSpec` of a `GRPOConfig`; raises ValueError naming the first option that is not honoured.

    The log-ratio is held to ±20 before exp, which TRL does not do; inside the bound the loss is the same.
    """
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(args):
        if field.name in inherited or field.name in _MAPPED | _ELSEWHERE | set(_REFUSED):
            continue
        raise ValueError(
            f"{field.name}: a GRPOConfig field that fastrl.adapters.trl does not know (written for TRL 1.16); "
            "install trl 1.16, or use TRL's own GRPOTrainer"
        )
    for name, (off, remedy) in _REFUSED.items():
        if hasattr(args, name) and getattr(args, name) != off:
            _refuse(name, getattr(args, name), remedy)
    if args.loss_type not in _AGGREGATIONS:
        _refuse("loss_type", args.loss_type, f"use one of {', '.join(map(repr, _AGGREGATIONS))}")
    if args.beta and getattr(args, "use_bias_correction_kl", False):
        _refuse("use_bias_correction_kl", True, "set it to False with beta != 0 (the plain k3 gradient)")
    norm = args.loss_type == "dr_grpo"
    return LossSpec(
        ratio_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        kl_coef=args.beta,
        aggregation=_AGGREGATIONS[args.loss_type],
        max_length=args.max_completion_length if norm else None,
    )


_MAPPED |= {"use_bias_correction_kl"}


def rollouts_from_batch(inputs: dict[str, Any]) -> Rollouts:
    """TRL's scored batch as `Rollouts` over the completion tokens."""
    unknown = {key for key, value in inputs.items() if key not in _BATCH_KEYS and value is not None}
    if unknown:
        _refuse("inputs", sorted(unknown), "train on text only")
    mask = inputs["completion_mask"]
    if inputs.get("tool_mask") is not None:
        mask = mask * inputs["tool_mask"]
    return Rollouts(
        inputs["completion_ids"],
        mask,
        inputs["advantages"],
        old_logps=inputs.get("old_per_token_logps"),
        ref_logps=inputs.get("ref_per_token_logps"),
    )


class GRPOTrainer(_GRPOTrainer):
    """TRL's `GRPOTrainer` with fastrl's loss: same constructor and config. It logs TRL's loss, entropy, kl and
    clip_ratio/{low_mean,high_mean,region_mean} (not low_min and high_max; with a sequence-level ratio no clip_ratio,
    whose mean TRL takes over sequences), and fastrl's own metrics under `fastrl/`.

    Honoured: loss_type grpo, bnpo, dr_grpo and dapo; both importance_sampling_levels; epsilon, epsilon_high, delta;
    beta with the plain k3 gradient; temperature; tool masks; gradient accumulation and num_items_in_batch; train and
    eval; autocast and gradient checkpointing. One process.

    Raises:
        ValueError: an option that is not honoured, named, before training starts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fastrl_spec = spec_from_config(self.args)
        if self.accelerator.num_processes > 1:
            _refuse("num_processes", self.accelerator.num_processes, "train in one process")
        if self.aux_loss_enabled:
            _refuse("router_aux_loss_coef", self.router_aux_loss_coef, "use a model without a router loss")
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "peft_config"):
            _refuse("peft_config", "a PEFT model", "train the full model")
        LMHead.from_model(model)  # refuses a head it cannot read now, not at the first step

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        rollouts = rollouts_from_batch(inputs)
        unwrapped = self.accelerator.unwrap_model(model)
        completion = inputs["completion_ids"].shape[1]
        with self.accelerator.autocast():
            hidden = unwrapped.base_model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                use_cache=False,
            ).last_hidden_state
            out = policy_loss_from_hidden(
                hidden[:, -completion - 1 : -1],
                LMHead.from_model(unwrapped),
                rollouts,
                self.fastrl_spec,
                temperature=self.temperature,
                normalizer=self._normalizer(rollouts, inputs),
            )
        self._log_loss(out)
        return out.loss

    def _normalizer(self, rollouts: Rollouts, inputs: dict[str, Any]) -> Tensor | float:
        """TRL's denominators: sequences, local tokens, or the tokens of the generation batch; and the accumulation."""
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        if self.args.loss_type == "dapo":
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return tokens * (accumulation / self.args.steps_per_generation if training else 1.0)
        if self.args.loss_type == "bnpo":
            return rollouts.normalizer(self.fastrl_spec) * accumulation
        return rollouts.num_sequences * accumulation

    def _log_loss(self, out: LossOutput) -> None:
        values = out.metrics.to_floats()
        log = self._metrics["train" if self.model.training else "eval"]
        log["entropy"].append(values["entropy"])
        if self.args.beta:
            log["kl"].append(values["ref_kl"])
        if self.args.importance_sampling_level == "token":
            log["clip_ratio/low_mean"].append(values["clip_fraction_low"])
            log["clip_ratio/high_mean"].append(values["clip_fraction_high"])
            log["clip_ratio/region_mean"].append(values["clip_fraction"])
        for name, value in values.items():
            log[f"fastrl/{name}"].append(value)
