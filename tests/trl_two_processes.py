"""One of two processes of `test_trl_training.py`: its half of the batch through DistributedDataParallel, by TRL and by
fastrl. Writes what differs, and rank 0 the averaged gradients and the metrics."""

from __future__ import annotations

import sys
from pathlib import Path

import process_group
import torch
import trl
import trl_common

from fastrl.adapters.trl import use_fastrl

OPTIONS = {
    "grpo": {"loss_type": "grpo", "entropy_coef": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2},
    "dapo": {"loss_type": "dapo", "beta": 0.2, "off_policy_mask_threshold": 0.05},
    "vespo": {"loss_type": "vespo"},
    "luspo": {"loss_type": "luspo", "delta": 1.4},
    "quantile": {"loss_type": "dapo", "top_entropy_quantile": 0.5},
    "quantile-bonus": {"loss_type": "vespo", "top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "rloo": {},
}
INDEPENDENT = ("gspo", "dapo", "vespo", "luspo", "quantile", "rloo")
"""Whose loss does not depend on how the batch is split; an entropy bonus is TRL's mean over each process."""


def build(name, tied=False, **options):
    """The trainer of a case, without a reference model, and its options set."""
    cls = trl.RLOOTrainer if name == "rloo" else trl.GRPOTrainer
    it = trl_common.trainer(cls, trl_common.model(tie_word_embeddings=tied), **options)
    for option, value in OPTIONS[name].items():
        setattr(it.args if option == "delta" else it, option, value)
    it._entropy_bonus_enabled = bool(OPTIONS[name].get("entropy_coef"))
    return it


def batch(name, it):
    inputs = trl_common.scored_batch(it)
    drop = ["importance_sampling_ratio", "old_logps"]
    if name == "rloo":
        drop = [n for n in inputs if n.endswith("token_logps")] + ["tool_mask", "importance_sampling_ratio"]
    return {n: value for n, value in inputs.items() if n not in drop}


def part(inputs, rank):
    """Every second sequence: lengths differ between the processes."""
    return {name: value[rank::2] if value.ndim else value for name, value in inputs.items()}


def sharded(tied):
    """What differs between TRL's loss under DDP and ours under FSDP2, whose head is gathered inside the forward."""
    name, found = "dapo", []
    it = build(name, tied=tied)
    rank, inputs = it.accelerator.process_index, batch(name, it)
    theirs, _ = trl_common.both(it, part(inputs, rank), through=it.accelerator.prepare(it.model))
    it = build(name, tied=tied)
    plugin, mesh = use_fastrl(it), torch.distributed.init_device_mesh("cpu", (2,))
    for layer in it.model.model.layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    torch.distributed.fsdp.fully_shard(it.model, mesh=mesh)
    assert use_fastrl(it) is plugin
    for plugin.level in ("hidden", "logits"):
        ours = trl_common.run(it, part(inputs, rank))
        whole = {name: gradient.full_tensor() for name, gradient in ours.gradients.items()}
        found += trl_common.differences(theirs, ours._replace(gradients=whole))
    return found


def main(folder: Path) -> None:
    findings, results = {}, {}
    for name in OPTIONS:
        it = build(name, ddp_find_unused_parameters=name == "dapo")
        rank, inputs = it.accelerator.process_index, batch(name, it)
        wrapped = it.accelerator.prepare(it.model)
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        for level in ("hidden", "logits", "logprobs"):
            theirs, ours = trl_common.both(it, part(inputs, rank), level=level, through=wrapped)
            findings[f"{name}-{level}"] = trl_common.differences(theirs, ours)
        results[name] = ours.gradients, ours.metrics
    for tied in (False, True):
        findings[f"fsdp2-tied-{tied}"] = sharded(tied)
    torch.save((findings, results), folder / f"{rank}.pt")
    process_group.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
