"""The peers' own code, loaded without what it needs beside its formulas.

verl and OpenRLHF are installed without dependencies into `<environment>/peers` (see the Makefile): their wheels carry
top-level packages called `tests` and `scripts`, which do not belong on anyone's path. Ray and the like are stood in for
while their modules load; no formula of a peer is touched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "peers"
_STOOD_IN = {"ray", "orjson", "codetiming", "deepspeed"}
# What their trainers import beside it, where it is not installed.
_STOOD_IN_IF_ABSENT = {
    "aiohttp", "cachetools", "fastapi", "flash_attn", "hydra", "msgspec", "peft", "pylatexenc", "torchdata",
    "transfer_queue", "uvicorn", "vllm", "wandb", "zmq",
}  # fmt: skip


def _attribute(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return _remote if name == "remote" else _AnyClass(name, (), {})


def _remote(*decorated, **options):
    """`ray.remote` as a decorator, with and without options, that changes nothing."""
    return decorated[0] if decorated else lambda x: x


class _AnyClass(type):
    def __getattr__(cls, name: str) -> object:
        return _attribute(name)


class _StandIn(types.ModuleType):
    """A module whose every public name is an empty class."""

    def __getattr__(self, name: str) -> object:
        return _attribute(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """The peers' folder on the path and the stand-ins importable; afterwards nobody else can see either."""
    absent = {name for name in _STOOD_IN | _STOOD_IN_IF_ABSENT if name not in sys.modules}
    finder, last = _Finder(_STOOD_IN), _Finder(_STOOD_IN_IF_ABSENT)
    sys.meta_path.insert(0, finder)
    sys.meta_path.append(last)
    sys.path.insert(0, str(FOLDER))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(FOLDER))
        sys.meta_path.remove(finder)
        sys.meta_path.remove(last)
        for name in [name for name in sys.modules if name.split(".")[0] in absent]:
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]


def _need(package: str) -> None:
    if not (FOLDER / package).exists():
        pytest.skip(f"needs {package} in {FOLDER} (`make test` puts it there)", allow_module_level=True)


@functools.cache
def verl() -> types.SimpleNamespace:
    """verl's losses, advantage estimators, rollout correction and configurations."""
    _need("verl")
    for module in ("tensordict", "omegaconf"):
        pytest.importorskip(module, reason=f"needs {module} (the extra `parity`)")
    with _loading():
        return types.SimpleNamespace(
            core=importlib.import_module("verl.trainer.ppo.core_algos"),
            rollout=importlib.import_module("verl.trainer.ppo.rollout_corr_helper"),
            losses=importlib.import_module("verl.workers.utils.losses"),
            config=importlib.import_module("verl.workers.config"),
            algorithm=importlib.import_module("verl.trainer.config"),
        )


@functools.cache
def openrlhf() -> types.SimpleNamespace:
    """OpenRLHF's loss file and the estimators beside it, without its package (which imports its trainers)."""
    _need("openrlhf")
    package = types.ModuleType("openrlhf_models")
    package.__path__ = [str(FOLDER / "openrlhf" / "models")]
    sys.modules["openrlhf_models"] = package
    with _loading():
        return types.SimpleNamespace(
            loss=importlib.import_module("openrlhf_models.loss"),
            utils=importlib.import_module("openrlhf_models.utils"),
        )


@functools.cache
def verl_trainer() -> types.ModuleType:
    """The module of verl's trainer, which computes the advantages."""
    verl()
    with _loading():
        return importlib.import_module("verl.trainer.ppo.ray_trainer")


@functools.cache
def verl_data() -> types.ModuleType:
    """What verl adds to a TensorDict."""
    verl()
    with _loading():
        return importlib.import_module("verl.utils.tensordict_utils")


@functools.cache
def verl_v1() -> types.ModuleType:
    """The functions of verl's default trainer, which computes the advantages of agents' sessions."""
    verl_trainer()
    with _loading():
        return importlib.import_module("verl.trainer.ppo.v1.utils")


@functools.cache
def openrlhf_trainers() -> types.SimpleNamespace:
    """OpenRLHF's package itself, with the trainers that build its losses."""
    _need("openrlhf")
    with _loading():
        return types.SimpleNamespace(
            models=importlib.import_module("openrlhf.models"),
            actor=importlib.import_module("openrlhf.trainer.ray.ppo_actor"),
            critic=importlib.import_module("openrlhf.trainer.ray.ppo_critic"),
            reward=importlib.import_module("openrlhf.trainer.rm_trainer"),
            experience=importlib.import_module("openrlhf.trainer.ppo_utils.experience"),
        )
