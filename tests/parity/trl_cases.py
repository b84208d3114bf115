"""TRL 1.16: `_compute_loss` of its GRPO, GMPO and RLOO trainers over loss types and options, and the `LossSpec` of each.

The trainers are real, around a two-layer model; only generation and the forward pass are replaced, by the batch.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from parity.batches import LENGTHS, B, Batch, Case, Result, T
from torch import Tensor


@functools.cache
def trainer(kind: str = "GRPO"):
    """The trainer that all cases of a kind share."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    config, cls = {
        "GRPO": (trl.GRPOConfig, trl.GRPOTrainer),
        "RLOO": (trl.RLOOConfig, trl.RLOOTrainer),
        "GMPO": (GMPOConfig, GMPOTrainer),
    }[kind]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, bos_token_id=None, **sizes, **heads))
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "word": 2}, unk_token="<pad>"))
    args = config(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=B,
        num_generations=B // 2,
        max_completion_length=T,
        beta=0.0,  # else it would load its reference model from a hub
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return cls(
        model=model,
        reward_funcs=[_no_reward, _no_reward],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["word"] * B}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )


def _no_reward(completions, **_):
    return [0.0] * len(completions)


_ATTRIBUTES = {  # of the trainer, read from its arguments once; everything else is read from `args` when needed
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_vllm": False,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 3.0,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "normalize_advantages": False,
    "current_gradient_accumulation_steps": 1,
}

_ARGUMENTS = {
    "delta": None,
    "use_bias_correction_kl": False,
    "steps_per_generation": 1,
    "sapo_temperature_neg": 1.25,  # its default 1.05 becomes a float32 on the way
}


def configured(kind: str, options: dict[str, Any]):
    """The shared trainer with these options and every other at its default."""
    it = trainer(kind)
    it.model.train()
    for name, default in _ATTRIBUTES.items():
        setattr(it, name, options.get(name, default))
    for name, default in _ARGUMENTS.items():
        setattr(it.args, name, options.get(name, default))
    it._entropy_bonus_enabled = it.entropy_coef != 0
    it.ref_model = it.model
    return it


def scored(it, batch: Batch, rewards: Tensor | None = None) -> dict[str, Any]:
    """TRL's own scoring of generated completions: advantages of `rewards` (B, K), and its sampler correction."""
    lists = {"ids": torch.full((B, T), 3), "tools": batch.tools, "sampled": batch.rollout}
    lists = {name: [row[:n].tolist() for row, n in zip(x, LENGTHS, strict=True)] for name, x in lists.items()}
    completions = lists["ids"], lists["tools"], ["word"] * B, lists["sampled"]
    if hasattr(it, "vllm_importance_sampling_correction"):
        generated = ([[2]] * B, *completions, {}, None, None)
    else:
        generated = [[2]] * B, lists["ids"], ["word"] * B
    it._generate = lambda prompts: generated
    it._get_per_token_logps_and_entropies = lambda *_, **__: (batch.old, None, None)
    it._calculate_rewards = lambda *_: torch.zeros(B, 2, dtype=torch.float64) if rewards is None else rewards
    return it._generate_and_score_completions([{"prompt": "word"}] * B)


def trl_loss(kind: str = "GRPO", *, sampler: bool = False, **options: Any) -> Callable[[Batch], Result]:
    """`_compute_loss` on the batch's leaves; with `sampler`, its log-probs are among the inputs."""

    def run(batch: Batch) -> Result:
        it = configured(kind, options)
        inputs = {
            "prompt_ids": torch.full((B, 1), 2),
            "prompt_mask": torch.ones(B, 1).long(),
            "completion_ids": torch.full((B, T), 3),
            "completion_mask": batch.completion if kind != "RLOO" else batch.mask,
            "tool_mask": batch.tools,
            "advantages": batch.advantages,
            "num_items_in_batch": torch.tensor(29.0, dtype=torch.float64),
            "ref_per_token_logps": batch.ref,
        }
        if batch.old is not None:
            inputs["old_per_token_logps"] = batch.old
            inputs["old_logps"] = (batch.old * batch.mask).sum(1)
        if sampler:
            inputs["sampling_per_token_logps"] = batch.rollout
        if it.use_vllm:
            inputs["importance_sampling_ratio"] = scored(it, batch)["importance_sampling_ratio"]
        logps, entropy = batch.leaves()
        it._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropy, None)
        return Result.of(it._compute_loss(it.model, inputs), logps, entropy)

    return run


