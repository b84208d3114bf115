"""Reading foreign configs: every kind of object, unknown and refused fields by name, versions."""

from __future__ import annotations

import dataclasses
import types
import warnings

import pytest

from fastrl.adapters import _config
from fastrl.adapters._config import Options, check_version, fields_of

OPTIONS = Options(
    framework="Lib 1.2",
    honoured={"eps": 0.2, "kl": 0.0},
    elsewhere={"lr"},
    refused={"magic": (None, "leave it None")},
    own_loss="use Lib's own loss",
)


class Keyed:
    """An OmegaConf-like object: keys and items, no Mapping."""

    def keys(self):
        return ["eps"]

    def __getitem__(self, name):
        return {"eps": 0.3}[name]


class Model:
    model_fields = ("eps",)
    model_extra = {"lr": 1.0}  # noqa: RUF012
    eps = 0.3
    lr = 1.0


@dataclasses.dataclass
class Data:
    eps: float = 0.3
    magic: object = None


@pytest.mark.parametrize("config", [{"eps": 0.3}, Keyed(), Model(), Data(), types.SimpleNamespace(eps=0.3, _hidden=1)])
def test_reads_every_kind_of_config(config):
    assert OPTIONS.read(config) == {"eps": 0.3, "kl": 0.0}


def test_none_is_the_defaults():
    assert OPTIONS.read(None) == {"eps": 0.2, "kl": 0.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"new": 1}, "^new: expected a field of Lib 1.2, got an unknown one with value 1; "),
        ({"magic": 3}, "^magic: fastrl does not honour 3 of Lib 1.2; leave it None, or use Lib's own loss$"),
    ],
)
def test_refuses_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        OPTIONS.read(config)


def test_choose_lists_the_accepted():
    assert OPTIONS.choose("eps", "a", {"a": 1}) == 1
    with pytest.raises(ValueError, match="^eps: fastrl does not honour 'b' of Lib 1.2; use one of 'a'"):
        OPTIONS.choose("eps", "b", {"a": 1})


def test_no_config():
    with pytest.raises(TypeError, match="^config: expected a mapping"):
        fields_of(3)


@pytest.mark.parametrize(
    ("version", "inside"), [("1.16.0", True), ("1.16.3.dev0", True), ("1.17rc1", False), ("1.9", False)]
)
def test_versions(monkeypatch, version, inside):
    monkeypatch.setattr(_config.metadata, "version", lambda name: version)
    check_version.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_version("lib", "1.16", "1.17")
        check_version("lib", "1.16", "1.17")
    check_version.cache_clear()
    assert len(caught) == (0 if inside else 1)
    if not inside:
        assert f"lib {version} is outside the tested range 1.16 <= version < 1.17" in str(caught[0].message)
