"""A trainer of another version is named once, with the range that was tested."""

from __future__ import annotations

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
    assert f"trl {version} " in caplog.text and "trl >=1.16,<1.17" in caplog.text


def test_each_package_and_range_has_its_own_warning(installed, caplog):
    installed("3.0")
    for package, lowest, below in [("trl", "1.16", "1.17"), ("verl", "0.9", "0.10"), ("trl", "1.16", "1.18")]:
        _versions.warn_outside(package, lowest, below)
    assert len(caplog.records) == 3


def test_a_package_without_a_distribution_is_not_named(caplog):
    _versions.warn_outside.cache_clear()
    _versions.warn_outside("no-such-trainer", "1", "2")
    assert not caplog.records
