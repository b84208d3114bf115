"""Where verl and OpenRLHF are: installed, or unpacked without dependencies beside this repository's environment."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def verl() -> Any:
    """verl's `core_algos`, `config` and `algorithm`, or an exit that says what to install."""
    try:
        names = {
            "core": "verl.trainer.ppo.core_algos",
            "config": "verl.workers.config",
            "algorithm": "verl.trainer.config",
        }
        modules = {key: importlib.import_module(name) for key, name in names.items()}
        return type("verl", (), modules)
    except ImportError:
        return _unpacked("verl", "pip install 'verl>=0.9.1,<0.10'")


def openrlhf() -> Any:
    """OpenRLHF's `loss` module, or an exit that says what to install."""
    try:
        return type("openrlhf", (), {"loss": importlib.import_module("openrlhf.models.loss")})
    except ImportError:
        return _unpacked("openrlhf", "pip install 'openrlhf>=0.11.2,<0.12'")


def _unpacked(package: str, command: str) -> Any:
    """From `<environment>/peers`, where `make test` unpacks both for the tests."""
    tests = Path(__file__).parents[1] / "tests"
    if not (Path(sys.prefix) / "peers" / package).exists() or not tests.exists():
        raise SystemExit(
            f"{package} is not installed: {command}, or run this in the environment that `make test` builds"
        )
    sys.path.append(str(tests))
    from parity import peers

    return getattr(peers, package)()
