"""Tiny models, real TRL trainers and scored batches, and one loss by TRL and by fastrl on the same trainer."""

from __future__ import annotations

import math
import tempfile
from typing import Any, NamedTuple

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback

from fastrl.adapters.trl import use_fastrl

VOCAB, B, P, T = 40, 6, 3, 8
LENGTHS = (8, 7, 5, 3, 1, 0)  # the last completion is empty
SEED = 1
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def tokenizer(named: tuple[str, ...] = (), **options: Any) -> PreTrainedTokenizerFast:
    """One word per id; `named` are the words of the last ids, the last first, which need no space around them."""
    names = ["<pad>", "<eos>", *(f"t{i}" for i in range(2, VOCAB - len(named))), *reversed(named)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        "padding_side": "left",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "additional_special_tokens": list(named),
    }
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, **options)


def model(name: str = "Qwen2", **extra: Any) -> Any:
    """A causal language model with a head peaked enough for ratios and entropies to vary."""
    torch.manual_seed(0)
    text = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, name + text)(**{**SMALL, **extra})
    it = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in it.get_output_embeddings().parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return it


def no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


_GIVEN = ("level", "peft_config", "rollout_func", "tools", "processing_class", "train_dataset", "eval_dataset")


def trainer(cls: Any, policy: Any, *, reference: Any = None, reward: Any = no_reward, rows: int = 8, **options: Any):
    """A trainer around `policy`; what its constructor takes besides the config goes by the names in `_GIVEN`."""
    given = {
        "processing_class": tokenizer(),
        "train_dataset": Dataset.from_dict({"prompt": ["t2 t3"] * rows}),
        "eval_dataset": Dataset.from_dict({"prompt": ["t4 t3"]}),
    } | {name: options.pop(name) for name in _GIVEN if name in options}
    config = trl.RLOOConfig if issubclass(cls, trl.RLOOTrainer) else trl.GRPOConfig
    settings = {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": B,
        "per_device_eval_batch_size": B,
        "num_generations": B,
        "max_completion_length": T,
        "beta": 0.0,  # else it would load its reference model from a hub
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    it = cls(
        model=policy,
        reward_funcs=reward,
        args=config(**settings | options),
        **given,
    )
    it.remove_callback(PrinterCallback)
    it.current_gradient_accumulation_steps = it.args.gradient_accumulation_steps
    it.model.train()
    return it


IMAGE = 39  # the placeholder's id, which only prompts hold


def scored_batch(it: Any, images: dict[str, Any] | None = None) -> dict[str, Any]:
    """A batch as TRL scores it, with everything that it may hold; log-probs of other policies are the model's own with
    noise. `images` is what a vision-language model gets besides; every prompt then ends with a placeholder."""
    forward = images or {}
    g = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(2, 36, (B, P), generator=g)
    completion = torch.randint(2, 36, (B, T), generator=g)
    if images:
        prompt[:, -1] = IMAGE
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]).repeat(2, 1)
    ids, attention = torch.cat([prompt, completion], 1), torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        logps, _, _ = it._get_per_token_logps_and_entropies(it.model, ids, attention, T, **forward)
    logps = logps.float()
    noise = 0.4 * torch.randn(4, B, T, generator=g)
    sampling = logps + noise[2]
    sampling[0, 0] = torch.nan  # not scored by the sampler
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": mask,
        "tool_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1, 1]]).repeat(3, 1),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.9, 0.6, -2.0]),
        "num_items_in_batch": torch.tensor(29.0),
        "old_per_token_logps": logps + noise[0],
        "ref_per_token_logps": logps + noise[1],
        "sampling_per_token_logps": sampling,
        "importance_sampling_ratio": (noise[3] * mask).exp(),
        "old_logps": ((logps + noise[0]) * mask).sum(-1),
        **forward,
    }


def grpo_batch(it: Any, images: dict[str, Any] | None = None) -> dict[str, Any]:
    """A `scored_batch` as a GRPO trainer without vLLM's correction has it."""
    batch = scored_batch(it, images)
    return {name: value for name, value in batch.items() if name not in ("old_logps", "importance_sampling_ratio")}


def rloo_batch(it: Any, images: dict[str, Any] | None = None) -> dict[str, Any]:
    """A `scored_batch` as an RLOO trainer has it, whose old log-probs are those of whole completions."""
    batch, other = scored_batch(it, images), ("tool_mask", "importance_sampling_ratio")
    return {name: value for name, value in batch.items() if name not in other and not name.endswith("token_logps")}


class Result(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def run(it: Any, inputs: dict[str, Any], train: bool = True, through: Any = None) -> Result:
    """The loss of the trainer as it stands, its gradients in every parameter, and what it logged."""
    it.model.train(train)
    it.model.zero_grad()
    for log in it._metrics.values():
        log.clear()
    with torch.set_grad_enabled(train):
        loss = it._compute_loss(it.model if through is None else through, dict(inputs))
    if train:
        loss.backward()
    named = it.model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    logged = it._metrics["train" if train else "eval"]
    return Result(loss.detach(), gradients, {name: values[-1] for name, values in logged.items()})


def both(
    it: Any, inputs: dict[str, Any], train: bool = True, level: str = "hidden", through: Any = None
) -> tuple[Result, Result]:
    """(TRL's, fastrl's) on one trainer, from the same state of the adaptive entropy bonus; `through`: its model, wrapped."""
    names = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
    state = {name: getattr(it, name) for name in names if hasattr(it, name)}
    theirs = run(it, inputs, train, through)
    after = {name: getattr(it, name) for name in state}
    vars(it).update(state)
    plugin = use_fastrl(it, level=level)
    try:
        ours = run(it, inputs, train, through)
    finally:
        plugin.restore()
    for name, value in after.items():
        torch.testing.assert_close(getattr(it, name), value, rtol=1e-5, atol=1e-6, msg=name)
    return theirs, ours


def differences(theirs: Result, ours: Result, rtol: float = 2e-5) -> list[str]:
    """What differs beyond rounding: the loss, gradients against the largest of all, and metrics by name and value."""
    found = []
    scale = max([1e-3, *(g.abs().max().item() for g in theirs.gradients.values())])
    if not abs(theirs.loss - ours.loss) <= rtol * max(1.0, abs(theirs.loss)):
        found.append(f"loss {theirs.loss:.7g} {ours.loss:.7g}")
    if theirs.gradients.keys() != ours.gradients.keys():
        found.append(f"gradients of {sorted(theirs.gradients.keys() ^ ours.gradients.keys())}")
    else:
        for name, gradient in theirs.gradients.items():
            error = (gradient - ours.gradients[name]).abs().max().item()
            if not error <= rtol * scale:
                found.append(f"gradient of {name} {error / scale:.3g}")
    own = {name: value for name, value in ours.metrics.items() if not name.startswith("fastrl/")}
    if own.keys() != theirs.metrics.keys():
        found.append(f"metrics {sorted(own.keys() ^ theirs.metrics.keys())}")
    for name in own.keys() & theirs.metrics.keys():
        a, b = theirs.metrics[name], own[name]
        if not (abs(a - b) <= 5 * rtol * max(abs(a), 0.05) or (math.isnan(a) and math.isnan(b))):
            found.append(f"{name} {a:.7g} {b:.7g}")
    return found
