"""Suite `token`: the policy loss from log-probs with its metrics read on the host, and group-normalised advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

import fastrl
from bench import peers, plain
from bench.batches import SPEC, oracle_loss, rollouts
from bench.case import Case, Inputs, Provider, Run, Shape, Unavailable
from bench.inputs import reward_inputs, token_inputs


def policy_bytes(shape: Shape) -> float:
    """17·N: log-probs, old and reference log-probs read (3·4), the mask (1), the gradient written (4). Advantages are
    one number per sequence."""
    return 17 * shape.rows


def advantage_bytes(shape: Shape) -> float:
    """8·S: rewards read and advantages written, fp32."""
    return 8 * shape.batch


def _eager(shape: Shape) -> Run:
    return _with_metrics_on_host(plain.grpo_with_metrics)


def _compiled(shape: Shape) -> Run:
    return _with_metrics_on_host(plain.compiled(plain.grpo_with_metrics, shape))


def _with_metrics_on_host(function) -> Run:
    def run(inputs: Inputs) -> Inputs:
        loss, metrics = function(inputs)
        metrics.tolist()
        return {"loss": loss}

    return run


def _fastrl(shape: Shape) -> Run:
    def run(inputs: Inputs) -> Inputs:
        out = fastrl.policy_loss(inputs["logps"], rollouts(inputs), SPEC)
        out.metrics.to_floats()
        return {"loss": out.loss}

    return run


def _forward(inputs: Inputs) -> Callable[[], Any]:
    """The loss call alone: the batch is built before, and neither backward nor reading the metrics is part of it."""
    built = rollouts(inputs)
    return lambda: fastrl.policy_loss(inputs["logps"], built, SPEC)


def _no_token_loss(shape: Shape) -> Run:
    raise Unavailable("no loss from log-probs outside its trainer")


def _oracle(inputs: Inputs) -> Inputs:
    return oracle_loss(inputs["logps"], inputs)


def _advantages_eager(shape: Shape, group: int) -> Run:
    return lambda inputs: {"advantages": plain.group_advantages(inputs["rewards"], group)}


def _advantages_compiled(shape: Shape, group: int) -> Run:
    return plain.compiled(_advantages_eager(shape, group), shape)


def _advantages_fastrl(shape: Shape, group: int) -> Run:
    return lambda inputs: {"advantages": fastrl.group_advantages(inputs["rewards"], group_size=group)}


def _advantages_verl(shape: Shape, group: int) -> Run:
    """verl's default: a Python loop over the samples. It takes rewards per token; one token is the least work."""
    estimate = peers.verl("verl.trainer.ppo.core_algos").compute_grpo_outcome_advantage
    index = np.arange(shape.batch) // group
    ones = torch.ones(shape.batch, 1, device=shape.device)

    def run(inputs: Inputs) -> Inputs:
        advantages, _ = estimate(inputs["rewards"].unsqueeze(-1), ones, index, epsilon=1e-4)
        return {"advantages": advantages.squeeze(-1)}

    return run


def _no_advantages(shape: Shape) -> Run:
    raise Unavailable("no advantages outside its trainer")


def _policy_case(shape: Shape) -> Case:
    return Case(
        name=f"token-policy-N{shape.rows}",
        suite="token",
        shape=shape,
        make_inputs=token_inputs,
        providers={
            "eager": Provider(_eager),
            "torch.compile": Provider(_compiled),
            "fastrl": Provider(_fastrl, forward=_forward),
            "liger": Provider(_no_token_loss),
            "trl": Provider(_no_token_loss),
        },
        oracle=_oracle,
        least_bytes=policy_bytes,
        target="token",
        short=True,
        first_call=True,
    )


def _advantage_case(shape: Shape, group: int) -> Case:
    return Case(
        name=f"token-advantages-S{shape.batch}-G{group}",
        suite="token",
        shape=shape,
        make_inputs=reward_inputs,
        providers={
            "eager": Provider(partial(_advantages_eager, group=group)),
            "torch.compile": Provider(partial(_advantages_compiled, group=group)),
            "fastrl": Provider(partial(_advantages_fastrl, group=group)),
            "liger": Provider(_no_advantages),
            "trl": Provider(_no_advantages),
            "verl": Provider(partial(_advantages_verl, group=group)),
        },
        oracle=_advantages_eager(shape, group),  # written out in plain torch, so in float64 it is exact
        least_bytes=advantage_bytes,
        check_rows=False,
        target="advantages" if group == 8 else None,
        short=True,
    )


def cases(device: str, quick: bool) -> list[Case]:
    batch, length, rewards = (4, 16, 64) if quick else (256, 1024, 8192)
    policy = Shape(batch, length, vocab=1000, device=device)
    made = [_advantage_case(Shape(rewards, 1, device=device), group) for group in (8, plain.GROUP)]
    return [_policy_case(policy), *made]
