"""A pytest plug-in for the peers' own tests: their losses are fastrl's. It prints how often each was called."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from typing import Any

from parity import peers

sys.path.insert(0, str(peers.FOLDER))
sys.meta_path.insert(0, peers._Finder(peers._STOOD_IN))
CALLS: Counter[str] = Counter()


def counted(name: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        CALLS[name] += 1
        return function(*args, **options)

    return call


def stand_in_for_verl() -> None:
    import fastrl.adapters.verl as adapter

    for table in (adapter.POLICY_LOSSES, adapter.ADVANTAGE_ESTIMATORS):
        for name, function in table.items():
            table[name] = counted(name, function)
    peers.verl()
    adapter.install()


def pytest_configure() -> None:
    if any("trainer" in argument for argument in sys.argv):
        stand_in_for_verl()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """OpenRLHF's tests load its loss file by themselves, so the names are put into the test modules."""
    from fastrl.adapters import openrlhf as adapter

    for name in ("PolicyLoss", "ValueLoss", "PairWiseLoss", "LogExpLoss"):
        ours = getattr(adapter, name)
        replaced = [item.module for item in items if getattr(item.module, name, ours) is not ours]
        for module in replaced:
            setattr(module, name, ours)
        if replaced:
            ours.forward = counted(name, ours.forward)


def pytest_sessionfinish() -> None:
    print("CALLS", *sorted(CALLS))
