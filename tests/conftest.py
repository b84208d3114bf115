"""Shared test setup: the interpreter where there is no GPU, NaN in every uninitialised buffer, one hypothesis profile."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from typing import Any

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # must stand before the first import of triton
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

_QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
# The same examples on every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, print_blob=True, suppress_health_check=_QUIET)
settings.register_profile("explore", deadline=None, print_blob=True, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device")
    config.addinivalue_line("markers", "accelerator: runs on the GPU where there is one, so is then marked gpu as well")
    config.addinivalue_line("markers", "slow: over ten seconds")


@pytest.hookimpl(tryfirst=True)  # before -m chooses among the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "accelerator" in item.keywords and HAS_GPU:
            item.add_marker(pytest.mark.gpu)
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    if HAS_GPU:  # kernels whose programs wait for each other come last, where a hang can lose no other result
        items.sort(key=lambda item: "tickets" in item.name)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Warnings of other packages while a module of tests imports them are shown; as errors they would end the collection,
    and no test at all would run. Those of a test are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return (yield)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating memory is NaN, so that an output nobody wrote cannot pass."""

    def poison(function):
        def wrapped(*args, **kwargs):
            out = function(*args, **kwargs)
            plain = type(out) is torch.Tensor and out.device.type != "meta" and not torch.compiler.is_compiling()
            if plain and out.is_floating_point():
                out.detach().fill_(float("nan"))  # checkpointing makes a leaf that requires a gradient
            return out

        return wrapped

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
