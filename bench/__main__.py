"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench import machine, memory, plots, report, runner, suites, targets
from bench import rows as every_row
from bench.budget import Budget
from bench.case import Case
from bench.quiet import undisturbed
from bench.timing import copy_bandwidth, gemm_rate

DESCRIPTION = """Time and memory of fastrl against plain torch, torch.compile, Liger and TRL.

Every provider is first held against a float64 oracle, values and every gradient; one whose error exceeds twice
that of plain torch in the same dtype is reported as wrong and gets no speed. Providers are timed in turns, on
inputs made anew outside the clock, and once more ("cold ms") after other data went through the caches. On a GPU "ms" is
the device's time while the host runs ahead, "wall ms" that of a call on an idle device, Python included. Rounds in
which other processes took over a tenth of the CPU are dropped for all providers alike; speed-ups are paired round
by round, and withheld where the times are too scattered. "first ms" is one call of one fresh process. Shares are of
this machine's own copy bandwidth and GEMM rate.

suites:
  logits   GRPO with KL from logits, forward and backward; log-probs and entropies without gradient
  hidden   GRPO with KL from hidden states and the head, trainable and frozen
  token    policy loss from log-probs with metrics; group-normalised advantages
  scan     GAE over padded batches with holes in the mask, against the loop over T
  memory   peak memory as N and V grow, from logits and from hidden states; on a GPU time as well
  cpu      time and memory of the hidden level over N, H and V, on the CPU only
  all      all of them
  targets  the cases of bench/targets.py with the providers that each is compared with, and the verdicts;
           with --device cpu those of the CPU; on a GPU the kernel whose programs wait for each other comes last, where
           a hang can lose no other figure. --budget 480 is a budget of eight minutes, not a promise that all of
           them fit: cases without room are skipped, with a note

The provider "floor" is no implementation: the bare copy of the logits, or the bare matrix products, in the same rounds.

Two reports need no GPU: `python -m bench codegen`, registers, spills and access widths of every kernel, and
`python -m bench cost`, the bytes that they move and the FLOP of the GEMMs, counted. `python -m bench readme` writes the
README's figures from the JSON files."""
ON_CPU = (
    "[bold yellow]{}mall cases on the CPU, where fastrl runs in plain torch. "
    "These numbers say nothing about the Triton kernels.[/]"
)


TOOLS = ("codegen", "cost", "readme")
"""Commands with options of their own, and the modules that hold them."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--suite", choices=(*suites.SUITES, "all", "targets"), default="all", help="what to run (default: all)"
    )
    made.add_argument(
        "--providers", nargs="+", choices=suites.PROVIDERS, metavar="NAME", default=list(suites.PROVIDERS),
        help=f"whom to run: {', '.join(suites.PROVIDERS)} (default: all)",
    )  # fmt: skip
    made.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    made.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help="start no case that would end after this time, going by the one before; what is left out is noted",
    )  # fmt: skip
    made.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR",
        help="folder for the JSON (default: bench/results)",
    )  # fmt: skip
    made.add_argument("--name", metavar="NAME", help="file name without .json (default: from device and suite)")
    made.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    made.add_argument("--plot", action="store_true", help="also write NAME.png, and NAME-growth.png")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    made.add_argument("--inject-wrong", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--worker", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    return made


def main(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0] in TOOLS:
        return _tool(arguments[0], arguments[1:])
    options = parser().parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    _quiet()
    if options.worker:
        name, provider = options.worker
        case = next(case for case in suites.cases("all", options.device, options.quick) if case.name == name)
        print(json.dumps(memory.worker(case, provider)))
        return 0
    cases = [c for c in suites.cases(options.suite, options.device, options.quick) if options.case in c.name]
    if not cases:
        print(f"--case: no case of suite {options.suite} contains {options.case!r}", file=sys.stderr)
        return 2
    if options.inject_wrong:
        cases = [suites.with_wrong_provider(case) for case in cases]
        options.providers = [*options.providers, "wrong"]
    return _benchmark(cases, options)


def _tool(name: str, arguments: list[str]) -> int:
    """Imported here: Triton asks once, when it is imported, whether its kernels run in the interpreter."""
    if name == "cost":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    tool = importlib.import_module(f"bench.{name}")
    sub = argparse.ArgumentParser(prog=f"python -m bench {name}", description=tool.__doc__)
    tool.add_arguments(sub)
    return tool.main(sub.parse_args(arguments))


def _benchmark(cases: list[Case], options: argparse.Namespace) -> int:
    """Run the cases; the JSON is written after each, so that an interrupted run keeps what it has."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    budget = Budget(options.budget)
    path = options.out / f"{options.name or default_name(options)}.json"
    if options.device == "cpu":
        console.print(ON_CPU.format("S" if torch.cuda.is_available() else "No GPU here: s"))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring the ceilings", total=len(cases))
        ceilings = _ceilings(cases, options.device, options.quick)
        console.print(
            "ceilings: "
            + ", ".join(f"{name} {'disturbed' if x is None else f'{x:.4g}'}" for name, x in ceilings.items())
        )
        document = _document(options, ceilings)
        for i, case in enumerate(cases):
            rows = _rows(case, options, ceilings, budget, len(cases) - i, partial(_say, progress, task))
            document["rows"] += rows
            report.write(path, document)
            console.print(report.table(rows))
            progress.advance(task)
    found = [] if options.quick else list(targets.verdicts(document["rows"]))  # tiny shapes say nothing of them
    name = document["machine"]["cpu" if options.device == "cpu" else "gpu"]
    if found:
        where = "the CPU, against plain torch" if options.device == "cpu" else name
        console.print(report.verdict_table(found, where))
    console.print(f"written: {path}", soft_wrap=True)
    if options.plot:
        for written in plots.draw(path, document["rows"], name):
            console.print(f"written: {written}", soft_wrap=True)
    return 0


