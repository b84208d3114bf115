"""What the JSON files in bench/results say: which figures count, and the page that shows them all.

A case that was measured more than once is taken from its newest run in which fastrl's times were steady. Where fastrl
is slower, or needs more memory, than a correct provider, the text says so; so it does of what was not measured.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import targets
from bench.rows import steady

COLUMNS = ("eager", "torch.compile", "torch-native", "trl", "liger", "verl", "cut-cross-entropy", "fastrl")
LABELS = {
    r"logits-grpo-N(\d+)-V(\d+)-(\w+)": "GRPO with KL from logits, {} x {} {}",
    r"logits-grpo-tickets-N(\d+)-V(\d+)-(\w+)": "GRPO with KL from logits, tiles by tickets, {} x {} {}",
    r"logits-gspo-N(\d+)-V(\d+)-(\w+)": "GSPO with KL from logits, {} x {} {}",
    r"logits-score-N(\d+)-V(\d+)-(\w+)": "log-probs and entropies from logits, {} x {} {}",
    r"hidden-peaked-N(\d+)-H(\d+)-V(\d+)-(\w+)": "GRPO from hidden states, peaked distribution, {} x {} x {} {}",
    r"hidden-realistic-N(\d+)-H(\d+)-V(\d+)-(\w+)": (
        "GRPO from hidden states with padding and zero advantages, {} x {} x {} {}"
    ),
    r"(?:cpu-)?hidden-(\w+)-N(\d+)-H(\d+)-V(\d+)-(\w+)": "GRPO from hidden states, {} head, {} x {} x {} {}",
    r"token-policy-N(\d+)": "loss and metrics from log-probs, {} tokens",
    r"token-advantages-S(\d+)-G(\d+)": "group advantages, {} rewards in groups of {}",
    r"scan-gae-B(\d+)-T(\d+)": "GAE, {} x {}",
}
OTHER_CLOCKS = {
    "cold_ms": "The same in ms after other data went through the caches:",
    "wall_ms": "The same in ms by the wall clock, from an idle GPU until it has done all, the host's work included:",
}
MEMORY_FROM = 16.0
"""MiB of difference below which memory is not worth a sentence."""

Row = dict[str, Any]
Documents = dict[str, dict[str, Any]]


def load(folder: Path) -> Documents:
    """File name -> document, oldest first; runs with tiny shapes count for nothing."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(((k, d) for k, d in found.items() if not d["quick"]), key=lambda pair: pair[1]["date"]))


def page(documents: Documents) -> str:
    """docs/benchmarks.md: every figure, device by device."""
    parts = [
        "# Benchmarks",
        "Written by `python -m bench readme` from the files of `bench/results`, and from nothing else.",
    ]
    for device, runs in by_device(documents):
        parts += [f"## {'CPU' if device == 'cpu' else 'GPU'}", *_device(runs, device)]
    return "\n\n".join([*parts, *unmeasured(documents)]) + "\n"


def by_device(documents: Documents) -> Iterator[tuple[str, Documents]]:
    """A GPU's runs before a CPU's."""
    for device in sorted({document["device"] for document in documents.values()}, reverse=True):
        yield device, {name: d for name, d in documents.items() if d["device"] == device}


def unmeasured(documents: Documents) -> list[str]:
    """Every target that has not been decided in any case, device by device."""
    runs = dict(by_device(documents))
    parts = []
    for device, where in (("cuda", "GPU"), ("cpu", "CPU")):
        chosen = choose(runs.get(device, {}))[0]
        decided = {verdict.target for verdict in verdicts(chosen) if verdict.met is not None}
        waiting = [t.text for name, t in targets.TARGETS.items() if t.device == device and name not in decided]
        if waiting:
            first = "" if device in runs else f"**No {where} figure has been measured yet.** "
            parts.append(wrapped(f"{first}Targets that wait for a {where}: {'; '.join(waiting)}."))
    return parts


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def measured_on(documents: Documents, device: str) -> str:
    """A sentence: the machines, what a CPU's figures are worth, the versions."""
    machines = " and on ".join(dict.fromkeys(_machine(document) for document in documents.values()))
    warning = ", where fastrl runs in plain torch: this says nothing of the kernels" if device == "cpu" else ""
    versions = list(documents.values())[-1]["versions"]
    peers = ", ".join(f"{name} {versions[name]}" for name in ("torch", "trl", "liger", "verl") if versions.get(name))
    return f"Measured on {machines}{warning}; {peers}."


