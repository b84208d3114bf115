"""`python -m bench codegen`: what the compiler made of every kernel for every architecture; needs no GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

KEYS = (
    "kernel", "arch", "registers", "spill_bytes", "shared_bytes", "load_bytes", "store_bytes", "vocabulary", "error",
)  # fmt: skip
_MEANING = (
    "load and store bytes: the narrowest access in the loops over the vocabulary, 16 is best, 0 = no such loop; "
    "registers per thread"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name contains TEXT")
    parser.add_argument("--arch", nargs="+", metavar="ARCH", help="only these architectures (default: all)")


def main(options: argparse.Namespace) -> int:
    """Print the report; 1 if a kernel did not compile, 2 if nothing could be compiled at all."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("codegen compiles real kernels: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    try:
        from fastrl_kernels import codegen
    except ImportError as error:
        print(f"codegen needs Triton: {error}", file=sys.stderr)
        return 2
    unknown = set(options.arch or ()) - set(codegen.ARCHITECTURES)
    if unknown:
        known = ", ".join(codegen.ARCHITECTURES)
        print(f"--arch: expected {known}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    pairs = [
        (build, arch)
        for build in codegen.builds()
        if options.kernel in build.name
        for arch in options.arch or codegen.ARCHITECTURES
    ]
    progress = track(pairs, description="compiling", console=Console(stderr=True), transient=True)
    rows = [_row(codegen.report(build, arch)) for build, arch in progress]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        (Console() if sys.stdout.isatty() else Console(width=130)).print(_table(rows))
    return int(any(row["error"] for row in rows))


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """All keys in order; what a failed build does not have is None."""
    return {key: found.get(key) for key in KEYS}


def _table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="Generated code", caption=_MEANING)
    made.add_column("kernel")
    made.add_column("arch")
    for key in KEYS[2:7]:
        made.add_column(key.replace("_", " "), justify="right")
    made.add_column("error")
    for row in rows:
        bad = row["error"] or row["spill_bytes"] or (row["vocabulary"] and 0 < row["load_bytes"] < 16)
        cells = ["-" if row[key] is None else str(row[key]) for key in KEYS[2:7]]
        made.add_row(row["kernel"], row["arch"], *cells, row["error"] or "", style="yellow" if bad else None)
    return made
