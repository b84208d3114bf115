"""Reading foreign configs: every kind of object, unknown and refused fields by name, versions."""

from __future__ import annotations

import dataclasses
import types

import pytest

from fastrl.adapters._config import Options, fields_of

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
