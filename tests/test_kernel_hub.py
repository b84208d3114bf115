"""The Hub build: one command, loaded by the real `kernels` package, the same bits as the package in this repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("kernels.load", reason="needs kernels 0.17")  # `kernels` alone finds this repository's folder
pytest.importorskip("triton", reason="needs triton")

import build_hub
import fastrl_kernels
from common import ACCELERATOR, make_batch

import fastrl
import kernels as hub
from fastrl import triton_backend


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build_hub.py", str(out)])
        build_hub.main()
    return out


@pytest.fixture
def loaded(built):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return hub.get_local_kernel(built)


def test_layout(built):
    assert {path.name for path in built.iterdir()} == {"README.md", "LICENSE", "build"}
    variants = sorted((built / "build").iterdir())
    assert [path.name for path in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    ids = set()
    for variant in variants:
        names = {path.name for path in variant.iterdir()}
        assert names == {"metadata.json", *(path.name for path in Path(fastrl_kernels.__path__[0]).glob("*.py"))}
        read = hub.Metadata.read_from_file(variant / "metadata.json")
        assert (str(read.name), read.version, read.license) == ("fastrl-kernels", build_hub.VERSION, "Apache-2.0")
        assert variant.name == f"torch-{str(read.backend.backend_type).lower()}" and read.python_depends == []
        assert read.id.isidentifier()
        ids.add(read.id)
        hub.variants.parse_variant(variant.name)
    assert len(ids) == 3


def test_a_second_build_replaces_the_first_and_is_the_same(built):
    before = {
        path: path.read_bytes() for path in built.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    (built / "build" / "torch-rocm" / "left_over.py").write_text("")
    build_hub.build(built)
    assert {p: p.read_bytes() for p in built.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == before


def test_the_module_is_the_built_one(built, loaded):
    name = json.loads((built / "build" / f"torch-{backend()}" / "metadata.json").read_text())["id"]
    assert loaded.__all__ == fastrl_kernels.__all__ and all(hasattr(loaded, each) for each in loaded.__all__)
    assert Path(loaded.__file__).is_relative_to(built) and loaded.__name__ == name
    assert loaded.logprob_fwd.__module__ == f"{name}.logprob" and loaded is not fastrl_kernels
    assert loaded is hub.get_local_kernel(built)


def backend():
    return "cpu" if not torch.cuda.is_available() else "rocm" if torch.version.hip else "cuda"


@pytest.mark.accelerator
@pytest.mark.filterwarnings("ignore")
def test_the_same_bits(loaded, monkeypatch):
    """A whole step through the loaded kernels: log-probs, loss, gradient, group advantages."""

    def step():
        batch = make_batch(B=4, T=3, garbage=False, device=ACCELERATOR)
        logits = batch.logits().float().requires_grad_()
        out = fastrl.policy_loss_from_logits(logits, batch.rollouts, fastrl.GSPO, backend="triton")
        out.loss.backward()
        return out.loss.detach(), logits.grad, out.entropy, torch.stack(list(out.metrics.values()))

    want = step()
    used = []
    monkeypatch.setattr(triton_backend, "kernels", Recorder(loaded, used))
    got = step()
    assert {"logprob_fwd", "logprob_bwd", "policy_loss_fwd"} <= set(used)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class Recorder:
    """A module that notes what is taken from it."""

    def __init__(self, module, used):
        self._module, self._used = module, used

    def __getattr__(self, name):
        self._used.append(name)
        return getattr(self._module, name)
