"""What fastrl is meant to reach, on one H200 and on a CPU, as data; the verdict on a run's rows is computed from it.

The floors are copies and products that the vendor's library does in the same rounds. A loss of one ratio per sequence
has a floor of its own: no gradient exists before the last token of a sequence has been scored, and a sequence of 1024
rows at V = 151,936 in bf16 is 311 MB, which no cache keeps. So it reads each logit twice and its floor is a copy of 1.5
times the bytes, 6NV in bf16, where a token-level loss may be held to 4NV.

With a frozen head the products are 4·H FLOP per logit against 6·H, while the kernel between them moves as many bytes:
what of it is exposed is 1.5 times the share, and it is the larger the smaller H. Hence `FROZEN_FLOORS`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.case import DTYPES

Row = dict[str, Any]
BUFFER_MIB = 1280
"""Of logits held at once on an accelerator."""
SLACK_MIB = 64
"""Workspace of the vendor's products, and tensors of [N]."""


@dataclass(frozen=True)
class Target:
    """Bounds on one provider in one kind of case."""

    text: str
    device: str = "cuda"
    ours: str = "fastrl"
    """The provider that is held to them."""
    share: float | None = None
    """Of the measured ceiling, at least."""
    floor: float | Mapping[int, float] | None = None
    """Times the provider "floor", which does the bare copy or products in the same rounds, at most; or H -> that."""
    kernel_ms: float | None = None
    """Milliseconds of the kernels of its forward, at most."""
    launches: int | None = None
    """Of its own Triton kernels in forward; torch's are reported beside them."""
    faster: Mapping[str, float] = field(default_factory=dict)
    """Provider -> how many times as fast, at least: the median over rounds of the ratio."""
    beside_once: tuple[str, ...] = ()
    """Providers without a bound, measured for a choice still to be made, in the case with `first_call` only: each costs
    as much as fastrl itself."""
    time: float | None = None
    """Times eager's time, at most."""
    memory: float | None = None
    """Times eager's peak memory beyond the inputs, at most."""
    head: str | None = None
    """"trainable" or "frozen": peak memory is at most the gradients and the one buffer of logits."""
    first_seconds: float | None = None
    """One call of a fresh process with nothing compiled, at most; asked of the cases that have `first_call`."""

    @property
    def providers(self) -> tuple[str, ...]:
        """Whom a run for the targets needs."""
        every = ("eager", *self.faster, *self.beside_once, self.ours, "fastrl", "floor")
        return tuple(dict.fromkeys(every))

    def floor_at(self, hidden: int) -> float | None:
        return self.floor.get(hidden) if isinstance(self.floor, Mapping) else self.floor


_ANCHORS = {"trl": 1.3, "liger": 5.0}
_CHOICES = ("fastrl-overlap", "fastrl-fp32-logits")
FROZEN_FLOORS = {1536: 1 / 0.85, 4096: 1 / 0.92, 8192: 1 / 0.95}
"""H -> times the bare products: 1.5 times as much beside them as a trainable head is allowed."""
FIRST_SECONDS = 5.0
TARGETS = {
    "score": Target(
        "log-probs and entropies from logits, no gradient",
        share=0.9,
        faster={"trl": 1.0},
        first_seconds=FIRST_SECONDS,
    ),
    "logits": Target(
        "GRPO with KL from logits, token level",
        floor=1.2,
        faster={"liger": 1.4},
        first_seconds=FIRST_SECONDS,
    ),
    "logits-sequence": Target(
        "GRPO with KL from logits, sequence level", floor=1.2, faster={"liger": 2.0}, first_seconds=FIRST_SECONDS
    ),
    "hidden": Target(
        "GRPO from hidden states, trainable head",
        floor=1 / 0.95,
        faster=_ANCHORS,
        beside_once=_CHOICES,
        head="trainable",
        first_seconds=FIRST_SECONDS,
    ),
    "hidden-small": Target(
        "GRPO from hidden states, trainable head, H = 1536", floor=1 / 0.9, faster=_ANCHORS, head="trainable"
    ),
    "hidden-frozen": Target("GRPO from hidden states, frozen head", floor=FROZEN_FLOORS, head="frozen"),
    "sparse": Target(
        "sparse gradient on peaked distributions, against the three dense products",
        ours="fastrl-sparse",
        faster={"floor": 2.0},
    ),
    "realistic": Target("30 % padding, 30 % zero advantage, no KL, against dense", faster={"fastrl-dense": 1.8}),
    "token": Target(
        "token loss with metrics",
        kernel_ms=0.015,
        launches=1,
        faster={"eager": 10.0, "torch.compile": 2.0},
        first_seconds=FIRST_SECONDS,
    ),
    "advantages": Target("group advantages, 1024 groups of 8", kernel_ms=0.01, faster={"verl": 100.0}),
    "gae": Target("GAE, 512 x 8192", kernel_ms=0.03, faster={"eager": 100.0}, first_seconds=FIRST_SECONDS),
    "cpu-hidden": Target("GRPO from hidden states, trainable head, CPU", device="cpu", time=0.6, memory=0.12),
    "cpu-hidden-frozen": Target("GRPO from hidden states, frozen head, CPU", device="cpu", time=0.6, memory=0.12),
    "cpu-gae": Target("GAE, 512 x 8192, CPU", device="cpu", faster={"eager": 20.0}),
}


