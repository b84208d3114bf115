"""Cases of suite `hidden` on peaked distributions, as a trained policy's are: the exact gradient beside the sparse one,
which is not held to the exact one's error bars; its errors are reported beside them."""

from __future__ import annotations

import math
from functools import partial

import torch

import fastrl
from bench import hidden
from bench.batches import SPEC, rollouts
from bench.case import Case, Inputs, Provider, Run, Shape
from bench.inputs import SPREAD, hidden_inputs

EPS = 1e-4
"""Of a row's softmax, columns with less are left out."""
CANDIDATES, STEP, NOISE = 16, 1.2, 0.5
"""Tokens that a context makes likely; nats between one and the next; and what is left of the others' spread."""


def peaked_inputs(shape: Shape, ragged: bool) -> Inputs:
    """`hidden_inputs` whose rows each point at 16 tokens: the first 3 to 9 nats above all the others together, each
    next one 1.2 nats lower. The sampled token is drawn from them."""
    inputs = hidden_inputs(shape, ragged)
    generator = torch.Generator(shape.device).manual_seed(1)
    size, weight = (shape.batch, shape.length), inputs["weight"].detach()
    tokens = torch.randint(0, shape.vocab, (*size, CANDIDATES), generator=generator, device=shape.device)
    rest = math.log(shape.vocab) + (NOISE * SPREAD) ** 2 / 2  # log Σ exp of the others
    top = 3 + 6 * torch.rand((*size, 1), generator=generator, device=shape.device)
    wanted = rest + top - STEP * torch.arange(CANDIDATES, device=shape.device)
    noise = NOISE * inputs["hidden"].detach()
    states = torch.empty_like(noise)
    for i, (row, ids, logits) in enumerate(zip(noise, tokens, wanted, strict=True)):  # a sequence at a time
        directions = weight[ids].float()
        states[i] = row + (directions * (logits / directions.square().sum(-1))[..., None]).sum(1).to(row.dtype)
    place = torch.multinomial(wanted.softmax(-1).flatten(0, 1), 1, generator=generator).view(*size, 1)
    ids = tokens.gather(-1, place)[..., 0]
    logps = torch.stack([_logps(h, weight, w, i, rest) for h, w, i in zip(states, tokens, ids, strict=True)])
    spread = torch.randn((2, *size), generator=generator, device=shape.device)
    changed = {"ids": ids, "old": logps + 0.15 * spread[0], "ref": logps + spread[1]}
    return inputs | changed | {"hidden": states.requires_grad_()}


def _logps(
    states: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, ids: torch.Tensor, rest: float
) -> torch.Tensor:
    """Log-probs of a sequence's tokens, near enough without a pass over the vocabulary."""
    candidates = (weight[tokens].float() * states[:, None].float()).sum(-1)
    total = torch.logaddexp(candidates.logsumexp(-1), torch.full_like(candidates[:, 0], rest))
    return ((weight[ids].float() * states.float()).sum(-1) - total).clamp(max=-1e-3)


def sparse_flops(shape: Shape) -> float:
    """2·N·H·V: the logits alone; what the gradient sums is some 100 columns per row."""
    return 2 * shape.rows * shape.hidden * shape.vocab


def _sparse(shape: Shape, eps: float = EPS) -> Run:
    def run(inputs: Inputs) -> Inputs:
        head = fastrl.LMHead(inputs["weight"])
        out = fastrl.policy_loss_from_hidden(inputs["hidden"], head, rollouts(inputs), SPEC, sparse_eps=eps)
        return {"loss": out.loss, "dropped_mass": out.metrics["dropped_mass"]}

    return run


def peaked_case(shape: Shape) -> Case:
    """GRPO with KL from hidden states, trainable head. The share of the ceiling is that of the products of the exact
    gradient: a sparse one may be above 1."""
    case = hidden.loss_case(shape, frozen=False, only=("eager", "fastrl", "trl", "liger", "floor"))
    sparse = {"fastrl-sparse": Provider(_sparse, approximate=True)}
    return Case(
        name=case.name.replace("trainable", "peaked"),
        suite="hidden",
        shape=shape,
        make_inputs=peaked_inputs,
        providers={**case.providers, **sparse},
        oracle=case.oracle,
        least_flops=hidden.trainable_flops,
        target="sparse" if shape.device != "cpu" else None,
    )


def hidden_cases(device: str, quick: bool) -> list[Case]:
    """Suite `hidden` with these cases at its end."""
    return [*hidden.cases(device, quick), *cases(device, quick)]


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [peaked_case(Shape(4, 16, 512, 64, device=device))]
    if device == "cpu":
        return [peaked_case(Shape(8, 64, 32000, 1024))]
    made = partial(Shape, dtype="bf16", device=device)
    return [peaked_case(made(8, 1024, vocab, 4096)) for vocab in (128256, 151936)]
