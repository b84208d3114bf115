"""`python -m bench readme [--check]`: the README's summary and docs/benchmarks.md, from the files in bench/results."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench import figures
from bench.figures import Documents, Row

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench: begin, written by `python -m bench readme` -->", "<!-- bench: end -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder with the JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file with the two markers")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the file with every figure")


def main(options: argparse.Namespace) -> int:
    """Write both; 1 if `--check` finds another text, 2 if the markers are missing."""
    text = options.readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{options.readme.name} needs one line {BEGIN!r} and one {END!r}", file=sys.stderr)
        return 2
    documents = figures.load(options.results)
    before, rest = text.split(BEGIN)
    written = {
        options.readme: f"{before}{BEGIN}\n{section(documents)}{END}{rest.split(END)[1]}",
        options.page: figures.page(documents),
    }
    stale = [path for path, new in written.items() if not path.exists() or path.read_text() != new]
    for path in stale:
        if options.check:
            print(f"{path.name} is out of date: python -m bench readme", file=sys.stderr)
        else:
            path.write_text(written[path])
    return int(options.check and bool(stale))


def section(documents: Documents) -> str:
    """The text between the markers: a line per kind of work, and where fastrl loses."""
    parts = [part for device, runs in figures.by_device(documents) for part in _device(runs, device)]
    return "\n\n".join([*parts, *figures.unmeasured(documents)]) + "\n"


def _device(documents: Documents, device: str) -> Iterator[str]:
    chosen, withheld = figures.choose(documents)
    peaks = figures.memory(documents)
    yield figures.wrapped(
        f"{figures.measured_on(documents, device)} Every case, with its time, memory and target: "
        "[`docs/benchmarks.md`](docs/benchmarks.md)."
    )
    yield _summary(chosen, peaks)
    yield figures.wrapped(figures.losses(chosen, peaks))
    if withheld:
        yield figures.wrapped(f"No time of fastrl's is given for: {'; '.join(map(figures.label, withheld))}.")
    measured = [verdict for verdict in figures.verdicts(chosen) if verdict.met is not None]
    if measured:
        missed = list(dict.fromkeys(_kind(v.case) for v in measured if not v.met))
        where = f"; missed in some cases of: {'; '.join(missed)}" if missed else ""
        yield figures.wrapped(f"Of {len(measured)} targets {sum(bool(v.met) for v in measured)} are met{where}.")


def _summary(chosen: dict[str, list[Row]], peaks: dict[str, list[Row]]) -> str:
    """Per kind of work the least and the greatest over its cases."""
    lines = [
        "| work | cases | times as fast as eager | as the fastest other | of eager's peak memory |",
        "|---|---|---|---|---|",
    ]
    names = dict.fromkeys([*chosen, *peaks])
    for kind in dict.fromkeys(map(_kind, names)):
        cases = [name for name in names if _kind(name) == kind]
        speeds = [figures.speedups(chosen[name]) for name in cases if name in chosen]
        eager = [found["eager"] for found in speeds if "eager" in found]
        others = [min(rest) for found in speeds if (rest := [r for name, r in found.items() if name != "eager"])]
        parts = [part for name in cases if (part := _of_eager(peaks.get(name, []))) is not None]
        lines.append(f"| {kind} | {len(cases)} | {_range(eager)} | {_range(others)} | {_range(parts)} |")
    return "\n".join(lines)


def _kind(case: str) -> str:
    """The case's label without its sizes."""
    return re.sub(r",? \d.*$", "", figures.label(case))


def _of_eager(rows: Iterable[Row]) -> float | None:
    peaks = {row["provider"]: row["peak_mib"] for row in rows}
    return peaks["fastrl"] / peaks["eager"] if peaks.get("eager") and "fastrl" in peaks else None


def _range(values: list[float]) -> str:
    """Two digits; one number where there is one."""
    shown = list(dict.fromkeys(f"{value:.2g}" for value in (min(values), max(values)))) if values else ["-"]
    return " to ".join(shown)
