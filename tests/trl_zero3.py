"""One of two processes of the ZeRO-3 test: a real TRL trainer under DeepSpeed, with TRL's loss or with ours, some steps of
`trl_training_cases`. Rank 0 writes what it logged.

    trl_zero3.py <folder of the model> <"trl" or a level of fastrl> <file for the log>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
import trl
import trl_common
from trl_training_cases import even_tokens

from fastrl.adapters.trl import GRPOTrainer

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main(folder: str, loss: str, target: Path) -> None:
    deepspeed.init_distributed(dist_backend="gloo")
    given = {} if loss == "trl" else {"level": loss}
    settings = {
        "max_steps": 4, "logging_steps": 1, "learning_rate": 3e-3, "top_k": 0, "seed": 3, "num_iterations": 2, "beta": 0.05,
        "loss_type": "dapo", "gradient_accumulation_steps": 2, "deepspeed": CONFIG, "optim": "sgd", "max_grad_norm": 0.5,
        "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    cls = trl.GRPOTrainer if loss == "trl" else GRPOTrainer
    # named by its folder, so that it is partitioned while it is loaded
    it = trl_common.trainer(cls, folder, reward=even_tokens, rows=64, **settings, **given)
    head = it.model.get_output_embeddings().weight
    assert head.numel() == 0 and tuple(head.ds_shape) == (trl_common.VOCAB, 16)
    it.train()
    torch.manual_seed(4)
    it.evaluate()
    assert head.numel() == 0
    if it.accelerator.is_main_process:
        target.write_text(json.dumps(it.state.log_history))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
