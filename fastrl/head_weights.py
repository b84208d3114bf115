"""The matrices of a head: which kinds of parameter it takes, and the whole of one that is sharded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks


class LowRank(NamedTuple):
    """What a LoRA adapter adds to the logits: scaling · b @ (a @ dropout(hidden))."""

    a: Tensor  # (r, H)
    b: Tensor  # (V, r)
    scaling: float = 1.0
    dropout: Callable[[Tensor], Tensor] | None = None


def check_matrix(name: str, value: Any) -> None:
    """Refuse parameters that are not a matrix of floats, whole or in shards.

    Raises:
        ValueError, TypeError: a meta or quantised parameter, a DTensor of partial sums, or no tensor at all.
    """
    _checks.tensor(name, value)
    kind = type(value).__name__
    if value.device.type == "meta":
        _checks.refuse(name, "a materialised tensor", "a meta parameter", "load its values first")
    if kind in ("Params4bit", "Int8Params") or hasattr(value, "quant_state"):
        _checks.refuse(name, "an unquantised tensor", f"a quantised {kind}", "keep the head out of quantisation")
    if is_dtensor(value) and any(placement.is_partial() for placement in value.placements):
        remedy = "redistribute it to Shard or Replicate"
        _checks.refuse(name, "a DTensor in shards", f"placements {tuple(value.placements)}", remedy)
    _checks.floating(name, value)


def is_dtensor(value: Any) -> bool:
    """Whether `value` is a DTensor; without importing torch.distributed.tensor, which only a DTensor needs."""
    return type(value).__name__ == "DTensor" or hasattr(value, "full_tensor")


def is_partitioned(value: Any) -> bool:
    """Whether `value` belongs to DeepSpeed's ZeRO-3, which empties a parameter when it is not in use."""
    return hasattr(value, "ds_id")


def whole_shape(value: Any) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(value, "ds_shape", value.shape))


def whole(value: Any) -> Tensor:
    """The whole of a parameter on this rank, differentiable; `value` itself unless it is sharded.

    A shard costs a copy of the whole in forward and a gradient of its size in backward, as it would if the framework
    gathered it. Both are collective calls: every rank must make them, in the same order.

    * DTensor (FSDP2, tensor parallelism): all-gather; in backward the gradients of the ranks are averaged over the
      device mesh, as FSDP2 and DDP average those of every other parameter.
    * ZeRO-3: `deepspeed.zero.GatheredParameters`; in backward the parameter is gathered again, so that DeepSpeed's
      own hook finds a parameter of full shape to reduce and partition the gradient of.

    Raises:
        ValueError: a ZeRO-3 parameter where deepspeed cannot be imported.
    """
    if is_partitioned(value):
        return _from_partitions(value)
    if is_dtensor(value):
        from torch.distributed.tensor import Partial

        mesh = value.device_mesh
        full = value.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        return _DividedGradient.apply(full, mesh.size())
    return value


class _DividedGradient(torch.autograd.Function):
    """Identity whose gradient is divided: a sum over ranks becomes their mean. Before the sum, for float16's range."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None


def _from_partitions(parameter: Any) -> Tensor:
    if tuple(parameter.shape) == tuple(parameter.ds_shape):  # a module of the engine holds it: not ours to free
        return _Gathered.apply(parameter)
    with _deepspeed().zero.GatheredParameters([parameter]):
        # Inside, as autograd remembers the shape that the parameter has now, and checks its gradient against that.
        return _Gathered.apply(parameter)


class _Gathered(torch.autograd.Function):
    """A copy of a ZeRO-3 parameter that is whole now; its gradient goes to the parameter, made whole for it."""

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Autograd adds the gradient to it next, and the hook that DeepSpeed has on it partitions both again.
        ctx.parameter.all_gather()
        return gradient


def _deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError:
        remedy = "install deepspeed, which partitioned this parameter, or start from the model's own logits"
        _checks.refuse("weight", "a whole tensor", "a parameter that ZeRO-3 has partitioned", remedy)


def with_low_rank(hidden: Tensor, weight: Tensor, adapters: tuple[LowRank, ...]) -> tuple[Tensor, Tensor]:
    """(N, H + r) hidden states and a (V, H + r) weight whose product is that of the head with its adapters.

    hidden @ (W + Σ s·b @ a)ᵀ = [hidden, s·hidden @ aᵀ] @ [W, b]ᵀ: exact for a, b and W, and no adapter is rounded into
    W, where bfloat16 would lose the first steps of training. It costs a copy of the weight, and, as b sits beside W in
    one matrix, a gradient of that size also where W is frozen.
    """
    if not adapters:
        return hidden, weight
    rows = [hidden, *(_low_rank_input(hidden, adapter) for adapter in adapters)]
    columns = [weight, *(whole(adapter.b).to(weight.dtype) for adapter in adapters)]
    return torch.cat(rows, dim=-1), torch.cat(columns, dim=-1)


def _low_rank_input(hidden: Tensor, adapter: LowRank) -> Tensor:
    """s·dropout(hidden) @ aᵀ, computed in the adapter's dtype as PEFT does."""
    x = hidden.to(adapter.a.dtype)
    x = x if adapter.dropout is None else adapter.dropout(x)
    return (adapter.scaling * (x @ whole(adapter.a).t())).to(hidden.dtype)
