"""AReaL's actor engines with fastrl's loss: subclasses that bring it into the process in which the loss runs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

ENGINES = {
    "FSDPPPOActor": "areal.engine.fsdp_engine",
    "MegatronPPOActor": "areal.engine.megatron_engine",
    "ArchonPPOActor": "areal.experimental.engine.archon_engine",
}
"""AReaL's actors by name, and the modules that define them."""


def engine_class(name: str, module: str, loss: Callable[..., Any], check: Callable[[Any], Any]) -> Any:
    """A subclass of AReaL's engine `name` whose `ppo_update` takes `loss`; a config is checked when it is built.

    AReaL's controller sends the path of the engine's class to its workers, which import it: `module` must be the one
    that offers the class, under the same name.
    """
    base = getattr(importlib.import_module(ENGINES[name]), name)

    @functools.wraps(base.__init__)
    def init(self: Any, config: Any) -> None:
        check(config)
        base.__init__(self, config)

    @functools.wraps(base.ppo_update)
    def ppo_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        actor: Any = importlib.import_module("areal.trainer.ppo.actor")  # its update looks the loss up here
        theirs = actor.grpo_loss_fn
        actor.grpo_loss_fn = loss
        try:
            return base.ppo_update(self, *args, **kwargs)
        finally:
            actor.grpo_loss_fn = theirs

    def as_controller(cls: Any, config: Any, scheduler: Any) -> Any:
        check(config)  # in the launcher, before there are workers
        return base.as_controller.__func__(cls, config, scheduler)

    methods = {"__init__": init, "ppo_update": ppo_update, "as_controller": classmethod(as_controller)}
    return type(name, (base,), {**methods, "__module__": module})
