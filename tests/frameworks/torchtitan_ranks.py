"""torchtitan's losses with a vocabulary split over two processes: its own code and ours on the same shards.

`run` is the entry of a spawned process. The two modules by which torchtitan's `compute_logprobs` finds its mesh and
gathers are stood in for: `torchtitan.distributed.spmd_types` needs the packages around it, and `spmd_types` is used
where it is installed.
"""

from __future__ import annotations

import datetime
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frameworks import real
from frameworks import test_torchtitan as cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

from fastrl.adapters.torchtitan import DAPOLoss

RANKS, V = 2, 12


class _Gather(torch.autograd.Function):
    """S(-1) -> I: all columns on every rank; of the gradient, which all ranks share, each keeps its own."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.rank = dist.get_rank(group)
        parts = [torch.empty_like(shard) for _ in range(RANKS)]
        dist.all_gather(parts, shard.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.chunk(RANKS, -1)[ctx.rank].contiguous(), None


def spmd_types() -> Any:
    """The real package, or what compute_logprobs uses of it."""
    if importlib.util.find_spec("spmd_types") is not None:
        return importlib.import_module("spmd_types")

    def redistribute(shard: torch.Tensor, group: Any, *, src: Any, dst: Any) -> torch.Tensor:
        assert (src, dst) == (("S", -1), "I")
        return _Gather.apply(shard, group)

    stand_in = ModuleType("spmd_types")
    stand_in.redistribute, stand_in.S, stand_in.I = redistribute, lambda dim: ("S", dim), "I"
    sys.modules["spmd_types"] = stand_in
    return stand_in


def torchtitan_with(mesh: Any) -> Any:
    """torchtitan's losses, and what ours looks up, as they are inside of a trainer with this mesh."""
    module = ModuleType("torchtitan.distributed.spmd_types")
    module.get_spmd_backend = lambda: "spmd_types"
    module.spmd_mesh_size = lambda name: mesh.size() if name in mesh.mesh_dim_names else 1
    module.current_spmd_mesh = lambda: mesh
    sys.modules[module.__name__] = module
    theirs = real.torchtitan()
    namespace = theirs.compute_logprobs.__globals__
    names = ("get_spmd_backend", "spmd_mesh_size", "current_spmd_mesh")
    namespace.update({name: getattr(module, name) for name in names}, spmd=spmd_types())
    return theirs


def batch() -> SimpleNamespace:
    b = cases.microbatch(columns=V)
    for name in ("logits", "generator_logprobs", "advantages"):
        setattr(b, name, getattr(b, name).float())
    return b


def of_the_whole() -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient on one rank, without a mesh."""
    b = batch()
    whole = b.logits.clone().requires_grad_()
    loss, _ = cases.call(DAPOLoss(None), b, whole, 17)
    return loss.detach(), *torch.autograd.grad(loss, whole)


def both(mesh: Any, theirs: Any, logits_of: Any, want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Loss, metrics and the gradient of this rank's shard: torchtitan's, and those of the whole vocabulary."""
    b = batch()
    results = []
    for loss in (DAPOLoss({"global_vocab_size": V}), theirs.DAPOLoss(theirs.DAPOLoss.Config())):
        shard = b.logits.chunk(RANKS, -1)[mesh.get_local_rank()].clone().requires_grad_()
        value, metrics = cases.call(loss, b, logits_of(shard), 17)
        value.backward()
        results.append((value.detach(), shard.grad, metrics))
    close = {"rtol": 2e-5, "atol": 1e-7}
    for value, gradient, metrics in results:
        torch.testing.assert_close(value, want[0], **close)
        torch.testing.assert_close(gradient, want[1].chunk(RANKS, -1)[mesh.get_local_rank()], **close)
        for name, number in results[1][2].items():
            torch.testing.assert_close(float(metrics[name]), float(number), **close, msg=name)


def run(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timeout)
    try:
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
        want = of_the_whole()
        sums = DTensor.from_local(batch().logits, mesh, [Partial()])
        with pytest.raises(ValueError, match="^logits: expected a DTensor without partial sums, got .*Partial"):
            cases.call(DAPOLoss(None), batch(), sums, 17)
        both(mesh, real.torchtitan(), lambda shard: DTensor.from_local(shard, mesh, [Shard(2)]), want)
        both(mesh, torchtitan_with(mesh), lambda shard: shard, want)
    finally:
        dist.destroy_process_group()
