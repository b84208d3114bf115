"""Suite `scan`: GAE over padded batches with holes in the mask."""

from __future__ import annotations

import torch
from torch import Tensor

import fastrl
from bench.case import Case, Inputs, Provider, Run, Shape, Unavailable
from bench.inputs import SEED

GAMMA, LAM = 0.99, 0.95


def least_bytes(shape: Shape) -> float:
    """17·N: rewards and values read (2·4), the mask (1), advantages and returns written (2·4)."""
    return 17 * shape.rows


def make_inputs(shape: Shape, ragged: bool) -> Inputs:
    """rewards, values and a bool mask, as in the other suites, with 30 % of the steps masked; always ragged."""
    generator = torch.Generator(shape.device).manual_seed(SEED)
    size = (shape.batch, shape.length)
    rewards, values = (torch.randn(size, generator=generator, device=shape.device) for _ in range(2))
    mask = torch.rand(size, generator=generator, device=shape.device) > 0.3
    return {"rewards": rewards, "values": values, "mask": mask}


def _loop(inputs: Inputs) -> Inputs:
    """The loop over T with both carries, as verl writes it; the result is masked to compare."""
    rewards, values, mask = inputs["rewards"], inputs["values"], inputs["mask"].long()
    next_values: Tensor | float = 0.0
    advantage: Tensor | float = 0.0
    every = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        new = delta + GAMMA * LAM * advantage
        next_values = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_values
        advantage = new * mask[:, t] + (1 - mask[:, t]) * advantage
        every.append(advantage)
    advantages = torch.stack(every[::-1], dim=1)
    return {"advantages": advantages * mask, "returns": (advantages + values) * mask}


def _eager(shape: Shape) -> Run:
    return _loop


def _fastrl(shape: Shape) -> Run:
    def run(inputs: Inputs) -> Inputs:
        found = fastrl.gae(inputs["rewards"], inputs["values"], mask=inputs["mask"], gamma=GAMMA, lam=LAM)
        return dict(zip(("advantages", "returns"), found, strict=True))

    return run


def _no_compile(shape: Shape) -> Run:
    raise Unavailable("torch.compile unrolls the loop over T")


def _no_gae(shape: Shape) -> Run:
    raise Unavailable("no GAE outside its trainer")


def _whitened(shape: Shape) -> Run:
    raise Unavailable("its GAE whitens in the same call; its loop is the eager provider")


def cases(device: str, quick: bool) -> list[Case]:
    batch, length = (4, 16) if quick else (512, 8192)
    shape = Shape(batch, length, device=device)
    return [
        Case(
            name=f"scan-gae-B{batch}-T{length}",
            suite="scan",
            shape=shape,
            make_inputs=make_inputs,
            providers={
                "eager": Provider(_eager),
                "torch.compile": Provider(_no_compile),
                "fastrl": Provider(_fastrl),
                "liger": Provider(_no_gae),
                "trl": Provider(_no_gae),
                "verl": Provider(_whitened),
            },
            oracle=_loop,
            least_bytes=least_bytes,
            target="cpu-gae" if device == "cpu" else "gae",
            short=True,
            first_call=device != "cpu",
        )
    ]
