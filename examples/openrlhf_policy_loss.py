"""OpenRLHF's `PolicyLoss` as fastrl has it, in a small loop that trains a Qwen2 to add.

The answers are sampled by one set of numbers and scored by another, as with vLLM: the sampler's log-probs here are
those of the model in bfloat16, and `is_correction_level="token"` weighs each token by the difference. The loss is built
and called as OpenRLHF's actor does; OpenRLHF itself is needed with `--loss openrlhf` or `both` only, for a run of its
own class from the same seed. Exits with 1 if the reward stays low.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import installed
import torch
from arithmetic import build_model, build_tokenizer, prompts, quiet_libraries
from curves import plot, rose
from hand_written_loop import GROUP, hidden_states, sample
from rich.progress import track

import fastrl
from fastrl.adapters import openrlhf as adapter

TITLES = {
    "reward": "reward (fraction right)",
    "ppo_clip_ratio": "ppo_clip_ratio",
    "ppo_kl": "ppo_kl (nats)",
    "is_filter_ratio": "is_filter_ratio",
}
OPTIONS = {
    "clip_eps_low": 0.2,
    "clip_eps_high": 0.28,
    "dual_clip": 3.0,
    "is_correction_level": "token",
    "is_correction_mode": "mask",
    "is_correction_threshold": [0.97, 1.03],
}


def train(name: str, loss_class: Any, steps: int) -> list[dict[str, float]]:
    """One entry per batch of rollouts: the reward, and what OpenRLHF logs of the second optimiser step on it."""
    actor_loss_fn = loss_class(**OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build_model(Path(folder)), build_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    log: list[dict[str, float]] = []
    torch.manual_seed(0)
    for step in track(range(steps), f"{name}'s PolicyLoss"):
        chosen = torch.randperm(len(prompts()), generator=torch.Generator().manual_seed(step))[:8].tolist()
        texts = [prompts()[i] for i in chosen for _ in range(GROUP)]
        ids, mask, rewards = sample(model, tokenizer, texts)
        head, T = fastrl.LMHead.from_model(model), mask.shape[1]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            sampler = fastrl.logprobs_from_hidden(hidden_states(model, ids, T), head, ids[:, -T:], mask=mask).logps
        given = fastrl.group_advantages(rewards, group_size=GROUP)[:, None] * mask
        old = None
        for _ in range(2):  # the second step is off-policy, and clipped
            scored = fastrl.logprobs_from_hidden(hidden_states(model, ids, T), head, ids[:, -T:], mask=mask)
            old = scored.logps.detach() if old is None else old
            loss, clipped, kl, _, filtered = actor_loss_fn(
                scored.logps,
                old,
                given,
                action_mask=mask,
                rollout_log_probs=sampler,
                dp_size=1,
                batch_num_tokens=mask.sum(),
                global_batch_size=len(texts),
            )
            optimizer.zero_grad()
            (loss - 0.01 * scored.entropy.sum() / mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        measured = {"ppo_clip_ratio": clipped, "ppo_kl": kl, "is_filter_ratio": filtered}
        log.append({"reward": rewards.mean().item(), **{key: value.item() for key, value in measured.items()}})
    return log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="batches of rollouts (default: %(default)s)")
    parser.add_argument("--loss", choices=("fastrl", "openrlhf", "both"), default="fastrl", help="whose loss to use")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the plot")
    options = parser.parse_args()
    quiet_libraries()
    classes = {"fastrl": adapter.PolicyLoss}
    if options.loss != "fastrl":
        classes["openrlhf"] = installed.openrlhf().loss.PolicyLoss
    chosen = list(classes) if options.loss == "both" else [options.loss]
    runs = {f"{name}'s PolicyLoss": train(name, classes[name], options.steps) for name in chosen}
    plot(runs, TITLES, options.out / "openrlhf_policy_loss.png", "Single-digit sums: a 2-layer Qwen2, OpenRLHF's loss")
    risen = [rose(log) for log in runs.values()]
    return 0 if all(risen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
