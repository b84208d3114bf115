"""Foreign configs: every field is honoured, left to the framework, or refused by name; an unknown one raises."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an adapter does with the fields of one config of a framework.

    `read(config)` gives the honoured fields as a dict, or raises ValueError naming the first field that is unknown, or
    refused and not at the value that switches it off.
    """

    framework: str
    """The framework and the version that the fields are those of, as messages show it: "SkyRL 0.4"."""
    honoured: Mapping[str, Any]
    """Fields that the mapping reads, each with the framework's default."""
    elsewhere: Collection[str] = ()
    """Fields that act before, after or around the loss, in the framework's own code."""
    refused: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Fields that are not honoured: the value that switches them off, and what to do instead."""
    own_loss: str = "use the framework's own loss"
    """The way out that every refusal ends with."""
    scope: re.Pattern[str] | None = None
    """For a namespace that holds a whole trainer: only names that are listed, or that this finds at their start, are
    read; None = every name."""

    def read(self, config: Any) -> dict[str, Any]:
        """The honoured fields of `config`: a mapping, dataclass, pydantic model or namespace; None = the defaults."""
        given = {} if config is None else fields_of(config)
        for name, value in given.items():
            if not self._of_the_loss(name):
                continue
            if name in self.refused:
                off, remedy = self.refused[name]
                if value != off:
                    self.refuse(name, value, remedy)
            elif name not in self.honoured and name not in self.elsewhere:
                raise ValueError(
                    f"{name}: expected a field of {self.framework}, got an unknown one with value {value!r}; "
                    f"install that version, remove the field, or {self.own_loss}"
                )
        return {name: given.get(name, default) for name, default in self.honoured.items()}

    def _of_the_loss(self, name: str) -> bool:
        listed = name in self.honoured or name in self.refused
        return listed or self.scope is None or self.scope.match(name) is not None

    def refuse(self, name: str, value: Any, remedy: str) -> NoReturn:
        """Raise ValueError: fastrl does not honour `value` for `name`."""
        raise ValueError(f"{name}: fastrl does not honour {value!r} of {self.framework}; {remedy}, or {self.own_loss}")

    def choose(self, name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
        """`choices[value]`, or a refusal that lists the accepted values."""
        if value not in choices:
            self.refuse(name, value, f"use one of {', '.join(map(repr, choices))}")
        return choices[value]


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a config object by name, its values as they are (nested configs are not converted).

    Raises:
        TypeError: the object is no mapping, dataclass, pydantic model or namespace.
    """
    if isinstance(config, Mapping) or (hasattr(config, "keys") and hasattr(config, "__getitem__")):
        return {str(name): config[name] for name in config.keys()}  # noqa: SIM118 - not a Mapping
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if hasattr(type(config), "model_fields"):
        names = [*type(config).model_fields, *(getattr(config, "model_extra", None) or {})]
        return {name: getattr(config, name) for name in names}
    if hasattr(config, "__dict__"):
        return {name: value for name, value in vars(config).items() if not name.startswith("_")}
    raise TypeError(f"config: expected a mapping, dataclass, pydantic model or namespace, got {config!r}")
