"""A trainer of another version is named once, with the range that was tested."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging

import pytest

pytest.importorskip("packaging", reason="needs packaging, which every trainer brings")

from fastrl.adapters import _versions


@pytest.fixture
def installed(monkeypatch):
    """Pretend that every package has this version."""
    _versions.warn_outside.cache_clear()
    yield lambda version: monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    _versions.warn_outside.cache_clear()


@pytest.mark.parametrize("version", ["1.16", "1.16.0", "1.16.9", "1.16.0+local", "1.16.3.dev2", "1.16.1rc1"])
def test_inside_says_nothing(installed, caplog, version):
    installed(version)
    _versions.warn_outside("trl", "1.16", "1.17")
    assert not caplog.records


@pytest.mark.parametrize("version", ["1.15.9", "1.16.0.dev0", "1.16rc1", "1.17", "1.17.0rc1", "1.17.0.dev1", "2.0"])
def test_outside_warns_once_and_names_the_range(installed, caplog, version):
    installed(version)
    for _ in range(3):
        _versions.warn_outside("trl", "1.16", "1.17")
    assert [record.name for record in caplog.records] == ["fastrl"]
    assert caplog.records[0].levelno == logging.WARNING
    assert f"trl {version} " in caplog.text and "was tested with: trl >=1.16,<1.17" in caplog.text


def test_each_package_and_range_has_its_own_warning(installed, caplog):
    installed("3.0")
    for package, lowest, below in [("trl", "1.16", "1.17"), ("verl", "0.9", "0.10"), ("trl", "1.16", "1.18")]:
        _versions.warn_outside(package, lowest, below)
    assert len(caplog.records) == 3


def called(adapter):
    """The first call of an adapter's entry point, as far as it gets without the trainer."""
    module = importlib.import_module(f"fastrl.adapters.{adapter}")
    calls = {
        "torchtitan": lambda: module.DAPOLoss(None),
        "skyrl": lambda: module.register({"trainer": {"algorithm": {}}}),
        "areal": lambda: module.grpo_loss_fn(None, None, {}),
        "nemo_rl": lambda: module.ClippedPGLossFn({}),
        "prime_rl": lambda: module.loss(None),
        "slime": lambda: module.spec_from_args({}),
        "roll": lambda: importlib.import_module("fastrl.adapters._roll_config").spec_from_config({}),
    }
    with contextlib.suppress(ImportError, KeyError, TypeError):
        calls[adapter]()


FRAMEWORKS = {  # versions inside of the range, and those next to it
    "torchtitan": ("torchtitan", ["0.3.0", "0.3.1"], ["0.2.9", "0.4.0"]),
    "skyrl": ("skyrl", ["0.4.0", "0.4.2"], ["0.3.9", "0.5.0"]),
    "areal": ("areal", ["1.0.4"], ["0.9", "1.1.0"]),
    "nemo_rl": ("nemo-rl", ["0.6.0+abc", "0.7.0"], ["0.5.0", "0.8.0rc0"]),
    "prime_rl": ("prime-rl", ["0.9.0", "0.9.3.dev2"], ["0.8.0", "0.10.0"]),
    "slime": ("slime", ["0.3.2", "0.4.0"], ["0.2.4", "0.5.0"]),
    "roll": ("roll", ["0.1.0"], ["0.0.9", "0.2.0"]),
}


@pytest.mark.parametrize("adapter", FRAMEWORKS)
def test_every_framework_warns_of_other_versions(adapter, installed, monkeypatch, caplog):
    from fastrl.adapters import areal, prime_rl

    package, inside, outside = FRAMEWORKS[adapter]
    asked = []
    for version in (*inside, *outside):
        for once in (_versions.warn_outside, areal._started, prime_rl._mapped):
            once.cache_clear()
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: asked.append(name) or v)
        caplog.clear()
        called(adapter)
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == (version in outside), (version, warned)
        assert all(message.startswith(f"{package} {version} is outside") for message in warned)
    assert set(asked) == {package}
    areal._started.cache_clear()


def test_a_package_without_a_distribution_is_not_named(caplog):
    _versions.warn_outside.cache_clear()
    _versions.warn_outside("no-such-trainer", "1", "2")
    assert not caplog.records
