"""PPO in full, in a plain PyTorch loop: a supervised policy, a reward model trained on ranked answers, then PPO with a
critic, generalised advantage estimation and a KL penalty in the reward under an adaptive coefficient.

The task is to add two small numbers. Annotators rank K answers per prompt by how close they are to the sum, one that is
no number last; the policy never sees the sum, only the reward model's score. Prints how often the answer is right
before and after, and plots the run. Exits with 1 if it did not learn.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from arithmetic import answer, build_model, build_tokenizer, prompts, quiet_libraries, reward
from torch import Tensor, nn

import fastrl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

T = 2  # tokens of an answer: a digit and <eos>
K = 4  # answers that an annotator ranks
PROMPTS = [prompt for prompt in prompts() if int(prompt[0]) <= 2 and int(prompt[2]) <= 2]
SPEC = fastrl.PPO  # clipped at 1 ± 0.2, mean over tokens
CURVES = ("right answers", "reward model's score", "KL per token to the supervised policy", "KL coefficient")


class Scorer(nn.Module):
    """A transformer body with one number per position: reward model and critic."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(input_ids=ids).last_hidden_state).squeeze(-1)  # (B, P + T)


class Batch(NamedTuple):
    """What was sampled: ids (B, P + T), the mask (B, T) up to and including <eos>, and the share of right answers."""

    ids: Tensor
    mask: Tensor
    right: float


def states(policy: Any, ids: Tensor) -> Tensor:
    """The hidden states that score the answer: position t of the model scores token t + 1."""
    return policy.base_model(input_ids=ids).last_hidden_state[:, -T - 1 : -1]


def logps(policy: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        head = fastrl.LMHead.from_model(policy)
        return fastrl.logprobs_from_hidden(states(policy, batch.ids), head, batch.ids[:, -T:], mask=batch.mask).logps


@torch.no_grad()
def sample(policy: Any, tokenizer: Any, texts: list[str]) -> Batch:
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # all prompts have one length here
    for _ in range(T):
        following = policy(input_ids=ids).logits[:, -1].softmax(-1).multinomial(1)
        ids = torch.cat([ids, following], 1)  # what comes after <eos> is masked
    ended = ids[:, -T:] == tokenizer.eos_token_id
    mask = ended.cumsum(1) - ended.long() == 0
    answers = tokenizer.batch_decode(ids[:, -T:].where(mask, 0), skip_special_tokens=True)
    scores = reward(texts, [text.replace(" ", "") for text in answers])
    return Batch(ids, mask, sum(scores) / len(scores))


def supervise(policy: Any, tokenizer: Any, steps: int) -> None:
    """Teach the form of an answer, a digit and <eos>, and nothing about sums."""
    rng, optimizer = random.Random(0), torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = [f"{rng.choice(PROMPTS)}{rng.randrange(10)}" for _ in range(128)]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, torch.full((len(texts), 1), tokenizer.eos_token_id)], 1)
        head = fastrl.LMHead.from_model(policy)
        loss = -fastrl.logprobs_from_hidden(states(policy, ids), head, ids[:, -T:]).logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ranked_answers(rng: random.Random, tokenizer: Any, count: int) -> Tensor:
    """(count, K, P + T) answers to `count` prompts: the closest to the sum first, one that is no number last."""
    rows = []
    while len(rows) < count:
        prompt, digits = rng.choice(PROMPTS), rng.sample(range(10), K - 1)
        distance = {digit: abs(digit - int(answer(prompt))) for digit in digits}
        malformed = [rng.randrange(len(tokenizer)), rng.randrange(len(tokenizer))]
        if len(set(distance.values())) < K - 1 or malformed[1] == tokenizer.eos_token_id:
            continue
        answers = [tokenizer(str(digit))["input_ids"] + [tokenizer.eos_token_id] for digit in digits]
        ranked = [answers[i] for i in sorted(range(K - 1), key=lambda i: distance[digits[i]])]
        rows.append([tokenizer(prompt)["input_ids"] + tokens for tokens in (*ranked, malformed)])
    return torch.tensor(rows)


