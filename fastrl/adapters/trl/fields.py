"""Which fields of TRL's configs there are: a field in neither table of its config is refused, not ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

_RLOO_READ = {"epsilon", "epsilon_high", "temperature", "router_aux_loss_coef"}
_GRPO_READ = _RLOO_READ | {
    "beta", "use_bias_correction_kl", "delta", "loss_type", "importance_sampling_level", "max_completion_length",
    "steps_per_generation", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos",
    "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
    "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target", "off_policy_mask_threshold",
    "use_vllm", "vllm_importance_sampling_correction", "cast_lm_head_to_fp32",
}  # fmt: skip

# Fields that act before the loss (generation, rewards, scoring, data) or around it (logging), in TRL's own code.
_ELSEWHERE = {
    "model_init_kwargs", "trust_remote_code", "disable_dropout", "num_generations", "num_generations_eval",
    "ds3_gather_for_generation", "shuffle_dataset", "pad_to_multiple_of", "generation_batch_size", "generation_kwargs",
    "chat_template_kwargs", "repetition_penalty", "cache_implementation", "num_iterations", "reward_weights",
    "mask_truncated_completions", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
    "top_p", "top_k", "min_p", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
    "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length",
    "vllm_tensor_parallel_size",
}  # fmt: skip
_GRPO_ELSEWHERE = _ELSEWHERE | {
    "scale_rewards", "multi_objective_aggregation", "max_tool_calling_iterations", "log_completions_hub_repo",
    # The ratio that they shape reaches the loss as inputs["importance_sampling_ratio"].
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
}  # fmt: skip
# RLOO subtracts its KL from the reward.
_RLOO_ELSEWHERE = _ELSEWHERE | {
    "beta", "max_completion_length", "steps_per_generation", "use_vllm", "normalize_advantages", "reward_clip_range",
}  # fmt: skip

KNOWN = {"GRPO": _GRPO_READ | _GRPO_ELSEWHERE, "RLOO": _RLOO_READ | _RLOO_ELSEWHERE}


def check_fields(args: Any, kind: str) -> None:
    """Raise ValueError for a field of `args` that neither transformers' TrainingArguments nor `KNOWN[kind]` has."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(args):
        if field.name not in inherited and field.name not in KNOWN[kind]:
            raise ValueError(
                f"{field.name}: expected a field of TRL 1.16's {kind}Config, got one that fastrl.adapters.trl does not "
                f"know (value {getattr(args, field.name)!r}); install trl 1.16, or use TRL's own {kind}Trainer"
            )
