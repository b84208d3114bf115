"""The frameworks' own losses and configs, executed from their installed source without the packages around them.

SkyRL, AReaL and torchtitan are installed without dependencies into `<environment>/peers` (see the Makefile). Importing
them would need Ray, Hydra and the like; instead the definitions that a loss consists of are executed from their files,
unchanged, in a namespace that holds what those files import.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import functools
import importlib
import sys
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(sys.prefix) / "peers"


def need(package: str) -> None:
    if not (FOLDER / package).exists():
        pytest.skip(f"needs {package} in {FOLDER} (`make test` puts it there)", allow_module_level=True)


class _Quiet:
    """A logger or statistics tracker whose every call, also in a `with`, does nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: contextlib.nullcontext()


def _defines(node: ast.stmt, names: Callable[[str], bool], values: Collection[str]) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id in values for target in node.targets)
    return isinstance(node, ast.ClassDef | ast.FunctionDef) and names(node.name)


def execute(
    path: str,
    namespace: dict[str, Any],
    names: Callable[[str], bool] = lambda name: True,
    values: Collection[str] = (),
) -> dict[str, Any]:
    """Execute the classes and functions of one file whose names pass, and the named values, in order; annotations stay
    text."""
    tree = ast.parse((FOLDER / path).read_text())
    future = ast.parse("from __future__ import annotations").body
    kept = [n for n in tree.body if _defines(n, names, values)]
    module = types.ModuleType(f"real_{Path(path).stem}")
    module.__dict__.update({name: value for name, value in namespace.items() if not name.startswith("__")})
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(ast.Module(future + kept, []), str(FOLDER / path), "exec"), module.__dict__)
    return module.__dict__


_COMMON = {
    "torch": torch, "np": np, "functools": functools, "dataclass": dataclasses.dataclass, "field": dataclasses.field,
    "Any": Any, "Callable": Callable, "defaultdict": defaultdict, "StrEnum": enum.StrEnum, "Enum": enum.Enum,
    "logger": _Quiet(), "F": torch.nn.functional, "dist": torch.distributed,
    **{name: getattr(typing, name) for name in ("Optional", "Union", "List", "Dict", "Tuple", "Literal", "Annotated")},
}  # fmt: skip


@functools.cache
def skyrl() -> types.SimpleNamespace:
    """SkyRL 0.4.0: its policy losses, and AlgorithmConfig."""
    need("skyrl")
    names = dict(_COMMON) | {"BaseConfig": object}
    folder = "skyrl/backends/skyrl_train/utils"
    wanted = {"masked_mean", "safe_exp_delta"}
    names |= execute(f"{folder}/torch_utils.py", names, wanted.__contains__)
    names |= execute(f"{folder}/off_policy_correction_utils.py", names)
    # the registry decorators would start Ray: they leave the functions as they are
    names["register_policy_loss"] = names["register_advantage_estimator"] = lambda name: lambda f: f
    skipped = ("Registry", "register_", "sync_registries", "RegistryActor")
    ours = execute(
        f"{folder}/ppo_utils.py",
        names,
        lambda name: not name.startswith(skipped) and "Registry" not in name,
        {"LOSSES_WITH_OLD_LOGPROBS", "LOSSES_WITHOUT_OLD_LOGPROBS"},
    )
    parts = (
        "KLCtrl",
        "SAPO",
        "DynamicSampling",
        "ClipCov",
        "KLCov",
        "CISPO",
        "DPPO",
        "OffPolicyCorrection",
        "Algorithm",
        "FullyAsync",
    )
    config = execute("skyrl/train/config/config.py", names, {f"{name}Config" for name in parts}.__contains__)
    names["ray"] = types.SimpleNamespace(is_initialized=lambda: False)  # the registry is then local
    registries = {"BaseFunctionRegistry", "PolicyLossRegistry"}
    registry = execute(f"{folder}/ppo_utils.py", names, registries.__contains__)["PolicyLossRegistry"]
    return types.SimpleNamespace(**ours, PolicyLossRegistry=registry, config=types.SimpleNamespace(**config))


class _Tracker(_Quiet):
    """Its decorators leave functions as they are."""

    def scope_func_wrapper(self, name: str) -> Callable[..., Any]:
        return lambda f: f