def _items(batch: Batch) -> float:
    return 29.0


def _sequences(batch: Batch) -> float:
    return float(B)


LOSS_TYPES: dict[str, tuple[dict[str, Any], Callable[[Batch], float] | None]] = {
    "grpo": ({"aggregation": "seq-mean-token-mean"}, _sequences),
    "bnpo": ({}, None),
    "dr_grpo": ({"aggregation": "seq-mean-token-sum-norm", "max_length": T}, _sequences),
    "dapo": ({}, _items),
    "luspo": ({"aggregation": "seq-mean-token-sum"}, _sequences),
    "cispo": ({"objective": "cispo", "epsilon_low": None, "epsilon_high": 0.1}, _items),
    "sapo": (
        {"objective": "sapo", "aggregation": "seq-mean-token-mean", "sapo_temperature_negative": 1.25},
        _sequences,
    ),
    "vespo": ({"objective": "vespo", "log_ratio_clamp": 20.0}, _items),
}
_SEQUENCE = {"importance_sampling_level": "sequence"}, {"ratio_level": "sequence"}
_KL = {"beta": 0.3}, {"kl_coef": 0.3}
_BIAS = {"beta": 0.3, "use_bias_correction_kl": True}, {"kl_coef": 0.3, "kl_gradient": "importance_weighted"}
_DELTA = {"delta": 1.3}, {"delta": 1.3}
_ENTROPY_MASK = {"top_entropy_quantile": 0.4}, {"top_entropy_quantile": 0.4}
_MOST_ENTROPY = {"top_entropy_quantile": 0.8}, {"top_entropy_quantile": 0.8}
_OPSM = {"off_policy_mask_threshold": 0.1}, {"off_policy_threshold": 0.1}
_OPSM_OLD = {"off_policy_mask_threshold": 0.3}, {"off_policy_threshold": 0.3}


def _correction(level: str, mode: str, low: float | None, high: float) -> tuple[dict[str, Any], dict[str, Any]]:
    bounds = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    theirs = {"use_vllm": True, "vllm_importance_sampling_mode": f"{level}_{mode}", **bounds}
    return theirs, {"rollout": {"level": level, "mode": mode, "lower": low, "upper": high}}


_TRUNCATE = _correction("token", "truncate", 0.97, 1.3)
_ICEPOP = _correction("token", "mask", 0.8, 1.3)


