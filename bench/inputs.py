"""Random batches that look like training: ratios near 1 with some clipped, a reference policy somewhat away."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from bench.case import Inputs, Shape
from bench.plain import GROUP

SPREAD = 2.0
"""Standard deviation of the logits. For Gaussian logits log Σ exp z ≈ log V + SPREAD²/2, so old log-probs near the
current ones come without a pass over the vocabulary."""
SEED = 20250101


def _generator(shape: Shape) -> torch.Generator:
    return torch.Generator(shape.device).manual_seed(SEED)


def _batch(shape: Shape, generator: torch.Generator, chosen: Tensor, ids: Tensor, ragged: bool) -> Inputs:
    """Everything of a batch besides logits: (B, T) ids, mask, old and ref log-probs, (B,) advantages.

    Old log-probs are 0.15 away from the current ones (one token in five is clipped at ε = 0.2) and reference log-probs
    1.0, so that a provider that drops the KL term differs by more than rounding.
    """
    size = (shape.batch, shape.length)

    def normal(*shape_: int) -> Tensor:
        return torch.randn(shape_, generator=generator, device=shape.device)

    logps = (chosen.float() - math.log(max(shape.vocab, 1)) - SPREAD**2 / 2).clamp(max=-1e-3)
    lengths = torch.full((shape.batch, 1), shape.length, device=shape.device)
    if ragged:
        low = -(-shape.length // 2)
        lengths = torch.randint(low, shape.length + 1, (shape.batch, 1), generator=generator, device=shape.device)
    return {
        "ids": ids,
        "mask": torch.arange(shape.length, device=shape.device) < lengths,
        "advantages": normal(shape.batch),
        "old": logps + 0.15 * normal(*size),
        "ref": logps + 1.0 * normal(*size),
    }


def _ids(shape: Shape, generator: torch.Generator) -> Tensor:
    size = (shape.batch, shape.length)
    return torch.randint(0, shape.vocab, size, generator=generator, device=shape.device)


def logits_inputs(shape: Shape, ragged: bool) -> Inputs:
    """logits (B, T, V), a leaf, with a batch."""
    generator = _generator(shape)
    size = (shape.batch, shape.length, shape.vocab)
    logits = torch.randn(size, generator=generator, device=shape.device, dtype=shape.torch_dtype).mul_(SPREAD)
    ids = _ids(shape, generator)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return {"logits": logits.requires_grad_()} | _batch(shape, generator, chosen, ids, ragged)


def scoring_inputs(shape: Shape, ragged: bool) -> Inputs:
    """logits (B, T, V) and ids, nothing masked."""
    inputs = logits_inputs(shape, ragged=False)
    return {"logits": inputs["logits"].detach(), "ids": inputs["ids"]}


def hidden_inputs(shape: Shape, ragged: bool, *, frozen: bool = False) -> Inputs:
    """hidden (B, T, H) and weight (V, H), both leaves unless the head is frozen, with a batch."""
    generator = _generator(shape)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=shape.device, dtype=shape.torch_dtype)

    hidden = normal(shape.batch, shape.length, shape.hidden)
    weight = normal(shape.vocab, shape.hidden).mul_(SPREAD / shape.hidden**0.5)
    ids = _ids(shape, generator)
    chosen = torch.stack([(h.float() * weight[i].float()).sum(-1) for h, i in zip(hidden, ids, strict=True)])
    batch = _batch(shape, generator, chosen, ids, ragged)
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(not frozen)} | batch


def realistic_layout(shape: Shape) -> tuple[list[int], list[bool]]:
    """Lengths, spread evenly from 0.4·T to T so that 30 % is padding, and which sequences have advantage zero (a group
    of equal rewards): 30 % of them, of every length, so that they hold 30 % of the tokens as well."""
    draw, steps = random.Random(SEED), max(shape.batch - 1, 1)
    lengths = [max(1, round(shape.length * (0.4 + 0.6 * i / steps))) for i in range(shape.batch)]
    wanted = round(0.3 * shape.batch)
    # one per stretch of as many, above its middle: 19 of 64 sequences are less than 30 %
    chosen = {int((i + 0.75) * shape.batch / wanted) for i in range(wanted)}
    pairs = [(length, i in chosen) for i, length in enumerate(lengths)]
    draw.shuffle(pairs)
    return [length for length, _ in pairs], [zero for _, zero in pairs]


def realistic_inputs(shape: Shape, ragged: bool) -> Inputs:
    """`hidden_inputs` with padding and zero advantages as in a training step, and without reference log-probs."""
    inputs = hidden_inputs(shape, ragged=False)
    del inputs["ref"]
    lengths, zero = (torch.tensor(x, device=shape.device) for x in realistic_layout(shape))
    inputs["mask"] = torch.arange(shape.length, device=shape.device) < lengths.unsqueeze(-1)
    inputs["advantages"] = torch.where(zero, 0.0, inputs["advantages"])
    return inputs


def dense(inputs: Inputs) -> Inputs:
    """The same batch with every token counting and no zero advantage."""
    advantages = torch.where(inputs["advantages"] == 0, 1.0, inputs["advantages"])
    return inputs | {"mask": torch.ones_like(inputs["mask"]), "advantages": advantages}


def token_inputs(shape: Shape, ragged: bool) -> Inputs:
    """logps (B, T), a leaf, with a batch."""
    generator = _generator(shape)
    chosen = SPREAD * torch.randn((shape.batch, shape.length), generator=generator, device=shape.device)
    ids = torch.zeros_like(chosen, dtype=torch.int64)
    logps = (chosen - math.log(max(shape.vocab, 1)) - SPREAD**2 / 2).clamp(max=-1e-3)
    return {"logps": logps.requires_grad_()} | _batch(shape, generator, chosen, ids, ragged)


def reward_inputs(shape: Shape, ragged: bool) -> Inputs:
    """rewards (B,): 1 for a right answer plus 0.1 for its format; the first group is all equal."""
    generator = _generator(shape)
    coins = torch.rand((2, shape.batch), generator=generator, device=shape.device) < 0.5
    rewards = coins[0].float() + 0.1 * coins[1].float()
    rewards[:GROUP] = 0.1
    return {"rewards": rewards}