def train_reward_model(model: Scorer, tokenizer: Any, steps: int) -> float:
    """By the ranking loss over all pairs of K answers; returns how often a pair of new answers is ordered right."""
    rng, optimizer = random.Random(1), torch.optim.AdamW(model.parameters(), lr=3e-3)

    def scores(count: int) -> Tensor:
        return model(ranked_answers(rng, tokenizer, count).flatten(0, 1))[:, -1].view(-1, K)

    for _ in range(steps):
        loss = fastrl.ranked_reward_loss(scores(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        s = scores(256)
    i, j = torch.triu_indices(K, K, 1)
    return (s[:, i] > s[:, j]).float().mean().item()


def standardised(model: Scorer, batch: Batch) -> Callable[[Batch], Tensor]:
    """The model's score of an answer, with mean 0 and standard deviation 1 over this batch."""
    with torch.no_grad():
        score = model(batch.ids)[:, -1]
    mean, std = score.mean(), score.std()

    def scored(other: Batch) -> Tensor:
        with torch.no_grad():
            return (model(other.ids)[:, -1] - mean) / std

    return scored


class Learner:
    """Policy and critic, their optimiser, and one PPO iteration."""

    def __init__(self, policy: Any, reference: Any, critic: Scorer, scored: Callable[[Batch], Tensor]) -> None:
        self.policy, self.reference, self.critic, self.scored = policy, reference, critic, scored
        self.controller = fastrl.AdaptiveKLController(initial=0.1, target=0.9, horizon=2000)
        groups = [{"params": list(policy.parameters())}, {"params": list(critic.parameters())}]
        self.optimizer = torch.optim.AdamW(groups, lr=2e-3)
        # The critic learns first: advantages of a wrong one would make the policy collapse.
        rates = [lambda iteration: min(1.0, (iteration + 1) / 10), lambda _: 1.0]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rates)

    def iterate(self, batch: Batch, epochs: int = 4) -> dict[str, float]:
        """Score the batch, estimate advantages, and take `epochs` steps on it; the later ones are off-policy."""
        old, ref, score = logps(self.policy, batch), logps(self.reference, batch), self.scored(batch)
        with torch.no_grad():
            old_values = self.critic(batch.ids)[:, -T - 1 : -1]  # the value before each token
        shaped = fastrl.kl_shaped_rewards(score, old, ref, mask=batch.mask, kl_coef=self.controller.value)
        advantages, returns = fastrl.gae(shaped.rewards, old_values, mask=batch.mask, lam=0.95, whiten=True)
        rollouts = fastrl.Rollouts(batch.ids[:, -T:], batch.mask, advantages, old_logps=old, ref_logps=ref)
        for _ in range(epochs):
            head = fastrl.LMHead.from_model(self.policy)
            out = fastrl.policy_loss_from_hidden(states(self.policy, batch.ids), head, rollouts, SPEC)
            values = self.critic(batch.ids)[:, -T - 1 : -1]
            value = fastrl.value_loss(values, returns, old_values=old_values, clip=0.5, mask=batch.mask)
            self.optimizer.zero_grad()
            (out.loss + value).backward()
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
            self.optimizer.step()
        measured = dict(
            zip(CURVES, (batch.right, score.mean().item(), shaped.kl.item(), self.controller.value), strict=True)
        )
        self.controller.update(shaped.kl, len(batch.ids))
        self.schedule.step()
        return measured


def plot(history: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, name in zip(axes.flat, CURVES, strict=True):
        axis.plot([entry[name] for entry in history], linewidth=1.5)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.suptitle("PPO with a critic and a reward model, on single-digit sums")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def train(supervised: int, ranked: int, iterations: int, seed: int = 0) -> tuple[list[dict[str, float]], float]:
    """The history of the PPO iterations, and the reward model's accuracy on pairs of answers."""
    with tempfile.TemporaryDirectory() as folder:
        policy, tokenizer = build_model(Path(folder), seed), build_tokenizer()
        bodies = [build_model(Path(folder), seed + 1).base_model for _ in range(2)]
    supervise(policy, tokenizer, supervised)
    reference = type(policy)(policy.config)
    reference.load_state_dict(policy.state_dict())
    reward_model, critic = (Scorer(body, policy.config.hidden_size) for body in bodies)
    accuracy = train_reward_model(reward_model, tokenizer, ranked)
    critic.load_state_dict(reward_model.state_dict())  # InstructGPT starts the critic from the reward model
    rng = random.Random(seed)

    def draw(count: int) -> Batch:
        return sample(policy, tokenizer, [rng.choice(PROMPTS) for _ in range(count)])

    learner = Learner(policy, reference, critic, standardised(reward_model, draw(512)))
    return [learner.iterate(draw(128)) for _ in range(iterations)], accuracy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supervised", type=int, default=60, help="steps of supervised training (%(default)s)")
    parser.add_argument("--ranked", type=int, default=150, help="steps of the reward model (%(default)s)")
    parser.add_argument("--iterations", type=int, default=80, help="PPO iterations (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the plot")
    options = parser.parse_args(arguments)
    quiet_libraries()
    torch.set_num_threads(1)  # the tensors here are too small to share
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    history, accuracy = train(options.supervised, options.ranked, options.iterations)
    n = max(1, min(10, len(history) // 4))
    before, after = (sum(entry[CURVES[0]] for entry in part) / n for part in (history[:n], history[-n:]))
    print(f"{len(PROMPTS)} prompts; the reward model orders {accuracy:.3f} of the pairs of answers right")
    print(f"right answers {before:.3f} before, {after:.3f} after {options.iterations} iterations")
    print(f"reward model's score {history[0][CURVES[1]]:.2f} before, {history[-1][CURVES[1]]:.2f} after")
    plot(history, options.out / "ppo_with_critic.png")
    print(f"curves: {options.out / 'ppo_with_critic.png'}")
    if after < before + 0.2:
        print("the share of right answers did not rise by 0.2", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
