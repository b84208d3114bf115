"""The loss inside plain `transformers.Trainer`, on rollouts that somebody logged: prompts, completions, the log-probs
they were sampled with, and rewards; with an objective of one's own. Exits with 1 if the reward stays low."""

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


def better_than_average(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """ℓ = −max(A, 0)·log r: raise what did better than its group, the usual choice for logs of a fixed policy."""
    return -advantages.clamp_min(0.0) * log_ratio


SPEC = fastrl.LossSpec(objective=better_than_average)


def logged_rollouts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """What a random policy answered: a digit, each with probability 1/10, then <eos> for certain."""
    tokenizer, rng = build_tokenizer(), random.Random(seed)
    texts = [rng.choice(prompts()) for _ in range(count)]
    answers = [str(rng.randrange(10)) for _ in texts]
    advantages = fastrl.group_advantages(
        torch.tensor(reward(texts, answers)), group_ids=torch.tensor([prompts().index(text) for text in texts])
    )
    rows = []
    for text, answer, advantage in zip(texts, answers, advantages.tolist(), strict=True):
        prompt = tokenizer(text)["input_ids"]
        ids = [*prompt, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        rows.append(
            {
                "input_ids": ids,
                "loss_mask": [0] * len(prompt) + [1, 1],
                "old_logps": [0.0] * len(prompt) + [math.log(0.1), 0.0],
                "advantages": advantage,
            }
        )
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded batch; anything may stand where loss_mask is 0."""
    width = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: float) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    return {
        "input_ids": pad("input_ids", 0),
        "attention_mask": torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows]),
        "loss_mask": pad("loss_mask", 0),
        "old_logps": pad("old_logps", 0.0),
        "advantages": torch.tensor([row["advantages"] for row in rows]),
    }


class PolicyTrainer(Trainer):
    """`Trainer` whose loss is the policy loss, fused from hidden states."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        hidden = model.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
        states, ids, mask = fastrl.shift_for_next_token(hidden, inputs["input_ids"], inputs["loss_mask"])
        rollouts = fastrl.Rollouts(ids, mask, inputs["advantages"], old_logps=inputs["old_logps"][:, 1:])
        head = fastrl.LMHead.from_model(model)
        out = fastrl.policy_loss_from_hidden(states, head, rollouts, SPEC, normalizer=num_items_in_batch)
        if self.state.global_step % self.args.logging_steps == 0:
            self.log({f"fastrl/{name}": value for name, value in out.metrics.to_floats().items()})
        return (out.loss, {"logps": out.logps}) if return_outputs else out.loss


@torch.no_grad()
def reward_of(model: Any, tokenizer: Any) -> float:
    torch.manual_seed(0)
    texts = prompts() * 8
    ids = tokenizer(texts, return_tensors="pt")["input_ids"].to(model.device)
    out = model.generate(ids, max_new_tokens=2, do_sample=True, top_k=0)
    answers = [a.replace(" ", "") for a in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]
    return sum(reward(texts, answers)) / len(texts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build_model(Path(folder)), build_tokenizer()
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        data = logged_rollouts(options.rollouts)
        trainer = PolicyTrainer(model=model, args=args, train_dataset=data, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        before = reward_of(model, tokenizer)
        trainer.train()
        after = reward_of(model, tokenizer)
    entropy = next(
        entry["fastrl/entropy"] for entry in reversed(trainer.state.log_history) if "fastrl/entropy" in entry
    )
    print(f"reward {before:.3f} before, {after:.3f} after; entropy {entropy:.3f}")
    return 0 if after > before + 0.3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
