"""The loss inside `transformers.Trainer`, on rollouts that somebody logged: prompts, completions, the log-probs they
were sampled with, and rewards; with an objective of one's own. Exits with 1 if the reward stays low.

`--from-logits` takes the plain `Trainer` with `compute_loss_func` instead of `PolicyTrainer`, which never has logits.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from arithmetic import build_model, build_tokenizer, prompts, quiet_libraries, reward
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

import fastrl
from fastrl.adapters.hf import PolicyTrainer, RolloutCollator, add_advantages, compute_loss_func


def better_than_average(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """ℓ = −max(A, 0)·log r: raise what did better than its group, the usual choice for logs of a fixed policy."""
    return -advantages.clamp_min(0.0) * log_ratio


SPEC = fastrl.LossSpec(objective=better_than_average)


def logged_rollouts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """What a random policy answered: a digit, each with probability 1/10, then <eos> for certain."""
    tokenizer, rng = build_tokenizer(), random.Random(seed)
    texts = [rng.choice(prompts()) for _ in range(count)]
    answers = [str(rng.randrange(10)) for _ in texts]
    rows = [
        {
            "prompt_ids": tokenizer(text)["input_ids"],
            "completion_ids": [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id],
            "old_logps": [math.log(0.1), 0.0],
            "rewards": score,
            "group_ids": text,  # all answers to one prompt are a group
        }
        for text, answer, score in zip(texts, answers, reward(texts, answers), strict=True)
    ]
    return add_advantages(rows, SPEC)


@torch.no_grad()
def reward_of(model: Any, tokenizer: Any) -> float:
    torch.manual_seed(0)
    texts = prompts() * 8
    ids = tokenizer(texts, return_tensors="pt")["input_ids"].to(model.device)
    out = model.generate(ids, max_new_tokens=2, do_sample=True, top_k=0)
    answers = [a.replace(" ", "") for a in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]
    return sum(reward(texts, answers)) / len(texts)


def build_trainer(model: Any, args: TrainingArguments, rows: list[dict[str, Any]], from_logits: bool) -> Trainer:
    if not from_logits:
        return PolicyTrainer(model, args, spec=SPEC, train_dataset=rows)
    collator = RolloutCollator(spec=SPEC)
    return Trainer(model, args, collator, rows, compute_loss_func=compute_loss_func(SPEC))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--from-logits", action="store_true", help="the plain Trainer with compute_loss_func")
    options = parser.parse_args(arguments)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build_model(Path(folder)), build_tokenizer()
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,  # the same gradients as one batch of 64
            learning_rate=2e-3,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the columns are the collator's, not the model's
            dataloader_pin_memory=False,
        )
        trainer = build_trainer(model, args, logged_rollouts(options.rollouts), options.from_logits)
        trainer.remove_callback(PrinterCallback)
        before = reward_of(model, tokenizer)
        trainer.train()
        after = reward_of(model, tokenizer)
    if options.from_logits:
        entropy = trainer.compute_loss_func.pop_metrics()["entropy"]
    else:
        entropy = next(log["fastrl/entropy"] for log in reversed(trainer.state.log_history) if "fastrl/entropy" in log)
    print(f"reward {before:.3f} before, {after:.3f} after; entropy {entropy:.3f}")
    return 0 if after > before + 0.3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