class Verdict(NamedTuple):
    case: str
    wanted: str
    found: str
    met: bool | None
    """None: not measured."""
    target: str = ""


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """One per bound of each case with a target for its device among the rows."""
    for case in dict.fromkeys(row["case"] for row in rows if row.get("target")):
        by_provider = {row["provider"]: row for row in rows if row["case"] == case}
        name = next(row["target"] for row in by_provider.values())
        target = TARGETS[name]
        ours = by_provider.get(target.ours)
        if ours is not None and target.device == ours["shape"].get("device", "cuda"):
            for verdict in _of_case(case, target, ours, by_provider):
                yield verdict._replace(target=name)


def _of_case(case: str, target: Target, ours: Row, others: dict[str, Row]) -> Iterator[Verdict]:
    if target.share is not None:
        share = ours["rate"]["share"] if ours["ms"] else None
        yield _verdict(case, f">= {target.share:.0%} of the ceiling", share, "{:.0%}", share and share >= target.share)
    floor = target.floor_at(ours["shape"].get("hidden", 0))
    if floor is not None:
        slower = _slower(ours, others.get("floor"))
        yield _verdict(case, f"<= {floor:.3g}x the floor", slower, "{:.2f}x", slower and slower <= floor)
    yield from _of_kernels(case, target, ours)
    for name, wanted_ratio in target.faster.items():
        found = ratio(ours, others.get(name))
        wanted = f">= {wanted_ratio:g}x as fast as {name}"
        yield _verdict(case, wanted, found, f"{{:.2f}}x{_off(ours)}", found and found >= wanted_ratio)
    yield from _against_eager(case, target, ours, others)
    if target.head is not None:
        peak, bound = ours["peak_mib"], gradients_mib(ours["shape"], target.head) + _buffer_mib(ours["shape"])
        wanted = f"<= {bound:.0f} MiB, gradients and one buffer"
        yield _verdict(case, wanted, peak, "{:.0f} MiB", peak is not None and peak <= bound)
    failed = any(note.startswith("no first call") for note in ours.get("notes", ()))
    if target.first_seconds is not None and (ours.get("first_ms") or failed):
        seconds = ours["first_ms"] / 1e3 if ours.get("first_ms") else None
        wanted = f"first call <= {target.first_seconds:g} s"
        yield _verdict(case, wanted, seconds, "{:.1f} s", seconds and seconds <= target.first_seconds)


