"""One rank of the two-process test of tests/test_hf.py; argv is an output folder."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import process_group
import torch
from hf_cases import assert_same, build_model, build_trainer, logged_rows, trained_gradients, whole_batch

import fastrl

EACH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}


def expected(model, rows, spec, average):
    """Of the whole batch; or the mean over the processes of each one's own mean."""
    if average:
        return whole_batch(model, rows, spec)[1]
    # Two processes read batches of 2 in turn: rows 0, 1, 4, 5 and rows 2, 3, 6, 7.
    parts = [whole_batch(model, [rows[i] for i in own], spec)[1] for own in ((0, 1, 4, 5), (2, 3, 6, 7))]
    return {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    compared = 0
    spec, rows = fastrl.DAPO, logged_rows()
    for path, average in itertools.product(("logits", "hidden"), (True, False)):
        model = build_model()
        want = expected(model, rows, spec, average)
        # Sequential sampling: which process reads which rows is then known.
        options = EACH | {"average_tokens_across_devices": average, "train_sampling_strategy": "sequential"}
        trainer = build_trainer(path, model, rows, spec, folder, **options)
        assert trainer.accelerator.num_processes == 2
        assert_same(trained_gradients(trainer), want)
        compared += 1
    if trainer.accelerator.is_main_process:
        tokens = trainer.state.log_history[0]["fastrl/tokens"]
        (folder / "report.json").write_text(json.dumps({"compared": compared, "tokens": tokens}))
    process_group.leave()


if __name__ == "__main__":
    main()
