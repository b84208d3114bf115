"""Parity with the peers' own code; see `peers.py` for how it is loaded."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the peers' own, and not ours to mend
