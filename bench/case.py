"""A benchmark case as data: what to run, on which shape, by whom, and what the hardware must at least do for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Inputs = dict[str, Tensor]
"""Named tensors; those that require a gradient are the leaves that the case differentiates."""
Run = Callable[[Inputs], Inputs]
"""Inputs to named outputs; an output called "loss" is differentiated by the runner."""


class Unavailable(Exception):
    """A provider that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `length` tokens; `vocab` and `hidden` are 0 where the case has none."""

    batch: int
    length: int
    vocab: int = 0
    hidden: int = 0
    dtype: str = "fp32"
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """N, the number of tokens."""
        return self.batch * self.length

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes per element of logits, hidden states and weights."""
        return self.torch_dtype.itemsize

    def with_rows(self, limit: int) -> Shape:
        """The same with shorter sequences, so that N stays below `limit` (one token per sequence at least)."""
        return dataclasses.replace(self, length=max(1, min(self.length, limit // self.batch)))


def unchanged(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Provider:
    """One implementation. Loading imports it or raises `Unavailable`; neither that nor `prepare` is timed."""

    load: Callable[[Shape], Run]
    prepare: Callable[[Inputs], Inputs] = unchanged
    timed: Callable[[Inputs], Inputs] = unchanged
    """Changes what is timed but not what is checked: fastrl on the dense batch, beside the realistic one."""
    floor: bool = False
    """Not an implementation but the same bytes or products alone: timed in the same rounds, not checked."""
    forward: Callable[[Inputs], Callable[[], Any]] | None = None
    """Inputs to the loss call alone, on what a step builds beside it: its kernels are counted by themselves. None: a
    step is one call and has nothing beside it."""
    approximate: bool = False
    """Computes something else on purpose: its errors are reported beside the bars, not held to them."""


@dataclass(frozen=True)
class Case:
    """One thing to measure. Exactly one of `least_bytes` and `least_flops` is given and names the ceiling:
    bytes the copy bandwidth, FLOP the GEMM rate."""

    name: str
    suite: str
    shape: Shape
    make_inputs: Callable[[Shape, bool], Inputs]
    """(shape, ragged) -> inputs; ragged inputs have masked tokens, for the check."""
    providers: Mapping[str, Provider]
    oracle: Run
    """The same computation on float64 inputs."""
    least_bytes: Callable[[Shape], float] | None = None
    least_flops: Callable[[Shape], float] | None = None
    check_rows: bool = True
    """Whether the check may take fewer rows; False where the rows carry a structure of their own."""
    target: str | None = None
    """The entry of `bench.targets.TARGETS` that this case decides."""
    memory_only: bool = False
    """Whether only peak memory is taken: a point of a growth curve."""
    short: bool = False
    """Whether it is over in microseconds on a GPU, so that its target is the time of its kernels: that is taken too."""
    first_call: bool = False
    """Whether a GPU run also times one call of a fresh process with no kernel compiled yet."""
    waits: bool = False
    """Whether the programs of one provider's kernel wait for each other: a GPU that never runs those they wait for
    hangs, and the run with it. Such a case comes after all others, whose rows are written by then."""


def timed_inputs(case: Case, provider: Provider) -> Inputs:
    """Fresh inputs of the timed size, as the provider takes them."""
    return provider.prepare(provider.timed(case.make_inputs(case.shape, False)))


def leaves(inputs: Inputs) -> Inputs:
    """The inputs that are differentiated."""
    return {name: value for name, value in inputs.items() if value.requires_grad}


def step(run: Run, inputs: Inputs) -> Inputs:
    """What is timed: one call, and one backward if there is a loss."""
    outputs = run(inputs)
    if "loss" in outputs:
        outputs["loss"].backward()
    return outputs
