"""What fastrl is meant to reach on one H200, as data; the verdict on a run's rows is computed from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Bounds on the provider "fastrl" in one case."""

    text: str
    share: float | None = None
    """Of the measured ceiling, at least."""
    floor: float | None = None
    """Times the provider "floor", which does the bare copy or products in the same rounds, at most."""
    ms: float | None = None
    faster: Mapping[str, float] = field(default_factory=dict)
    """Provider -> how many times as fast, at least: the median over rounds of the ratio."""

    @property
    def providers(self) -> tuple[str, ...]:
        """Whom a run for the targets needs."""
        return ("eager", *(name for name in self.faster if name != "eager"), "fastrl", "floor")


TARGETS = {
    "score": Target("log-probs and entropies from logits, no gradient", share=0.9, faster={"trl": 1.0}),
    "logits": Target("GRPO with KL from logits, token level", floor=1.2, faster={"liger": 1.4}),
    "logits-sequence": Target("GRPO with KL from logits, sequence level", floor=1.2, faster={"liger": 2.0}),
    "hidden": Target(
        "GRPO from hidden states, trainable head", floor=1 / 0.95, faster={"trl": 1.3, "liger": 5.0}
    ),
    "hidden-small": Target(
        "GRPO from hidden states, trainable head, H = 1536", floor=1 / 0.9, faster={"trl": 1.3, "liger": 5.0}
    ),
    "hidden-frozen": Target("GRPO from hidden states, frozen head", floor=1 / 0.95),
    "realistic": Target("30 % padding, 30 % zero advantage, no KL, against dense", faster={"fastrl-dense": 1.8}),
    "token": Target("token loss with metrics", ms=0.015, faster={"eager": 10.0, "torch.compile": 2.0}),
    "advantages": Target("group advantages, 1024 groups of 8", ms=0.01, faster={"verl": 100.0}),
    "gae": Target("GAE, 512 x 8192", ms=0.03, faster={"eager": 100.0}),
}  # fmt: skip


class Verdict(NamedTuple):
    case: str
    wanted: str
    found: str
    met: bool | None
    """None: not measured."""


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """One per bound of each case with a target among the rows."""
    for case in dict.fromkeys(row["case"] for row in rows if row.get("target")):
        by_provider = {row["provider"]: row for row in rows if row["case"] == case}
        ours = by_provider.get("fastrl")
        if ours is not None:
            yield from _of_case(case, TARGETS[ours["target"]], ours, by_provider)


def _of_case(case: str, target: Target, ours: Row, others: dict[str, Row]) -> Iterator[Verdict]:
    share = ours["rate"]["share"] if ours["ms"] else None
    median = ours["ms"]["median"] if ours["ms"] else None
    ratios = {name: ratio(ours, others.get(name)) for name in ("floor", *target.faster)}
    slower = None if ratios["floor"] is None else 1 / ratios["floor"]
    if target.share is not None:
        yield _verdict(case, f">= {target.share:.0%} of the ceiling", share, "{:.0%}", share and share >= target.share)
    if target.floor is not None:
        yield _verdict(case, f"<= {target.floor:.3g}x the floor", slower, "{:.2f}x", slower and slower <= target.floor)
    if target.ms is not None:
        yield _verdict(case, f"<= {1e3 * target.ms:.3g} us", median and 1e3 * median, "{:.3g} us",
                       median and median <= target.ms)  # fmt: skip
    for name, wanted in target.faster.items():
        found = ratios[name]
        yield _verdict(case, f">= {wanted:g}x as fast as {name}", found, "{:.2f}x", found and found >= wanted)


def _verdict(case: str, wanted: str, found: float | None, pattern: str, met: bool | None) -> Verdict:
    if found is None:
        return Verdict(case, wanted, "not measured", None)
    return Verdict(case, wanted, pattern.format(found), bool(met))


def ratio(ours: Row, other: Row | None) -> float | None:
    """other's time / ours, the median over rounds; None where either has no speed."""
    if other is None or not ours["ms"] or not other["ms"]:
        return None
    pairs = zip(other["ms"]["samples"], ours["ms"]["samples"], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)
