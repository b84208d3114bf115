"""One of two processes of `test_trl_training.py`: its half of the batch through DistributedDataParallel, by TRL and by
fastrl. Writes what differs, and rank 0 the averaged gradients and the metrics."""

from __future__ import annotations

import sys
from pathlib import Path

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
    "rloo": {},
}
INDEPENDENT = ("gspo", "dapo", "vespo", "luspo", "rloo")
"""Whose loss does not depend on how the batch is split; an entropy bonus is TRL's mean over each process."""


def build(name, **options):
    """The trainer of a case, without a reference model, and its options set."""
    cls = trl.RLOOTrainer if name == "rloo" else trl.GRPOTrainer
    it = trl_common.trainer(cls, trl_common.model(), **options)
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


def main(folder: Path) -> None:
    findings, results = {}, {}
    for name in OPTIONS:
        it = build(name, ddp_find_unused_parameters=name == "dapo")
        rank, inputs = it.accelerator.process_index, batch(name, it)
        wrapped = it.accelerator.prepare(it.model)
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
        for level in ("hidden", "logits"):
            theirs, ours = trl_common.both(it, part(inputs, rank), level=level, through=wrapped)
            findings[f"{name}-{level}"] = trl_common.differences(theirs, ours)
        results[name] = ours.gradients, ours.metrics
    it = build("grpo")
    it.top_entropy_quantile = 0.5
    try:
        use_fastrl(it)
    except ValueError as error:
        findings["quantile"] = str(error)
    torch.save((findings, results), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
