"""DDP, FSDP2 and ZeRO-3: two processes with micro-batches of unequal length have the gradient of one process."""

from __future__ import annotations

import importlib.util
import sys
import types
from contextlib import contextmanager

import pytest
import torch
from common import close

import fastrl
from fastrl.head_weights import LowRank

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


@pytest.mark.filterwarnings("ignore")
def test_two_processes(tmp_path):
    """Every case of `two_ranks`, in one pair of processes: the loss is divided by the global count, and the head is
    plain, tied, sharded, adapted, and read from a model; the metrics of all ranks are those of one process."""
    pytest.importorskip("transformers", reason="needs transformers, for the cases with a model")
    import two_ranks

    torch.multiprocessing.spawn(two_ranks.run, args=(str(tmp_path / "rendezvous"),), nprocs=two_ranks.RANKS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_two_processes_zero3(tmp_path):
    """The real one, with the head read inside of the engine's forward and outside; written with 0.19.8 on a CPU."""
    pytest.importorskip("transformers", reason="needs transformers, for the cases with a model")
    import two_ranks_zero3

    torch.multiprocessing.spawn(two_ranks_zero3.run, args=(str(tmp_path / "rendezvous"),), nprocs=2)


class Partitioned(torch.nn.Parameter):
    """A stand-in for a ZeRO-3 parameter, with the attributes that `deepspeed.zero` gives one: empty outside of
    `GatheredParameters`, made whole by `all_gather`."""

    @classmethod
    def of(cls, value: torch.Tensor) -> Partitioned:
        parameter = torch.nn.Parameter(value.clone())
        parameter.__class__ = cls
        parameter.ds_id, parameter.ds_shape, parameter.shard = 0, value.shape, value.clone()
        parameter.partition()
        return parameter

    def all_gather(self) -> None:
        self.data = self.shard

    def partition(self) -> None:
        self.data = torch.empty(0)


@pytest.fixture
def deepspeed(monkeypatch):
    """A module of that name, with the one function that is used."""
    gathered = []

    @contextmanager
    def gather(parameters):
        for parameter in parameters:
            gathered.append(tuple(parameter.ds_shape))
            parameter.all_gather()
        yield
        for parameter in parameters:
            parameter.partition()

    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return gathered


def test_zero3_head_is_gathered_and_its_gradient_arrives(deepspeed):
    torch.manual_seed(0)
    weight, bias, b = torch.randn(11, 4), torch.randn(11), torch.randn(11, 2)
    a = torch.randn(2, 4)
    hidden = torch.randn(2, 3, 4)
    rollouts = fastrl.Rollouts(torch.randint(0, 11, (2, 3)), advantages=torch.tensor([1.0, -2.0]))
    results = []
    for make in (Partitioned.of, lambda value: torch.nn.Parameter(value.clone())):
        leaves = [make(value) for value in (weight, bias, a, b)]
        head = fastrl.LMHead(*leaves[:2], adapters=(LowRank(*leaves[2:], scaling=0.5),))
        out = fastrl.policy_loss_from_hidden(hidden, head, rollouts, fastrl.GRPO)
        assert make is not Partitioned.of or all(leaf.numel() == 0 for leaf in leaves)
        out.loss.backward()
        results.append((out.loss.detach(), *(leaf.grad for leaf in leaves)))
    assert sorted(deepspeed) == sorted([(11, 4), (11,), (2, 4), (11, 2)])
    for got, want in zip(*results, strict=True):
        close(got, want, ulps=8)


def test_zero3_frozen_head_and_no_grad(deepspeed):
    weight = Partitioned.of(torch.randn(11, 4)).requires_grad_(False)
    scores = fastrl.logprobs_from_hidden(torch.randn(2, 3, 4), fastrl.LMHead(weight), torch.zeros(2, 3).long())
    assert not scores.logps.requires_grad and weight.numel() == 0


def test_zero3_head_without_deepspeed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it raises
    head = fastrl.LMHead(Partitioned.of(torch.randn(11, 4)))
    with pytest.raises(ValueError, match="weight: .*ZeRO-3 has partitioned.*install deepspeed"):
        fastrl.logprobs_from_hidden(torch.randn(2, 3, 4), head, torch.zeros(2, 3).long())


def test_partial_sums_are_refused():
    weight = torch.zeros(5, 4)
    weight.full_tensor = lambda: weight
    weight.placements = (types.SimpleNamespace(is_partial=lambda: True),)
    with pytest.raises(ValueError, match="weight: expected a DTensor in shards"):
        fastrl.LMHead(weight)
