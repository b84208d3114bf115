"""The obvious plain-torch way to everything: the "eager" provider, the tail of others, and what torch.compile gets."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Inputs, Run, Shape, Unavailable

EPSILON, KL_COEF, GROUP = 0.2, 0.04, 16


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """(..., V), (...) -> log softmax(logits)[id], in the dtype of the logits."""
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _token_losses(logps: Tensor, batch: Inputs, sequence: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) losses −min(r·A, clip(r)·A) + β·k3, ratios r and k3, in fp32 as every trainer computes them. With
    `sequence`, r is (B, 1): exp of the mean log-ratio. Without reference log-probs there is no KL."""
    logps = logps.float()
    advantages = batch["advantages"].unsqueeze(-1)
    log_ratio = logps - batch["old"]
    if sequence:
        mask = batch["mask"].float()
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    if "ref" not in batch:
        return -surrogate.expand_as(logps), ratio, torch.zeros_like(logps)
    x = batch["ref"] - logps
    k3 = x.exp() - x - 1
    return KL_COEF * k3 - surrogate, ratio, k3


def grpo(logps: Tensor, batch: Inputs, sequence: bool = False) -> Tensor:
    """GRPO with KL, or GSPO with `sequence`: mean over sequences of the mean over their tokens."""
    mask = batch["mask"].float()
    losses, _, _ = _token_losses(logps, batch, sequence)
    return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def grpo_with_metrics(batch: Inputs) -> tuple[Tensor, Tensor]:
    """The loss from log-probs, and the metrics that `fastrl.policy_loss` reports: means, extremes and counts."""
    mask, advantages = batch["mask"].float(), batch["advantages"].unsqueeze(-1)
    losses, ratio, k3 = _token_losses(batch["logps"], batch)
    loss = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    with torch.no_grad():
        tokens = mask.sum()
        delta = batch["logps"] - batch["old"]
        low = ((ratio < 1 - EPSILON) & (advantages < 0)) * mask
        high = ((ratio > 1 + EPSILON) & (advantages > 0)) * mask
        sums = [low, high, low + high, ratio * mask, -delta * mask, (ratio - delta - 1) * mask, k3 * mask]
        means = [value.sum() / tokens for value in sums]
        valid = batch["mask"]
        extremes = [torch.where(valid, ratio, torch.inf).amin(), torch.where(valid, ratio, -torch.inf).amax()]
        weight = (ratio * mask).sum()
        effective = weight**2 / (ratio * ratio * mask).sum()
        return loss, torch.stack([*means, *extremes, effective, tokens, (mask.sum(-1) > 0).sum().float()])


def entropies(logits: Tensor) -> Tensor:
    """(..., V) -> −Σ p·log p in nats, in the dtype of the logits."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """(S,) -> (r − mean) / (std + 1e-4) over consecutive groups, unbiased std."""
    grouped = rewards.view(-1, group)
    return ((grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-4)).view(-1)


def compiled(run: Run, shape: Shape) -> Run:
    """torch.compile of an eager run, compiled anew so that no case inherits another's shapes, and for each shape by
    itself: the check takes fewer rows, after which the default would time a graph for any number of them."""
    if shape.device == "cuda" and torch.cuda.get_device_capability()[0] < 7 and not torch.version.hip:
        raise Unavailable("Inductor needs a GPU of compute capability 7.0 or more")
    torch.compiler.reset()
    return torch.compile(run, dynamic=False)
