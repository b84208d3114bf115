"""OpenRLHF's own `ActorPPOTrainer` on a tiny model on the CPU: its step as it stands, without Ray and DeepSpeed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from parity import peers
from parity.tiny import LENGTH, PROMPT, V, tiny_model
from torch import Tensor, nn


def actor() -> Any:
    """OpenRLHF's `Actor` around it."""
    made = peers.openrlhf_trainers().models.Actor(tiny_model())
    made.packing_samples = False  # which its constructor sets for a model that it loads itself
    return made


class Strategy(SimpleNamespace):
    """What the trainer asks of its DeepSpeed strategy, in plain torch."""

    ring_attn_group = None
    accumulated_gradient = 1

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Any) -> None:
        loss.backward()

    def optimizer_step(self, optimizer: Any, model: nn.Module, scheduler: Any, name: str) -> None:
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model: nn.Module) -> float:
        return torch.stack([g.norm() for g in self.gradients.values()]).norm().item()


def actor_trainer(**options: Any) -> Any:
    """A real `ActorPPOTrainer`, whose loss is what `openrlhf` holds at this moment."""
    actor_options = {
        "eps_clip_low_high": (0.1, 0.2),
        "dual_clip": 1.5,
        "loss_agg_mode": "token-mean",
        "policy_loss_type": "ppo",
    }
    correction = {"level": "off", "mode": "mask", "gating": "ratio", "threshold": [0.7, 1.4]}
    correction |= {name: options.pop(name) for name in list(options) if name in correction}
    args = SimpleNamespace(
        actor=SimpleNamespace(**{**actor_options, **options}, aux_loss_coef=0.0, entropy_coef=None),
        algo=SimpleNamespace(
            advantage=SimpleNamespace(**{f"is_correction_{name}": value for name, value in correction.items()}),
            kl=SimpleNamespace(use_loss=True, init_coef=0.1, estimator="k3", unbiased_gradient=False),
        ),
        train=SimpleNamespace(max_epochs=1, dynamic_batch_enable=False, colocate_all=False, async_enable=False),
        ds=SimpleNamespace(packing_samples=False),
        vllm=SimpleNamespace(sync_backend="gloo"),
    )
    trainers = peers.openrlhf_trainers()
    model = actor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with _no_barrier(trainers.actor), no_gpu():
        return trainers.actor.ActorPPOTrainer(Strategy(args=args), model, None, optimizer, scheduler)


@contextlib.contextmanager
def _no_barrier(module: Any):
    """Its constructor waits for other processes: there are none."""
    barrier, module.torch_dist_barrier_and_cuda_sync = module.torch_dist_barrier_and_cuda_sync, lambda: None
    try:
        yield
    finally:
        module.torch_dist_barrier_and_cuda_sync = barrier


@contextlib.contextmanager
def no_gpu():
    """The buffer in its constructor asks for the number of the GPU."""
    device, torch.cuda.current_device = torch.cuda.current_device, lambda: 0
    try:
        yield
    finally:
        torch.cuda.current_device = device


def experience(seed: int) -> Any:
    """A scored batch of prompts and answers; old, reference and sampler's log-probs near those of the first model."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (5, PROMPT + LENGTH), generator=g)
    mask = torch.arange(LENGTH) < torch.tensor([6, 4, 5, 1, 0])[:, None]
    mask[0, 2] = False  # a tool's token
    model = actor()
    attention = torch.ones_like(ids)
    with torch.no_grad():
        logps = model(ids, mask, attention_mask=attention)

    def near(x: Tensor, scale: float) -> Tensor:
        return (x + scale * torch.randn(x.shape, generator=g)).clamp(max=-1e-3) * mask

    old = near(logps, 0.2)
    return peers.openrlhf_trainers().experience.Experience(
        sequences=ids,
        attention_mask=attention,
        action_mask=mask,
        action_log_probs=old,
        base_action_log_probs=near(logps, 0.2),
        rollout_log_probs=near(old, 0.2),
        advantages=torch.randn(5, generator=g)[:, None].expand(5, LENGTH) * mask,
    )
