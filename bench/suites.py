"""The one list of cases."""

from __future__ import annotations

import dataclasses
from collections import Counter

from bench import cpu, growth, logits, scan, sparse, tokens
from bench.case import Case, Inputs, Provider, Run, Shape
from bench.targets import TARGETS

SUITES = {
    "logits": logits.cases,
    "hidden": sparse.hidden_cases,
    "token": tokens.cases,
    "scan": scan.cases,
    "memory": growth.cases,
    "cpu": cpu.cases,
}
PROVIDERS = (
    "eager", "eager-fp32", "torch.compile", "torch-native", "fastrl", "fastrl-inplace", "fastrl-tickets",
    "fastrl-dense", "fastrl-sparse", "fastrl-overlap", "fastrl-fp32-logits", "liger", "trl", "verl",
    "cut-cross-entropy", "floor",
)  # fmt: skip


def cases(suite: str, device: str, quick: bool) -> list[Case]:
    """The cases of one suite, of "all", or those of "targets"; those that wait come last."""
    if suite == "targets":
        found = _target_cases(device, quick)
    else:
        found = [case for name, make in SUITES.items() if suite in (name, "all") for case in make(device, quick)]
    return sorted(found, key=lambda case: case.waits)


def _target_cases(device: str, quick: bool) -> list[Case]:
    """Only the cases that a target for the device speaks of, only with the providers that it compares. The short ones
    come first, then one case of each target, the one with a first call if any, so that a budget that ends early leaves
    no target without a figure. A GPU's cases that wait are among them: they are for a choice still to be made."""
    every = cases("all", device, quick)
    waiting = [c for c in every if c.waits and device != "cpu"]
    found = [c for c in every if c.target and TARGETS[c.target].device == device]
    found.sort(key=lambda case: not case.first_call)
    seen: Counter[str] = Counter()
    placed = []
    for case in found:
        assert case.target
        target = TARGETS[case.target]
        wanted = set(target.providers) - (set() if case.first_call else set(target.beside_once))
        chosen = {name: provider for name, provider in case.providers.items() if name in wanted}
        long = case.least_flops is not None
        placed.append((long, seen[case.target] if long else 0, dataclasses.replace(case, providers=chosen)))
        seen[case.target] += 1
    return [case for *_, case in sorted(placed, key=lambda place: place[:2])] + waiting


def with_wrong_provider(case: Case) -> Case:
    """The case with one more provider, "wrong": eager, a tenth off. It shows that the check is awake."""

    def load(shape: Shape) -> Run:
        right = case.providers["eager"].load(shape)

        def run(inputs: Inputs) -> Inputs:
            return {name: 1.1 * value for name, value in right(inputs).items()}

        return run

    return dataclasses.replace(case, providers={**case.providers, "wrong": Provider(load)})
