"""Suite `cpu`: the hidden level in plain torch over a range of N, H and V, where it can always be measured."""

from __future__ import annotations

import dataclasses

from bench import hidden
from bench.case import Case, Shape

PROVIDERS = ("eager", "fastrl", "floor")
BATCH = 8
LENGTH, HIDDEN, VOCAB = 256, 64, 32000
"""Of the middle, from which one size at a time departs."""
LENGTHS, HIDDENS, VOCABS = (64, 512), (256, 512), (8192, 65536, 151936)


def _sizes(quick: bool) -> list[tuple[int, int, int]]:
    """(T, H, V)."""
    if quick:
        return [(16, 32, 512)]
    middle = (LENGTH, HIDDEN, VOCAB)
    return [
        middle,
        *((length, HIDDEN, VOCAB) for length in LENGTHS),
        *((LENGTH, width, VOCAB) for width in HIDDENS),
        *((LENGTH, HIDDEN, vocab) for vocab in VOCABS),
    ]


def cases(device: str, quick: bool) -> list[Case]:
    if device != "cpu":
        return []
    shapes = [Shape(BATCH, length, vocab, width) for length, width, vocab in _sizes(quick)]
    made = [_case(shape, frozen=False) for shape in shapes]
    return [*made, _case(shapes[0], frozen=True)]


def _case(shape: Shape, frozen: bool) -> Case:
    made = hidden.loss_case(shape, frozen, only=PROVIDERS, suite="cpu")
    return dataclasses.replace(made, name=f"cpu-{made.name}")
