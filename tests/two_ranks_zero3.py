"""What each of two processes does in the ZeRO-3 test: the head read inside of the engine's forward, and outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen2Config
from two_ranks import RANKS, SIZES, HuggingFace, Policy, hold, micro_batches, one_process, total

import fastrl


class Outside(Policy):
    """Gives its hidden states, and leaves the loss to the caller, outside of the engine's forward."""

    def forward(self, ids: torch.Tensor, *loss: Any) -> Any:
        hidden = self.backbone(ids)
        return self.loss(hidden, *loss) if loss else hidden


def policies() -> Iterator[tuple[str, Policy]]:
    for tied in (False, True):
        yield f"tied {tied}", Policy(fastrl.GRPO, bias=True, tied=tied)
        yield f"tied {tied}, outside", Outside(fastrl.GRPO, bias=True, tied=tied)
        yield f"tied {tied}, model", HuggingFace(fastrl.GRPO, Qwen2Config(**SIZES, tie_word_embeddings=tied))
    yield "LoRA", Policy(fastrl.GRPO, lora=True)


CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def check(case: str, policy: Policy, rank: int) -> None:
    """Both micro-batches through an engine: the gradients are those of one process."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    _, _, want = one_process(policy, torch.float32)
    policy.zero_grad()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=CONFIG)
    assert all(parameter.numel() == 0 for parameter in policy.parameters())
    batches = micro_batches(rank, torch.float32)
    count = total(policy.spec, batches)
    dist.all_reduce(count)
    normalizer = count / RANKS / len(batches)  # the engine divides by the accumulation steps, and averages over ranks
    for ids, rollouts in batches:
        outside = isinstance(policy, Outside)
        out = policy.loss(engine(ids), rollouts, normalizer) if outside else engine(ids, rollouts, normalizer)
        engine.backward(out.loss)
        if rollouts is not batches[-1][1]:
            engine.step()
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    hold(f"zero3, {case}", {name: safe_get_full_grad(parameter) for name, parameter in trained.items()}, want, 1e-5)


def run(rank: int, rendezvous: str) -> None:
    """Entry of a spawned process."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for case, policy in policies():
        check(case, policy, rank)
    dist.destroy_process_group()
