"""verl's registries with fastrl's policy loss and advantage estimator, in a small loop that trains a Qwen2 to add.

verl's own trainer needs Ray and GPUs; this is the part of it that concerns the loss: an `ActorConfig` whose loss_mode
names a registered policy loss, an `AlgoConfig` whose adv_estimator names a registered estimator, and a loop that calls
what the registries hold under those names. With `--loss both` verl's own loss trains a second model from the same seed.
Exits with 1 if the reward stays low.
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
from fastrl.adapters import verl as adapter

TITLES = {
    "reward": "reward (fraction right)",
    "actor/pg_clipfrac": "actor/pg_clipfrac",
    "actor/ppo_kl": "actor/ppo_kl (nats)",
    "entropy": "entropy (nats per token)",
}


def configs(verl: Any, prefix: str) -> tuple[Any, Any]:
    """verl's configs; the prefix is all that changes."""
    policy = verl.config.PolicyLossConfig(loss_mode=f"{prefix}vanilla")
    actor = verl.config.ActorConfig(
        strategy="fsdp",
        rollout_n=GROUP,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=policy,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        loss_agg_mode="token-mean",
        entropy_coeff=0.01,
    )
    return actor, verl.algorithm.AlgoConfig(adv_estimator=f"{prefix}grpo")


def advantages(core: Any, config: Any, rewards: torch.Tensor, mask: torch.Tensor, uids: list[str]) -> torch.Tensor:
    """verl's way: the reward of an answer stands at its last token, and `uid` names its prompt."""
    last = mask.long().cumsum(1).argmax(1, keepdim=True)
    token_rewards = torch.zeros(mask.shape).scatter(1, last, rewards[:, None])
    estimator = core.get_adv_estimator_fn(config.adv_estimator)
    return estimator(token_level_rewards=token_rewards, response_mask=mask.long(), index=uids, config=config)[0]


def train(verl: Any, prefix: str, steps: int) -> list[dict[str, float]]:
    """One entry per batch of rollouts: the reward, and the metrics of the second optimiser step on it."""
    actor, algorithm = configs(verl, prefix)
    if prefix:
        adapter.spec_from_config(actor)  # refuses what it does not honour, before anything is trained
    policy_loss = verl.core.get_policy_loss_fn(actor.policy_loss.loss_mode)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build_model(Path(folder)), build_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    log: list[dict[str, float]] = []
    torch.manual_seed(0)
    for step in track(range(steps), f"loss_mode={actor.policy_loss.loss_mode}"):
        chosen = torch.randperm(len(prompts()), generator=torch.Generator().manual_seed(step))[:8].tolist()
        texts = [prompts()[i] for i in chosen for _ in range(GROUP)]
        ids, mask, rewards = sample(model, tokenizer, texts)
        head, T = fastrl.LMHead.from_model(model), mask.shape[1]
        old, metrics = None, {}
        given = advantages(verl.core, algorithm, rewards, mask, texts)
        for _ in range(2):  # the second step is off-policy, and clipped
            scored = fastrl.logprobs_from_hidden(hidden_states(model, ids, T), head, ids[:, -T:], mask=mask)
            old = scored.logps.detach() if old is None else old
            loss, metrics = policy_loss(
                old_log_prob=old,
                log_prob=scored.logps,
                advantages=given,
                response_mask=mask,
                loss_agg_mode=actor.loss_agg_mode,
                config=actor,
            )
            entropy = scored.entropy.sum() / mask.sum()
            optimizer.zero_grad()
            (loss - actor.entropy_coeff * entropy).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        log.append({"reward": rewards.mean().item(), "entropy": entropy.item(), **metrics})
    return log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="batches of rollouts (default: %(default)s)")
    parser.add_argument("--loss", choices=("fastrl", "verl", "both"), default="fastrl", help="whose loss to train with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the plot")
    options = parser.parse_args()
    quiet_libraries()
    verl = installed.verl()
    adapter.register()  # in verl's own processes the plug-in entry point has done it
    prefixes = {"fastrl": ["fastrl_"], "verl": [""], "both": ["fastrl_", ""]}[options.loss]
    runs = {f"loss_mode={prefix}vanilla": train(verl, prefix, options.steps) for prefix in prefixes}
    plot(runs, TITLES, options.out / "verl_policy_loss.png", "Single-digit sums: a 2-layer Qwen2, verl's registries")
    risen = [rose(log) for log in runs.values()]
    return 0 if all(risen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
