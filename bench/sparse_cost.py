"""What the sparse gradient of the hidden level moves and multiplies, for `bench.cost`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastrl
from bench.cost import HIDDEN, LENGTH, SEQUENCES, VOCAB, Cost, _addmm_flop, _bytes, _rollouts

CAPACITY = 16


def sparse_costs() -> Iterator[Cost]:
    """Bytes of the kernels per logit with a frozen head and per element of a trainable one; FLOP of the products."""
    count = SEQUENCES * LENGTH
    hidden = torch.randn(SEQUENCES, LENGTH, HIDDEN).bfloat16()
    frozen = torch.randn(VOCAB, HIDDEN).bfloat16()
    trained = frozen.clone().requires_grad_()
    rollouts = _on_policy(VOCAB)
    # Few candidates per row: the target, and what Gaussian logits put above the threshold.
    options = {"sparse_eps": 0.1, "sparse_capacity": CAPACITY, "backend": "triton"}

    def loss(leaf: torch.Tensor, weight: torch.Tensor) -> None:
        fastrl.policy_loss_from_hidden(leaf, fastrl.LMHead(weight), rollouts, fastrl.GRPO, **options)

    name = "loss from hidden states, sparse gradient"
    yield _bytes(f"{name}, frozen head", "logit", count * VOCAB, lambda: loss(hidden.clone().requires_grad_(), frozen))
    without = _bytes("", "", 1, lambda: loss(hidden.clone().requires_grad_(), frozen))
    with_head = _bytes("", "", 1, lambda: loss(hidden.clone().requires_grad_(), trained))
    figures = [(a - b) / (VOCAB * HIDDEN) for a, b in zip(with_head[2:6], without[2:6], strict=True)]
    yield Cost(f"{name}, what a trainable head adds", "V·H", *figures)
    yield from _flops(name)


def _on_policy(vocab: int) -> fastrl.Rollouts:
    """Ratios of 1, so that no row is clipped and every one has a gradient."""
    return fastrl.Rollouts(_rollouts().token_ids % vocab, advantages=torch.ones(SEQUENCES))


def _flops(name: str) -> Iterator[Cost]:
    vocab = 64
    unit = SEQUENCES * LENGTH * HIDDEN * vocab
    rollouts = _on_policy(vocab)
    for case, capacity in (("", 64), (", every row without room", 1)):
        hidden = torch.randn(SEQUENCES, LENGTH, HIDDEN, requires_grad=True)
        head = fastrl.LMHead(torch.randn(vocab, HIDDEN, requires_grad=True))
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as flops:
            fastrl.policy_loss_from_hidden(
                hidden, head, rollouts, fastrl.GRPO, sparse_eps=0.0, sparse_capacity=capacity, backend="triton"
            )
        yield Cost(f"{name}{case}", "N·H·V", flop=flops.get_total_flops() / unit)
