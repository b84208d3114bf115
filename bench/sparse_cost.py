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
    name = "loss from hidden states, sparse gradient"
    frozen = _kernel_bytes(VOCAB, trainable=False)
    yield frozen._replace(case=f"{name}, frozen head")
    small = 512  # the head's gradient is written by column, which takes the interpreter long
    without, with_head = (_kernel_bytes(small, trainable) for trainable in (False, True))
    per_element = SEQUENCES * LENGTH / HIDDEN
    figures = [(a - b) * per_element for a, b in zip(with_head[2:6], without[2:6], strict=True)]
    yield Cost(f"{name}, what a trainable head adds", "V·H", *figures)
    yield from _flops(name)


def _kernel_bytes(vocab: int, trainable: bool) -> Cost:
    """Per logit; few candidates per row: the target, and what Gaussian logits put above the threshold."""
    generator = torch.Generator().manual_seed(0)  # the same columns are kept with either head
    hidden = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator).bfloat16().requires_grad_()
    head = fastrl.LMHead(torch.randn(vocab, HIDDEN, generator=generator).bfloat16().requires_grad_(trainable))
    rollouts = _on_policy(vocab)

    def run() -> None:
        fastrl.policy_loss_from_hidden(
            hidden, head, rollouts, fastrl.GRPO, sparse_eps=0.1, sparse_capacity=CAPACITY, backend="triton"
        )

    return _bytes("", "logit", SEQUENCES * LENGTH * vocab, run)


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