class Engine:
    """What AReaL's actors need of the engine under them: it calls the loss on the batch as it is."""

    def __init__(self, config: Any) -> None:
        self.losses: list[Any] = []

    def train(self) -> None:
        pass

    def get_version(self) -> int:
        return 3

    def create_process_group(self, parallel_strategy: Any) -> None:
        pass

    def train_batch(self, batch: dict[str, Any], loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
        self.losses.append(loss_fn(batch["x"], batch["x"], batch))
        return {}


def _engine_config() -> type:
    """The part of TrainEngineConfig that AReaL's actor config and engine read."""
    methods = {"__post_init__": lambda self: None}
    fields = [("_version", str, "v1"), ("temperature", float, 1.0)]
    return dataclasses.make_dataclass("TrainEngineConfig", fields, namespace=methods)


class Controller:
    """AReaL's controllers keep what they are given, and send the class by its path."""

    def __init__(self, train_engine: Any, config: Any, scheduler: Any) -> None:
        self.path = f"{train_engine.__module__}.{train_engine.__name__}"

    def create_process_group(self, parallel_strategy: Any) -> None:
        pass


@functools.cache
def areal() -> types.SimpleNamespace:
    """AReaL 1.0.4: grpo_loss_fn and all that it calls, PPOTrainer, PPOActor, FSDPPPOActor, PPOActorConfig.

    `modules` are those of the actor and the engine, under their names."""
    need("areal")
    names = dict(_COMMON) | {"stats_tracker": _Tracker(), "infer_token_denominator": lambda data, mask: mask}
    constants = types.ModuleType("constants")
    exec((FOLDER / "areal/utils/constants.py").read_text(), constants.__dict__)
    names |= {key: value for key, value in vars(constants).items() if not key.startswith("__")}
    names |= execute("areal/utils/data.py", names, {"KLEstimator"}.__contains__)
    names["TrainEngineConfig"] = _engine_config()
    names |= execute("areal/api/cli_args.py", names, {"RejectionSamplingConfig", "PPOActorConfig"}.__contains__)
    names |= execute("areal/utils/functional/functional.py", names)
    names |= execute("areal/utils/dynamic_import.py", names | {"importlib": importlib})
    names |= {"trace_perf": lambda *args, **kwargs: lambda f: f, "MicroBatchSpec": lambda n_mbs: n_mbs}
    names |= {"TrainController": Controller, "GatewayTrainController": object, "FSDPEngine": Engine}
    names["batched_call"] = lambda fn, data, unpack: fn(data[0])
    names["split_padded_tensor_dict_into_mb_list"] = lambda data, mb_spec: types.SimpleNamespace(mbs=[data])
    functions = execute("areal/trainer/ppo/actor.py", names)
    engines = execute("areal/engine/fsdp_engine.py", names, {"FSDPPPOActor"}.__contains__)
    functions |= execute("areal/trainer/rl_trainer.py", names, {"PPOTrainer"}.__contains__)
    modules = {"areal.trainer.ppo.actor": "real_actor", "areal.engine.fsdp_engine": "real_fsdp_engine"}
    modules = {name: sys.modules[ours] for name, ours in modules.items()}
    return types.SimpleNamespace(**functions, FSDPPPOActor=engines["FSDPPPOActor"], modules=modules)


@functools.cache
def torchtitan() -> types.SimpleNamespace:
    """torchtitan 0.3.0: its RL losses, compute_logprobs, the chunked wrapper, how it adds metrics; on one process."""
    need("torchtitan")

    class BaseLoss:
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config:
            pass

    from torch.distributed.tensor import DTensor, Replicate, Shard

    names = dict(_COMMON) | {
        "BaseLoss": BaseLoss, "DTensor": DTensor, "Replicate": Replicate, "Shard": Shard, "nn": torch.nn,
        "get_spmd_backend": lambda: None, "IGNORE_INDEX": -100, "spmd": _Quiet(),
    }  # fmt: skip
    wanted = {"compute_logprobs", "cross_entropy_loss", "CrossEntropyLoss", "GradAccumulator", "ChunkedLossWrapper"}
    wanted |= {"_DecoderOutputGradientBackProp"}
    names |= execute("torchtitan/components/loss.py", names, wanted.__contains__)
    names["_MAX_LOG_RATIO"] = 10.0
    names |= execute("torchtitan/experiments/rl/losses/dapo.py", names)
    names |= execute("torchtitan/experiments/rl/losses/grpo.py", names)
    names |= execute(
        "torchtitan/experiments/rl/controller_metrics.py", names, {"combine_microbatch_metrics"}.__contains__
    )
    return types.SimpleNamespace(**names)
