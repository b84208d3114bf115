"""`python -m bench cost`: how many bytes the kernels move and how many FLOP the GEMMs take; needs no GPU.

Nothing here is a formula: the kernels run in Triton's interpreter, every load and store is counted, and torch counts
the GEMMs of the hidden level. A change that adds a pass over the logits, or a GEMM, shows as a larger number.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastrl

ROWS, VOCAB, HIDDEN = 24, 5000, 8  # two tiles of the vocabulary and a bit: what a row costs beyond it vanishes
SEQUENCES, LENGTH = 4, 6
_MEANING = (
    "issued: bytes that the instructions ask for; distinct: bytes of memory that are touched, what a perfect cache "
    "would move. Logits are bf16, everything per token fp32."
)


class Cost(NamedTuple):
    """What one unit of work costs."""

    case: str
    unit: str
    read_issued: float | None = None  # bytes per unit, as the next three
    read_distinct: float | None = None
    written_issued: float | None = None
    written_distinct: float | None = None
    flop: float | None = None  # per unit


class Traffic:
    """Bytes of all loads and stores of the kernels that run meanwhile, or of those that move 16-bit numbers."""

    def __init__(self, half_only: bool = False) -> None:
        self._half_only = half_only
        self.issued = {"read": 0, "written": 0}
        self._places: dict[str, list[np.ndarray]] = {"read": [], "written": []}

    def add(self, kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if self._half_only and size != 2:
            return
        places = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        places = places[np.broadcast_to(mask.data, places.shape)].ravel()
        self.issued[kind] += places.size * size
        # an address and how many bytes it holds, in one number
        self._places[kind].append(np.unique(places.astype(np.uint64) * np.uint64(16) + np.uint64(size)))

    def distinct(self, kind: str) -> int:
        if not self._places[kind]:
            return 0
        return int((np.unique(np.concatenate(self._places[kind])) % np.uint64(16)).sum())


@contextlib.contextmanager
def counted(half_only: bool = False) -> Iterator[Traffic]:
    """Count the bytes of the kernels that run in the interpreter meanwhile; `half_only`: those of 16-bit numbers, the
    logits and their gradient."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic, load, store = Traffic(half_only), Builder.create_masked_load, Builder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.add("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.add("written", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


def _bytes(case: str, unit: str, units: int, run: Callable[[], Any]) -> Cost:
    with counted() as traffic:
        run()
    figures = (
        figure / units for kind in ("read", "written") for figure in (traffic.issued[kind], traffic.distinct(kind))
    )
    return Cost(case, unit, *figures)


def _rollouts(advantages: Tensor | None = None, mask: Tensor | None = None, **more: Any) -> fastrl.Rollouts:
    shape = (SEQUENCES, LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, shape, generator=generator)
    old = torch.full(shape, -8.0)
    given = torch.ones(SEQUENCES) if advantages is None else advantages
    return fastrl.Rollouts(ids, mask, given, old_logps=old, **more)


def logits_costs() -> Iterator[Cost]:
    """Per logit: log-probs, their gradient, and the loss from logits in its plans."""
    logits = torch.randn(SEQUENCES, LENGTH, VOCAB).bfloat16()
    count = logits.numel()
    plain = _rollouts()

    def score() -> None:
        fastrl.logprobs_from_logits(logits, plain.token_ids, backend="triton")

    def gradient() -> None:
        leaf = logits.clone().requires_grad_()
        fastrl.logprobs_from_logits(leaf, plain.token_ids, backend="triton").logps.sum().backward()

    def loss(spec: fastrl.LossSpec, rollouts: fastrl.Rollouts) -> Callable[[], None]:
        def run() -> None:
            leaf = logits.clone().requires_grad_()
            fastrl.policy_loss_from_logits(leaf, rollouts, spec, backend="triton").loss.backward()

        return run

    yield _bytes("log-probs and entropies", "logit", count, score)
    yield _bytes("log-probs, forward and backward", "logit", count, gradient)
    kl = fastrl.GRPO.replace(kl_coef=0.1)
    yield _bytes("loss, one-pass kernel", "logit", count, loss(kl, _rollouts(ref_logps=torch.full((4, 6), -8.0))))
    yield _bytes("loss, sequence ratio", "logit", count, loss(fastrl.GSPO, plain))
    yield _bytes("loss, zero advantage", "logit", count, loss(fastrl.GRPO, _rollouts(torch.zeros(SEQUENCES))))
    nothing = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
    yield _bytes("loss, masked", "logit", count, loss(fastrl.GRPO, _rollouts(mask=nothing)))


def token_costs() -> Iterator[Cost]:
    """Per token: the loss from log-probs, with its gradient and metrics."""
    shape = (8, 512)
    count = shape[0] * shape[1]
    ids, logps = torch.zeros(shape, dtype=torch.long), torch.full(shape, -2.0)
    more = {"old_logps": logps + 0.1, "ref_logps": logps - 0.1, "rollout_logps": logps + 0.05}
    mask = torch.ones(shape, dtype=torch.bool)
    full = fastrl.Rollouts(ids, mask, torch.randn(shape), **more)
    bare = fastrl.Rollouts(ids, None, torch.randn(8), old_logps=logps + 0.1)
    correction = fastrl.RolloutCorrection(level="sequence", mode="mask", upper=3.0)
    specs = {
        "token ratio, everything": (fastrl.DAPO.replace(kl_coef=0.1, entropy_coef=0.1), full),
        "token ratio, bare": (fastrl.DAPO, bare),
        "sequence ratio, bare": (fastrl.GSPO, bare),
        "token ratio, sequence correction": (fastrl.DAPO.replace(rollout=correction), full),
    }
    for name, (spec, rollouts) in specs.items():

        def run(spec: fastrl.LossSpec = spec, rollouts: fastrl.Rollouts = rollouts) -> None:
            leaf, entropy = logps.clone().requires_grad_(), torch.ones(shape)
            given = entropy if spec.entropy_coef else None
            fastrl.policy_loss(leaf, rollouts, spec, entropy=given, backend="triton").loss.backward()

        yield _bytes(f"policy_loss, {name}", "token", count, run)
    token_rewards, values = torch.randn(2, 4, 4096).unbind(0)
    every = torch.ones_like(values, dtype=torch.bool)
    steps = values.numel()
    yield _bytes("gae", "step", steps, lambda: fastrl.gae(token_rewards, values, mask=every, backend="triton"))
    scores = torch.randn(64, 8)
    yield _bytes("ranked_reward_loss", "score", 512, lambda: fastrl.ranked_reward_loss(scores, backend="triton"))
    rewards, ids_of = torch.randn(512), torch.arange(512) // 8
    yield _bytes(
        "group_advantages by ids", "reward", 512,
        lambda: fastrl.group_advantages(rewards, group_ids=ids_of, backend="triton"),
    )  # fmt: skip


def _addmm_flop(_: Any, a: tuple[int, ...], b: tuple[int, ...], **__: Any) -> int:
    """torch's counter does not know the addmm that adds in place."""
    return 2 * a[0] * a[1] * b[1]


def hidden_costs() -> Iterator[Cost]:
    """Per row, hidden unit and word: the FLOP of the GEMMs of the loss from hidden states."""
    vocab = 64
    hidden = torch.randn(SEQUENCES, LENGTH, HIDDEN)
    weight = torch.randn(vocab, HIDDEN)
    unit = SEQUENCES * LENGTH * HIDDEN * vocab
    some = torch.tensor([1.0, 0.0, -1.0, 0.0])
    masked = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    masked[:, LENGTH // 2 :] = False
    cases = {
        "trainable head": (fastrl.GRPO, True, None, None, 7),
        "frozen head": (fastrl.GRPO, False, None, None, 7),
        "half of the sequences with zero advantage": (fastrl.GRPO, True, some, None, 7),
        "half of the tokens masked": (fastrl.GRPO, True, None, masked, 7),
        "sequence ratio": (fastrl.GSPO, True, None, None, 7),
        "sequence ratio, sequences beyond the buffer": (fastrl.GSPO, True, None, None, 4),
        "picks within the batch": (fastrl.KL_COV, True, None, None, 7),
    }
    for name, (spec, trainable, advantages, mask, rows) in cases.items():
        leaf, head = hidden.clone().requires_grad_(), fastrl.LMHead(weight.clone().requires_grad_(trainable))
        rollouts = _rollouts(advantages, mask)
        ids = rollouts.token_ids % vocab
        rollouts = fastrl.Rollouts(ids, mask, rollouts.advantages, old_logps=rollouts.old_logps)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as flops:
            loss = fastrl.policy_loss_from_hidden(leaf, head, rollouts, spec, buffer_bytes=rows * vocab * 4).loss
            loss.backward()
        yield Cost(f"loss from hidden states, {name}", "N·H·V", flop=flops.get_total_flops() / unit)


def costs() -> list[Cost]:
    """Every case; the kernels must run in the interpreter (TRITON_INTERPRET=1, which the command sets)."""
    from bench.sparse_cost import sparse_costs  # which is built from what stands above

    torch.manual_seed(0)
    return [*logits_costs(), *token_costs(), *hidden_costs(), *sparse_costs()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")


def main(options: argparse.Namespace) -> int:
    """Print the costs; 2 if the kernels cannot run in the interpreter."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        print("cost runs the kernels in Triton's interpreter: unset TRITON_INTERPRET, or set it to 1", file=sys.stderr)
        return 2
    rows = costs()
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=1))
        return 0
    table = Table(title="Bytes and FLOP", caption=_MEANING)
    table.add_column("case")
    table.add_column("per")
    for name in Cost._fields[2:]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(row.case, row.unit, *("" if x is None else f"{x:.2f}" for x in row[2:]))
    (Console() if sys.stdout.isatty() else Console(width=130)).print(table)
    return 0