def _both(*options: tuple[dict[str, Any], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    theirs = {name: value for option in options for name, value in option[0].items()}
    return theirs, {name: value for option in options for name, value in option[1].items()}


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # theirs, ours, the batch
    "plain": ({}, {}, {}),
    "no-tools": ({}, {}, {"tools": False}),
    "on-policy": ({}, {}, {"old": False}),
    "token-advantages": ({}, {}, {"token_advantages": True}),
    "sequence": (*_SEQUENCE, {}),
    "delta": (*_DELTA, {}),
    "sequence-delta": (*_both(_SEQUENCE, _DELTA), {"token_advantages": True}),
    "kl": (*_KL, {}),
    "bias-corrected-kl": (*_BIAS, {}),
    "bias-corrected-kl-delta": (*_both(_BIAS, _DELTA), {}),
    "sequence-kl": (*_both(_SEQUENCE, _KL), {}),
    "sequence-bias-corrected-kl": (*_both(_SEQUENCE, _BIAS), {}),
    "entropy-mask": (*_ENTROPY_MASK, {}),
    "sequence-entropy-mask": (*_both(_SEQUENCE, _ENTROPY_MASK), {}),
    "off-policy-mask": (*_OPSM_OLD, {}),
    "sampler-off-policy-mask": (*_OPSM, {"nan": True}),
    "token-truncate": (*_TRUNCATE, {"nan": True}),
    "token-mask": (*_ICEPOP, {"nan": True}),
    "sequence-truncate": (*_correction("sequence", "truncate", 0.7, 1.5), {"nan": True}),
    "sequence-mask": (*_correction("sequence", "mask", 0.7, 2.5), {"nan": True}),
    "sequence-token-truncate": (*_both(_SEQUENCE, _TRUNCATE), {"nan": True}),
    "everything": (*_both(_BIAS, _MOST_ENTROPY, _OPSM, _TRUNCATE), {"nan": True}),
}
_UNCLIPPED = ("cispo", "sapo", "vespo")


def _meaningful(loss_type: str, option: str) -> bool:
    """VESPO has a sequence ratio of its own; only the clipped losses have a delta."""
    no_sequence = loss_type == "vespo" and option.startswith("sequence")
    return not (no_sequence or (loss_type in _UNCLIPPED and "delta" in option))


CASES: dict[str, Case] = {}
for loss_type, (spec, normalizer) in LOSS_TYPES.items():
    epsilon = {"epsilon_high": 1.1} if loss_type == "cispo" else {}  # TRL's is the bound itself
    for option, (theirs, ours, batch) in OPTIONS.items():
        if _meaningful(loss_type, option):
            sampler = bool(batch.get("nan"))
            CASES[f"{loss_type}-{option}"] = Case(
                trl_loss(loss_type=loss_type, sampler=sampler, **epsilon, **theirs),
                {"log_ratio_clamp": None, **spec, **ours},
                normalizer=normalizer,
                batch=batch,
                sampler=sampler,
            )
CASES |= {
    "clip-higher": Case(trl_loss(loss_type="bnpo", epsilon_high=0.28), {"epsilon_high": 0.28, "log_ratio_clamp": None}),
    "cispo-cap-below-1": Case(  # TRL's default epsilon, 0.2, is then the cap itself
        trl_loss(loss_type="cispo"),
        {"objective": "cispo", "epsilon_low": None, "epsilon_high": 0.2 - 1, "log_ratio_clamp": None},
        normalizer=_items,
    ),
    "extreme": Case(trl_loss(loss_type="bnpo"), {"log_ratio_clamp": None}, batch={"extreme": "ratio"}),
    "vespo-extreme": Case(
        trl_loss(loss_type="vespo"),
        {"objective": "vespo", "log_ratio_clamp": 20.0},
        normalizer=_items,
        batch={"extreme": "ratio"},
    ),
    "entropy-bonus": Case(trl_loss(loss_type="bnpo", entropy_coef=0.2), {"entropy_coef": 0.2, "log_ratio_clamp": None}),
    "grpo-accumulated": Case(
        trl_loss(current_gradient_accumulation_steps=4, steps_per_generation=2),
        {"aggregation": "seq-mean-token-mean", "log_ratio_clamp": None},
        normalizer=lambda _: 4.0 * B,
    ),
    "dapo-accumulated": Case(
        trl_loss(loss_type="dapo", current_gradient_accumulation_steps=4, steps_per_generation=2),
        {"log_ratio_clamp": None},
        normalizer=lambda _: 29.0 * 4 / 2,
    ),
    "bnpo-accumulated": Case(
        trl_loss(loss_type="bnpo", current_gradient_accumulation_steps=3),
        {"log_ratio_clamp": None},
        normalizer=lambda batch: 3.0 * batch.tokens,
    ),
    "rloo": Case(
        trl_loss("RLOO"),
        {"ratio_level": "sequence_sum", "aggregation": "seq-mean-token-mean", "log_ratio_clamp": None},
        normalizer=_sequences,
        batch={"empty": False},
    ),
}
_GMPO = {"objective": "gmpo", "ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "log_ratio_clamp": None}
for option, (theirs, ours) in {
    "plain": ({}, {}),
    "on-policy": ({}, {}),
    "kl": _KL,
    "asymmetric": ({"epsilon_low": 0.1, "epsilon_high": 0.4}, {"epsilon_low": 0.1, "epsilon_high": 0.4}),
}.items():
    batch = {"old": option != "on-policy", "empty": False}
    CASES[f"gmpo-{option}"] = Case(trl_loss("GMPO", **theirs), {**_GMPO, **ours}, normalizer=_sequences, batch=batch)
