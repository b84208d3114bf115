"""The one list of cases."""

from __future__ import annotations

import dataclasses

from bench import hidden, logits, scan, tokens
from bench.case import Case, Inputs, Provider, Run, Shape

SUITES = {"logits": logits.cases, "hidden": hidden.cases, "token": tokens.cases, "scan": scan.cases}
PROVIDERS = ("eager", "eager-fp32", "torch.compile", "torch-native", "fastrl", "fastrl-inplace", "liger", "trl")


def cases(suite: str, device: str, quick: bool) -> list[Case]:
    """The cases of one suite, or of "all"."""
    return [case for name, make in SUITES.items() if suite in (name, "all") for case in make(device, quick)]


def with_wrong_provider(case: Case) -> Case:
    """The case with one more provider, "wrong": eager, a tenth off. It shows that the check is awake."""

    def load(shape: Shape) -> Run:
        right = case.providers["eager"].load(shape)

        def run(inputs: Inputs) -> Inputs:
            return {name: 1.1 * value for name, value in right(inputs).items()}

        return run

    return dataclasses.replace(case, providers={**case.providers, "wrong": Provider(load)})
