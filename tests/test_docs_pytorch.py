"""The code of docs/pytorch.md runs, in its order, with a tiny model under the names that it uses."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import fastrl

transformers = pytest.importorskip("transformers", reason="needs transformers")
PAGE = Path(__file__).parent.parent / "docs" / "pytorch.md"


def tiny():
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


class Engine:
    """What the page uses of a DeepSpeed engine; the real one is in test_distributed."""

    def __init__(self, model, **_):
        self.model, self.steps = model, 0

    def __call__(self, *inputs):
        return self.model(*inputs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.steps += 1


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # dynamo and FSDP2 warn of their own internals
def test_the_code_runs(process_group, monkeypatch):
    pytest.importorskip("peft", reason="needs peft")
    from torch.distributed.device_mesh import init_device_mesh

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.initialize = lambda **options: (Engine(**options), None)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    ids = torch.randint(2, 61, (4, 8))
    mask = torch.rand(4, 5) > 0.2
    model = tiny()
    rollouts = fastrl.Rollouts(ids[:, -5:], mask, torch.randn(4), old_logps=torch.full((4, 5), -4.0))
    namespace = {
        "model": model, "fresh_model": tiny(), "ids": ids, "rollouts": rollouts, "compiler": "eager", "device": "cpu",
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "mesh": init_device_mesh("cpu", (1,)), "config": {},
    }  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    for block in blocks:
        if "import deepspeed" in block:  # the model of the blocks before is sharded by FSDP2 now
            namespace["model"] = tiny()
        exec(block, namespace)
    assert len(blocks) == 9
    assert namespace["metrics"]["tokens"] == mask.sum()
    assert namespace["engine"].steps == 2
    trained = [name for name, p in namespace["adapted"].named_parameters() if p.grad is not None]
    assert any("lm_head.lora_A" in name for name in trained) and all("lora_" in name for name in trained)