def _machine(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return machine["gpu"] if document["device"] != "cpu" else f"a CPU ({machine['cpu']}, {machine['cores']} cores)"


def _device(documents: Documents, device: str) -> Iterator[str]:
    yield wrapped(f"{measured_on(documents, device)} Commands, commits and spread are in the files:")
    yield "\n".join(f"- [`{name}`](../bench/results/{name}), on {_machine(d)}" for name, d in documents.items())
    yield "Time in ms, the median of the rounds:"
    chosen, withheld = choose(documents)
    yield _table(chosen, lambda row: _figure(row["ms"] and row["ms"]["median"]))
    for key, title in OTHER_CLOCKS.items():
        timed = {name: rows for name, rows in chosen.items() if any(row.get(key) for row in rows)}
        if timed:
            yield title
            yield _table(timed, lambda row, key=key: _figure((row.get(key) or {}).get("median")))
    yield "Peak memory beyond the inputs, in MiB:"
    yield _table(memory(documents), lambda row: _figure(row["peak_mib"]))
    yield wrapped(losses(chosen, memory(documents)))
    if withheld:
        names = "; ".join(f"{label(name)} ({why})" for name, why in withheld.items())
        yield wrapped(f"No time of fastrl's is given for: {names}.")
    found = verdicts(chosen)
    if found:
        yield "\n".join(["| case | target | found |", "|---|---|---|"] + [
            f"| {label(v.case)} | {v.wanted} | {v.found}{' (missed)' * (v.met is False)} |" for v in found
        ])  # fmt: skip


def verdicts(chosen: dict[str, list[Row]]) -> list[targets.Verdict]:
    return list(targets.verdicts([row for rows in chosen.values() for row in rows]))


def choose(documents: Documents) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Case -> rows of its newest run with steady times of fastrl; and the cases without one, with the reason: skipped
    for want of time among them. A wrong result discards the older runs."""
    chosen: dict[str, list[Row]] = {}
    withheld: dict[str, str] = {}
    for document in documents.values():
        told = (row["case"] for row in document["rows"] if row["ms"] or row["status"] == "skipped")
        for name in dict.fromkeys(told):
            rows = [row for row in document["rows"] if row["case"] == name]
            ours = next((row for row in rows if row["provider"] == "fastrl"), None)
            if ours is not None and ours["status"] == "wrong":
                chosen.pop(name, None)
                withheld[name] = f"wrong: {ours['reason']}"
            elif ours is not None and ours["status"] == "skipped":
                withheld.setdefault(name, ours["reason"])
            elif ours is not None and steady(ours):
                chosen[name] = rows
            else:
                withheld.setdefault(name, "the rounds differed too much")
    kept = {name: chosen[name] for name in _ordered(chosen)}
    return kept, {name: withheld[name] for name in _ordered(withheld) if name not in chosen}


def memory(documents: Documents) -> dict[str, list[Row]]:
    """Case -> for each provider the row of the newest run that took its memory; memory does not suffer from neighbours.
    Cases without a vocabulary have none worth a table."""
    found: dict[str, dict[str, Row]] = {}
    for document in documents.values():
        for row in document["rows"]:
            if row["peak_mib"] is not None and row["shape"]["vocab"] and row["suite"] in ("logits", "hidden", "cpu"):
                found.setdefault(row["case"], {})[row["provider"]] = row
    return {name: list(found[name].values()) for name in _ordered(found)}


def _ordered(names: Any) -> list[str]:
    """By kind, in the order of `LABELS`; within a kind as measured."""
    return sorted(dict.fromkeys(names), key=lambda name: [not re.fullmatch(kind, name) for kind in LABELS])


def label(case: str) -> str:
    """The case in words; its name where there are none."""
    for pattern, words in LABELS.items():
        match = re.fullmatch(pattern, case)
        if match:
            return words.format(*match.groups())
    return case


def _table(cases: dict[str, list[Row]], cell: Any) -> str:
    """A line per case, a column per provider that has any figure."""
    cells = {name: {row["provider"]: cell(row) for row in rows} for name, rows in cases.items()}
    columns = [column for column in COLUMNS if any(line.get(column, "-") != "-" for line in cells.values())]
    lines = [["case", *columns], ["---"] * (len(columns) + 1)]
    lines += [[label(name), *(line.get(column, "-") for column in columns)] for name, line in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: float | None) -> str:
    """Four digits, and no decimals of large numbers."""
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def losses(chosen: dict[str, list[Row]], peaks: dict[str, list[Row]]) -> str:
    """Every correct provider that is faster than fastrl, or needs noticeably less memory."""
    slower, larger = [], []
    for name, rows in chosen.items():
        lost = [f"{peer} is {1 / r:.1f} times as fast" for peer, r in speedups(rows).items() if r < 1]
        slower += [f"{label(name)} ({', '.join(lost)})"] * bool(lost)
    for name, rows in peaks.items():
        ours = next((row["peak_mib"] for row in rows if row["provider"] == "fastrl"), 0.0)
        lost = [
            f"{row['provider']} {_figure(row['peak_mib'])} against {_figure(ours)}"
            for row in rows if _rival(row) and row["peak_mib"] + MEMORY_FROM < ours
        ]  # fmt: skip
        larger += [f"{label(name)} ({', '.join(lost)} MiB)"] * bool(lost)
    time = f"fastrl is slower at: {'; '.join(slower)}." if slower else "No correct provider was faster."
    return f"{time} It needs more memory at: {'; '.join(larger)}." if larger else time


def speedups(rows: list[Row]) -> dict[str, float]:
    """Provider -> how many times as fast as it fastrl is in one case; correct ones with steady times only."""
    ours = next(row for row in rows if row["provider"] == "fastrl")
    ratios = {row["provider"]: targets.ratio(ours, row) for row in rows if _rival(row) and steady(row)}
    return {provider: ratio for provider, ratio in ratios.items() if ratio is not None}


def _rival(row: Row) -> bool:
    return not row["provider"].startswith("fastrl") and row["provider"] != "floor" and row["status"] == "ok"