def _of_kernels(case: str, target: Target, ours: Row) -> Iterator[Verdict]:
    """Time and number of what forward launches: by the profiler, since a clock of calls says nothing of either."""
    found = ours.get("forward_kernels") or {}
    if target.kernel_ms is not None:
        own = found.get("ms")
        wanted = f"<= {1e3 * target.kernel_ms:.3g} us of kernels in forward"
        yield _verdict(case, wanted, own and 1e3 * own, "{:.3g} us", own and own <= target.kernel_ms)
    if target.launches is not None:
        triton = found.get("triton")
        pattern = f"{{}} of Triton, {found['launches'] - triton} of torch" if found else ""
        wanted = f"{target.launches} launch of Triton in forward"
        yield _verdict(case, wanted, triton, pattern, triton == target.launches)


def _off(ours: Row) -> str:
    """Of an approximate provider: how far its gradients are off, and what it says that it left out."""
    if ours["status"] != "approximate" or not ours.get("errors"):
        return ""
    gradients = {name: e["relative"] for name, e in ours["errors"].items() if name != "loss"}
    parts = [f"{name} off by {relative:.1e} of its norm" for name, relative in gradients.items()]
    parts += [f"{name.replace('_', ' ')} {value:.1e}" for name, value in (ours.get("measured") or {}).items()]
    return f" ({', '.join(parts)})"


def _against_eager(case: str, target: Target, ours: Row, others: dict[str, Row]) -> Iterator[Verdict]:
    """Time and memory as parts of eager's; beside each, what of it nobody can avoid: the products, the gradients."""
    eager = others.get("eager")
    if target.time is not None:
        slower, products = _slower(ours, eager), _slower(others.get("floor"), eager)
        pattern = "{:.2f}x" + ("" if products is None else f" (the bare products {products:.2f}x)")
        yield _verdict(case, f"<= {target.time:g}x eager's time", slower, pattern, slower and slower <= target.time)
    if target.memory is not None:
        theirs = eager and eager["peak_mib"]
        part = ours["peak_mib"] / theirs if theirs and ours["peak_mib"] is not None else None
        head = "frozen" if "frozen" in case else "trainable"
        least = gradients_mib(ours["shape"], head) / theirs if theirs else 0.0
        pattern = f"{{:.3f}}x (the gradients {least:.3f}x)"
        met = part is not None and part <= target.memory
        yield _verdict(case, f"<= {target.memory:g}x eager's memory", part, pattern, met)


def gradients_mib(shape: Mapping[str, Any], head: str) -> float:
    """dhidden, and for a trainable head its gradient: in its own dtype from one product, else summed in fp32 and once
    more in the head's dtype if that is another."""
    item = DTYPES[shape["dtype"]].itemsize
    size = shape["rows"] * shape["hidden"] * item
    if head == "trainable":
        size += shape["vocab"] * shape["hidden"] * (item if item == 4 or _in_one(shape) else 4 + item)
    return size / 2**20


def _logits_mib(shape: Mapping[str, Any]) -> float:
    return shape["rows"] * shape["vocab"] * DTYPES[shape["dtype"]].itemsize / 2**20


def _in_one(shape: Mapping[str, Any]) -> bool:
    """Whether a bfloat16 head takes all rows at once, in up to two buffers."""
    return shape["dtype"] == "bf16" and _logits_mib(shape) <= 2 * BUFFER_MIB


def _buffer_mib(shape: Mapping[str, Any]) -> float:
    return (_logits_mib(shape) if _in_one(shape) else min(BUFFER_MIB, _logits_mib(shape))) + SLACK_MIB


def _verdict(case: str, wanted: str, found: float | None, pattern: str, met: Any) -> Verdict:
    if found is None:
        return Verdict(case, wanted, "not measured", None)
    return Verdict(case, wanted, pattern.format(found), bool(met))


def ratio(ours: Row, other: Row | None) -> float | None:
    """other's time / ours, the median over rounds; None where either has no speed."""
    if other is None or not ours["ms"] or not other["ms"]:
        return None
    pairs = zip(other["ms"]["samples"], ours["ms"]["samples"], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def _slower(one: Row | None, other: Row | None) -> float | None:
    """one's time / the other's."""
    found = None if one is None else ratio(one, other)
    return None if found is None else 1 / found