def _say(progress: Progress, task: TaskID, text: str) -> None:
    progress.update(task, description=text)


def _rows(
    case: Case,
    options: argparse.Namespace,
    ceilings: dict[str, float | None],
    budget: Budget,
    cases_left: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run a case in its share of the seconds left, or note that there is no room for it."""
    seconds = budget.share(cases_left)
    if seconds is None:
        return every_row.skipped(case, options.providers, f"the budget of {options.budget:g} s was spent")
    start = time.monotonic()
    rows = runner.run_case(case, options.providers, ceilings, options.quick, say, seconds)
    budget.took(time.monotonic() - start)
    return rows


def _ceilings(cases: list[Case], device: str, quick: bool) -> dict[str, float | None]:
    """copy_gbs: GB/s read plus written; gemm_DTYPE_tflops: TFLOP/s for each dtype of a case with products. None where
    other processes never let it be measured; a quick run takes what comes, and so does a GPU, whose rates do not wait
    for a quiet processor."""
    tries = 1 if quick or device != "cpu" else 10
    dtypes = sorted({case.shape.dtype for case in cases if case.least_flops})
    measures = {"copy_gbs": lambda: copy_bandwidth(device)}
    measures |= {f"gemm_{dtype}_tflops": lambda dtype=dtype: gemm_rate(dtype, device) for dtype in dtypes}
    found = {name: undisturbed(measure, tries) for name, measure in measures.items()}
    return {name: rate if fair or tries == 1 else None for name, (rate, fair) in found.items()}


def _document(options: argparse.Namespace, ceilings: dict[str, float | None]) -> dict[str, Any]:
    """Everything but the rows; the command is rebuilt from the options, since the typed one may hold paths."""
    chosen = options.providers if set(options.providers) < set(suites.PROVIDERS) else []
    command = ["python -m bench", f"--suite {options.suite}", f"--device {options.device}"]
    command += [f"--providers {' '.join(chosen)}"] * bool(chosen) + [f"--case {options.case}"] * bool(options.case)
    command += [] if options.budget is None else [f"--budget {options.budget:g}"]
    command += ["--quick"] * options.quick
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "git": machine.git(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "device": options.device,
        "quick": options.quick,
        "ceilings": ceilings,
        "rows": [],
    }


def default_name(options: argparse.Namespace) -> str:
    """E.g. "cpu", "nvidia-h200-hidden", "cpu-token-quick"."""
    device = options.device
    if device == "cuda":
        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    suite = f"-{options.suite}" * (options.suite != "all")
    return f"{device}{suite}{'-quick' * options.quick}"


def _quiet() -> None:
    """Other libraries' warnings would tear the progress bar; what matters comes back as a reason in a row."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "trl", "torch._dynamo", "torch._inductor"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
