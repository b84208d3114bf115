"""GRPO in a loop of one's own: plain PyTorch and a Hugging Face model. Exits with 1 if the reward stays low."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from arithmetic import build_model, build_tokenizer, prompts, quiet_libraries, reward
from rich.progress import track

import fastrl

GROUP = 16  # answers per prompt
SPEC = fastrl.LossSpec.preset("dapo", entropy_coef=0.01)


@torch.no_grad()
def sample(model, tokenizer, texts: list[str], length: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt and completion ids (B, P + T), the completion mask (B, T) up to and including <eos>, and rewards (B,)."""
    prompt = tokenizer(texts, return_tensors="pt")["input_ids"]  # all prompts have one length here
    ids = model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=True, top_k=0)
    completion = ids[:, prompt.shape[1] :]
    ended = (completion == tokenizer.eos_token_id).cumsum(1)
    mask = ended - (completion == tokenizer.eos_token_id).long() == 0
    answers = [
        tokenizer.decode(c[m], skip_special_tokens=True).replace(" ", "") for c, m in zip(completion, mask, strict=True)
    ]
    return ids, mask, torch.tensor(reward(texts, answers))


def hidden_states(model, ids: torch.Tensor, completion: int) -> torch.Tensor:
    """The states that score the completion tokens: position t of the model scores token t + 1."""
    return model.base_model(input_ids=ids).last_hidden_state[:, -completion - 1 : -1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build_model(Path(folder)), build_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for step in track(range(steps), "hand-written loop"):
        rng = torch.Generator().manual_seed(step)
        chosen = torch.randperm(len(prompts()), generator=rng)[:8].tolist()
        texts = [prompts()[i] for i in chosen for _ in range(GROUP)]
        ids, mask, rewards = sample(model, tokenizer, texts)
        T = mask.shape[1]
        with torch.no_grad():
            head = fastrl.LMHead.from_model(model)
            old = fastrl.logprobs_from_hidden(hidden_states(model, ids, T), head, ids[:, -T:], mask=mask).logps
        rollouts = fastrl.Rollouts(ids[:, -T:], mask, rewards=rewards, group_size=GROUP, old_logps=old)
        for _ in range(2):  # two optimiser steps per batch of rollouts: the second is off-policy, and clipped
            out = fastrl.policy_loss_from_hidden(hidden_states(model, ids, T), head, rollouts, SPEC)
            optimizer.zero_grad()
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        history.append(rewards.mean().item())
    before, after = sum(history[:10]) / 10, sum(history[-10:]) / 10
    entropy, clipped = float(out.metrics["entropy"]), float(out.metrics["clip_fraction"])
    print(f"reward {before:.3f} before, {after:.3f} after; entropy {entropy:.3f}, clipped {clipped:.3f}")
    return 0 if after > before + 0.3 else 1


if __name__ == "__main__":
    raise SystemExit(main())
