"""Train a small Qwen2 to add, with TRL's GRPOTrainer and fastrl's loss, and plot how it went.

Builds the model, the tokenizer and the task (nothing is downloaded), trains on the CPU in about two minutes or on a
GPU with the Triton kernels, prints the reward before and after, writes a plot and a JSON of the curves, and exits with
status 1 if the reward did not rise clearly.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from arithmetic import build_model, build_tokenizer, prompts, quiet_libraries, reward, shuffled_prompts
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

import fastrl
from fastrl.adapters.trl import GRPOTrainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = {
    "reward": "reward (fraction right)",
    "kl": "KL to the reference (nats per token)",
    "entropy": "entropy (nats per token)",
    "clip_ratio/region_mean": "clipped fraction",
}
TRAINERS = {"fastrl": GRPOTrainer, "trl": TRLTrainer}


class Bar(TrainerCallback):
    """A progress bar with the latest reward, in place of a printed dictionary per log."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn(f"{name} loss"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("reward {task.fields[reward]}"), console=Console(stderr=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task = self.progress.add_task("train", total=state.max_steps, reward="-")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.progress.update(self.task, reward=f"{logs['reward']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()


@torch.no_grad()
def sampled_reward(model: Any, tokenizer: Any) -> float:
    """Mean reward over every prompt, sampled as in training."""
    torch.manual_seed(0)
    texts = prompts() * 8
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    out = model.generate(**batch, max_new_tokens=2, do_sample=True, temperature=1.0, top_k=0)
    completions = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = reward(texts, [text.replace(" ", "") for text in completions])
    return sum(scores) / len(scores)


def train(name: str, steps: int, seed: int, quiet: bool) -> tuple[list[dict[str, float]], float, float]:
    """The log of one run, and the reward before and after."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build_model(Path(folder), seed), build_tokenizer()
        args = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=128,
            num_generations=16,
            num_iterations=2,
            max_completion_length=2,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            max_grad_norm=1.0,
            beta=0.005,
            use_bias_correction_kl=False,
            loss_type="dapo",
            epsilon_high=0.28,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=seed,
            bf16=False,
            dataloader_pin_memory=False,
            gradient_checkpointing=False,
        )
        trainer = TRAINERS[name](
            model=model,
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": shuffled_prompts(4000, seed)}),
            processing_class=tokenizer,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if not quiet:
            trainer.add_callback(Bar(name))
        before = sampled_reward(trainer.model, tokenizer)
        trainer.train()
        after = sampled_reward(trainer.model, tokenizer)
        log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return log, before, after


def plot(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, (key, title) in zip(axes.flat, CURVES.items(), strict=True):
        for name, log in runs.items():
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("training step")
    axes[0, 0].legend()
    figure.suptitle("GRPO on single-digit sums: a 2-layer Qwen2 trained by TRL's GRPOTrainer")
    figure.savefig(path, dpi=120)


def record(runs: dict[str, list[dict[str, float]]], seed: int) -> dict[str, Any]:
    """The plotted curves, with the versions and the machine that they came from."""
    curves = {
        name: {key: [entry[key] for entry in log if key in entry] for key in ("step", *CURVES)}
        for name, log in runs.items()
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"device": device, "seed": seed, "versions": fastrl.info()["versions"], "curves": curves}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", choices=("fastrl", "trl", "both"), default="fastrl", help="whose loss to train with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the plot and JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    quiet_libraries()
    options.out.mkdir(parents=True, exist_ok=True)

    chosen = list(TRAINERS) if options.loss == "both" else [options.loss]
    runs, rose = {}, True
    for name in chosen:
        runs[f"{name} loss"], before, after = train(name, options.steps, options.seed, options.quiet)
        rose = rose and after > before + 0.3
        print(f"{name} loss: reward {before:.3f} before, {after:.3f} after {options.steps} steps")
    plot(runs, options.out / "trl_grpo.png")
    (options.out / "trl_grpo.json").write_text(json.dumps(record(runs, options.seed), indent=1))
    print(f"curves: {options.out / 'trl_grpo.png'} and {options.out / 'trl_grpo.json'}")
    if not rose:
        print("the reward did not rise by 0.3", file=sys.stderr)
    return 0 if rose else 1


if __name__ == "__main__":
    raise SystemExit(main())
