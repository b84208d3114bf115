"""Tiny models, logged rollouts and one optimiser step of a real `transformers.Trainer`, for tests/test_hf*.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

import fastrl
from fastrl.adapters.hf import PolicyTrainer, RolloutCollator, compute_loss_func

VOCABULARY = 23
TEMPERATURE = 0.8


def build_model(config: Any = None) -> Any:
    """Two layers, peaked enough for ratios and entropies to vary."""
    torch.manual_seed(0)
    config = config or Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model.float()


def lora(model: Any, **options: Any) -> Any:
    """With adapters that are not 0, and the same at every call."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


def logged_rows(count: int = 8, *, ref: bool = True, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of different lengths, with holes in their masks; the last one counts nothing."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, n: int = 1) -> list[int]:
        return torch.randint(low, high, (n,), generator=g).tolist()

    rows = []
    for i in range(count):
        prompt, length = draw(1, 5)[0], draw(1, 8)[0]
        row = {
            "prompt_ids": draw(2, VOCABULARY, prompt),
            "completion_ids": draw(2, VOCABULARY, length),
            "completion_mask": [1, *draw(0, 2, length - 1)] if i < count - 1 else [0] * length,
            "advantages": torch.randn(1, generator=g).item(),
            "old_logps": (-3 + 0.5 * torch.randn(length, generator=g)).tolist(),
        }
        if ref:
            row["ref_logps"] = (-3 + 0.5 * torch.randn(length, generator=g)).tolist()
        rows.append(row)
    return rows


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    """One epoch of plain gradient descent, nothing written."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "num_train_epochs": 1, "per_device_train_batch_size": 8, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "learning_rate": 1.0, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "remove_unused_columns": False, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**defaults | options)


def build_trainer(path: str, model: Any, rows: Any, spec: fastrl.LossSpec, folder: Any, **options: Any) -> Trainer:
    """`path` is "logits" (Trainer with compute_loss_func) or "hidden" (PolicyTrainer)."""
    own = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics", "data_collator") if name in options}
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    common = {
        "model": model, "args": arguments(folder, **options), "train_dataset": rows, "optimizers": (sgd, None), **own
    }  # fmt: skip
    if path == "hidden":
        return PolicyTrainer(**common, spec=spec, temperature=TEMPERATURE)
    common.setdefault("data_collator", RolloutCollator(spec=spec))
    return Trainer(**common, compute_loss_func=compute_loss_func(spec, temperature=TEMPERATURE))


def trained_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The gradients of the one optimiser step, read off the parameters that it moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 1
    after = dict(trainer.model.named_parameters())
    return {name: before[name] - after[name].detach() for name in before if after[name].requires_grad}


def whole_batch(model: Any, rows: Any, spec: fastrl.LossSpec) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all rows at once: plain log-softmax, and `fastrl.policy_loss` on hand-made rollouts."""
    width = max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    logged = {name: torch.zeros(len(rows), width) for name in ("old_logps", "ref_logps") if name in rows[0]}
    for i, row in enumerate(rows):
        start = len(row["prompt_ids"])
        end = start + len(row["completion_ids"])
        ids[i, :end] = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        attention[i, :end] = 1
        mask[i, start:end] = torch.tensor(row["completion_mask"])
        for name, values in logged.items():
            values[i, start:end] = torch.tensor(row[name])
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float() / TEMPERATURE
    distribution = torch.log_softmax(logits, -1)
    logps = distribution.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    rollouts = fastrl.Rollouts(
        ids[:, 1:],
        mask[:, 1:],
        torch.tensor([row["advantages"] for row in rows]),
        **{name: values[:, 1:] for name, values in logged.items()},
    )
    loss = fastrl.policy_loss(logps, rollouts, spec, entropy=entropy).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert set(got) == set(want)
    largest = max(float(g.abs().max()) for g in want.values())
    assert largest > 1e-3
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance * 0.02 * largest, msg=name)
