"""verl's own code, without what it needs beside its formulas."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

from bench.case import Unavailable

FOLDER = Path(sys.prefix) / "peers"
"""Where `make test` puts verl: its wheel holds a top-level package `tests`, which belongs on nobody's path."""


class _Bare(types.ModuleType):
    """A package that lends its folder; its `__init__`, which would load Ray and a trainer, never runs."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})  # configurations, named in annotations only


def verl(module: str) -> types.ModuleType:
    """A module of verl, installed or in `FOLDER`. Raises `Unavailable` with the reason."""
    spec = importlib.util.find_spec("verl")
    root = Path(spec.origin).parent if spec and spec.origin else FOLDER / "verl"
    if not root.exists():
        raise Unavailable("verl is not installed")
    bare = {"verl": root, "verl.workers": root / "workers", "verl.workers.config": root / "workers" / "config"}
    added = [name for name in bare if name not in sys.modules]
    for name in added:
        sys.modules[name] = _Bare(name)
        sys.modules[name].__path__ = [str(bare[name])]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"verl needs more than is installed: {error}") from None
    finally:
        for name in added:  # nobody else finds the bare ones
            del sys.modules[name]
