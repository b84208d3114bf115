"""OpenRLHF's own `CriticPPOTrainer` and `RewardModelTrainer` on tiny models of its own classes, as `openrlhf_trainer.py`
has its actor: their steps as they stand, on the CPU, without Ray and DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from parity import peers
from parity.openrlhf_trainer import Strategy, no_gpu
from parity.tiny import LENGTH, PROMPT, V, tiny_model
from torch.utils.data import DataLoader


def model(kind: str, folder: Any) -> Any:
    """OpenRLHF's critic or reward model around the tiny model in `folder`, with the value head that it would draw."""
    if not (folder / "config.json").exists():
        tiny_model().save_pretrained(folder)
    torch.manual_seed(1)
    make = peers.openrlhf_trainers().models.get_llm_for_sequence_regression
    made = make(str(folder), kind, attn_implementation="eager", init_value_head=True).float()
    with torch.no_grad():
        made.score.weight.mul_(10)  # values that differ
    return made


def _fitted(made: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def critic_trainer(folder: Any, value_clip: float | None) -> Any:
    """A real `CriticPPOTrainer`, whose loss is what `openrlhf` holds at this moment."""
    args = SimpleNamespace(
        actor=SimpleNamespace(aux_loss_coef=0.0),
        train=SimpleNamespace(max_epochs=1, dynamic_batch_enable=False),
        ds=SimpleNamespace(packing_samples=False),
    )
    made, trainers = model("critic", folder), peers.openrlhf_trainers()
    with no_gpu():
        return trainers.critic.CriticPPOTrainer(Strategy(args=args), made, *_fitted(made), value_clip=value_clip)


def critic_experience(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (5, PROMPT + LENGTH), generator=g)
    mask = torch.arange(LENGTH) < torch.tensor([6, 4, 5, 1, 0])[:, None]
    mask[0, 2] = False  # a tool's token
    values, returns = torch.randn(2, 5, LENGTH, generator=g) * mask
    attention = torch.ones_like(ids)
    return peers.openrlhf_trainers().experience.Experience(
        sequences=ids, attention_mask=attention, action_mask=mask, values=values / 4, returns=returns
    )


class RewardStrategy(Strategy):
    """What the reward model's trainer asks for besides; it remembers what would be on its progress bar."""

    def print(self, *_: Any) -> None:
        pass

    def is_rank_0(self) -> bool:
        return False

    def all_reduce(self, logs: dict[str, float]) -> dict[str, float]:
        self.log.append(dict(logs))
        return logs

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any, name: str = "model") -> None:
        super().optimizer_step(optimizer, model, scheduler, name)


def reward_trainer(folder: Any, loss: str, margins: bool) -> Any:
    """A real `RewardModelTrainer` over two epochs of pairs, whose loss is what `openrlhf` holds at this moment."""
    args = SimpleNamespace(
        model=SimpleNamespace(aux_loss_coef=0.0, margin_loss_enable=margins, compute_fp32_loss_enable=True),
        ds=SimpleNamespace(packing_samples=False),
        logger=SimpleNamespace(wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1),
        eval=SimpleNamespace(steps=10**6),
        ckpt=SimpleNamespace(save_steps=-1),
        train=SimpleNamespace(batch_size=4),
    )
    g = torch.Generator().manual_seed(2)
    answers = torch.randint(2, V, (48, 2, PROMPT + LENGTH), generator=g)
    lengths = torch.randint(3, PROMPT + LENGTH + 1, (48, 2, 1), generator=g)
    masks = (torch.arange(PROMPT + LENGTH) < lengths).long()
    # the answer with more even tokens is the chosen one
    worth = ((answers % 2 == 0) * masks).sum(-1).float()
    order = worth.argsort(dim=1, descending=True)[..., None].expand_as(answers)
    answers, masks = answers.gather(1, order), masks.gather(1, order)
    gaps = (worth[:, 0] - worth[:, 1]).abs() / 8
    pairs = [(answers[i, :1], masks[i, :1], answers[i, 1:], masks[i, 1:], gaps[i].item()) for i in range(len(answers))]

    def together(rows: list[tuple]) -> tuple:
        *tensors, margin = zip(*rows, strict=True)
        return (*(torch.stack(column) for column in tensors), list(margin))

    made = model("reward", folder)
    optimizer, scheduler = _fitted(made)
    strategy = RewardStrategy(args=args, log=[])
    tokenizer = SimpleNamespace(pad_token_id=0)
    return peers.openrlhf_trainers().reward.RewardModelTrainer(
        made, strategy, optimizer, DataLoader(pairs, batch_size=4, collate_fn=together), None, scheduler, tokenizer,
        max_epochs=2, loss=loss,
    )  # fmt: skip
