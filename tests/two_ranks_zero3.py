"""What each of two processes does in the ZeRO-3 test: the head read inside of the engine's forward, and outside."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
import torch.distributed as dist
from two_ranks import RANKS, Policy, hold, micro_batches, one_process, total

import fastrl


class Outside(Policy):
    """Gives its hidden states, and leaves the loss to the caller, outside of the engine's forward."""

    def forward(self, ids: torch.Tensor, *loss: Any) -> Any:
        hidden = self.backbone(ids)
        return self.loss(hidden, *loss) if loss else hidden


def run(rank: int, rendezvous: str) -> None:
    """Entry of a spawned process."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    for tied, outside in itertools.product((False, True), repeat=2):
        policy = (Outside if outside else Policy)(fastrl.GRPO, bias=True, tied=tied)
        _, _, want = one_process(policy, torch.float32)
        policy.zero_grad()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
        assert policy.lm_head.weight.numel() == 0
        batches = micro_batches(rank, torch.float32)
        count = total(policy.spec, batches)
        dist.all_reduce(count)
        for batch in batches:
            # The engine divides by the accumulation steps, and averages over the ranks.
            normalizer = count / RANKS / len(batches)
            out = policy.loss(engine(batch[0]), batch[1], normalizer) if outside else engine(*batch, normalizer)
            engine.backward(out.loss)
            if batch is not batches[-1]:
                engine.step()
        got = {name: safe_get_full_grad(parameter) for name, parameter in policy.named_parameters()}
        hold(f"zero3, tied {tied}, outside {outside}", got, want, 1e-5)
    dist.destroy_process_group()
