"""Transformers: one step of a real `Trainer`, from logits and from hidden states, has the gradient of `fastrl.policy_loss`
on the whole batch, however the batch is split; what is not honoured is refused by name."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers 5.23")
pytest.importorskip("accelerate", reason="needs accelerate")

from hf_cases import (
    VOCABULARY,
    assert_same,
    build_model,
    build_trainer,
    logged_rows,
    lora,
    trained_gradients,
    whole_batch,
)

import fastrl
from fastrl.adapters import _versions, hf
from fastrl.adapters.hf import loss as hf_loss

pytestmark = pytest.mark.filterwarnings("ignore")

SPECS = {
    "token-mean": fastrl.DAPO,
    "seq-mean-token-mean": fastrl.GRPO.replace(kl_coef=0.1),
    "seq-mean-token-sum-norm": fastrl.DR_GRPO.replace(max_length=9, entropy_coef=0.05),
    "seq-mean-token-sum": fastrl.LUSPO,
    "token-sum": fastrl.CISPO.replace(aggregation="token-sum"),
    "gspo": fastrl.GSPO.replace(epsilon_low=0.1, epsilon_high=0.2),
}
SPLIT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}  # 8 rows: 3, 3 and 2


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """accelerate collects garbage whenever a training starts; among the objects of all imports it takes 0.2 s."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("path", ["logits", "hidden"])
@pytest.mark.parametrize(
    ("name", "split"),
    [pytest.param(name, SPLIT, id=f"{name}-accumulated") for name in SPECS]
    + [pytest.param(name, {}, id=f"{name}-whole") for name in ("token-mean", "gspo")],
)
def test_one_step_has_the_gradient_of_the_whole_batch(name, split, path, tmp_path):
    spec, rows, model = SPECS[name], logged_rows(), build_model()
    loss, want = whole_batch(model, rows, spec)
    trainer = build_trainer(path, model, rows, spec, tmp_path, **split)
    assert_same(trained_gradients(trainer), want)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_the_comparison_can_fail(path, tmp_path, monkeypatch):
    """With each micro-batch's own count instead of the Trainer's, accumulated gradients are others."""
    spec, rows, model = fastrl.DAPO, logged_rows(), build_model()
    _, want = whole_batch(model, rows, spec)
    target = "fastrl.adapters.hf.trainer.normalizer_of" if path == "hidden" else "fastrl.adapters.hf.loss.normalizer_of"
    monkeypatch.setattr(target, lambda *_: None)
    got = trained_gradients(build_trainer(path, model, rows, spec, tmp_path, **SPLIT))
    with pytest.raises(AssertionError):
        assert_same(got, want)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_metrics_and_evaluation(path, average, tmp_path):
    """Evaluation in batches of 3, 3 and 2: each divides by its own count; the metrics merge to those of all rows."""
    spec, rows, model = fastrl.GRPO.replace(kl_coef=0.1), logged_rows(), build_model()
    options = {"per_device_eval_batch_size": 3, "average_tokens_across_devices": average}
    trainer = build_trainer(path, model, rows, spec, tmp_path, eval_dataset=rows, **options)
    losses = [float(whole_batch(model, part, spec)[0]) for part in (rows[:3], rows[3:6], rows[6:])]
    logged = trainer.evaluate()
    assert logged["eval_loss"] == pytest.approx(sum(n * x for n, x in zip((3, 3, 2), losses, strict=True)) / 8)
    if path == "logits":
        values = {f"eval_fastrl/{k}": v for k, v in trainer.compute_loss_func.pop_metrics(training=False).items()}
        assert trainer.compute_loss_func.pop_metrics(training=False) == {}
    else:
        values = trainer.state.log_history[-1]
    assert values["eval_fastrl/tokens"] == sum(sum(row["completion_mask"]) for row in rows)
    assert values["eval_fastrl/sequences"] == 7
    assert {"eval_fastrl/ratio_mean", "eval_fastrl/ref_kl", "eval_fastrl/entropy"} <= set(values)


def test_predictions_are_the_log_probs(tmp_path):
    """compute_metrics gets them padded with -100 over batches of different lengths."""
    rows, seen = logged_rows(ref=False), []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mean_logp": float(prediction.predictions[prediction.label_ids["mask"] == 1].mean())}

    trainer = build_trainer(
        "hidden", build_model(), rows, fastrl.DAPO, tmp_path, eval_dataset=rows, compute_metrics=compute_metrics,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    assert trainer.evaluate()["eval_mean_logp"] < 0
    assert seen[0].predictions.shape == seen[0].label_ids["token_ids"].shape


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_autocast_and_checkpointing(path, tmp_path):
    spec, rows, model = fastrl.DAPO, logged_rows(), build_model()
    _, want = whole_batch(model, rows, spec)
    trainer = build_trainer(path, model, rows, spec, tmp_path, bf16=True, gradient_checkpointing=True, **SPLIT)
    got = trained_gradients(trainer)
    flat = [torch.cat([gradient.flatten() for gradient in x.values()]) for x in (got, want)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99
    assert trainer.model(torch.tensor([[2, 3]])).logits.shape == (1, 2, VOCABULARY)  # its forward is its own again


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_lora_on_the_body(path, saved, tmp_path):
    spec, rows = fastrl.DAPO, logged_rows()
    model = lora(build_model(), target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    _, want = whole_batch(model, rows, spec)
    got = trained_gradients(build_trainer(path, model, rows, spec, tmp_path, **SPLIT))
    assert any("lora" in name for name in got) and any("lm_head" in name for name in got) == (saved is not None)
    assert_same(got, want)


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_lora_on_the_head(path, tmp_path):
    spec, rows = fastrl.DAPO, logged_rows()
    model = lora(build_model(), target_modules=["q_proj", "lm_head"])
    _, want = whole_batch(model, rows, spec)
    got = trained_gradients(build_trainer(path, model, rows, spec, tmp_path, **SPLIT))
    assert sum("lm_head.lora" in name for name in got) == 2
    assert_same(got, want)


def test_columns_are_kept(tmp_path):
    """`remove_unused_columns` is True by default, and would drop every column of the log."""
    rows = logged_rows()
    model = build_model()
    _, want = whole_batch(model, rows, fastrl.DAPO)
    trainer = build_trainer("hidden", model, rows, fastrl.DAPO, tmp_path, remove_unused_columns=True)
    assert_same(trained_gradients(trainer), want)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        build_trainer("logits", build_model(), rows, fastrl.DAPO, tmp_path, remove_unused_columns=True).train()


@pytest.mark.parametrize("path", ["logits", "hidden"])
def test_rewards_of_whole_groups(path, tmp_path):
    """Advantages made inside the loss, groups of two kept together, as those of `add_advantages` over the log."""
    rows = [row | {"rewards": float(i * i % 5), "group_ids": i // 2} for i, row in enumerate(logged_rows(ref=False))]
    rows = [{key: value for key, value in row.items() if key != "advantages"} for row in rows]
    model = build_model()
    _, want = whole_batch(model, hf.add_advantages(rows, fastrl.DAPO), fastrl.DAPO)
    options = {
        "data_collator": hf.RolloutCollator(spec=fastrl.DAPO, group_size=2), "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
    }  # fmt: skip
    assert_same(trained_gradients(build_trainer(path, model, rows, fastrl.DAPO, tmp_path, **options)), want)
    spec = fastrl.DAPO.replace(advantage_scale="batch")
    with pytest.raises(ValueError, match="^advantage_scale: "):
        build_trainer(path, build_model(), rows, spec, tmp_path, **options).train()


def test_another_transformers_is_named_once(tmp_path, monkeypatch, caplog):
    _versions.warn_outside.cache_clear()
    monkeypatch.setattr(_versions.importlib.metadata, "version", lambda _: "6.1.0")
    hf.compute_loss_func(fastrl.DAPO)
    hf.compute_loss_func(fastrl.GRPO)
    monkeypatch.undo()
    _versions.warn_outside.cache_clear()
    hf.compute_loss_func(fastrl.DAPO)  # the installed one is inside
    ours = [record.getMessage() for record in caplog.records if record.name == "fastrl"]
    assert len(ours) == 1 and "transformers 6.1.0" in ours[0] and ">=5.23,<5.24" in ours[0]


def test_clip_cov_draws_anew_at_every_step():
    spec = fastrl.CLIP_COV.replace(seed=5)
    assert [hf_loss.spec_at(spec, step).seed for step in range(3)] == [5, 6, 7]
    assert hf_loss.spec_at(fastrl.DAPO, 3) is fastrl.DAPO


WHOLE_BATCH = {
    "top_entropy_quantile": fastrl.DAPO.replace(top_entropy_quantile=0.5),
    "entropy_aggregation": fastrl.DAPO.replace(entropy_coef=0.1, entropy_aggregation="token-mean"),
    "objective": fastrl.KL_COV.replace(kl_cov_fraction=0.3),
}


@pytest.mark.parametrize("path", ["logits", "hidden"])
@pytest.mark.parametrize("named", WHOLE_BATCH)
def test_a_statistic_of_the_whole_batch_needs_the_whole_batch(named, path, tmp_path):
    spec, rows, model = WHOLE_BATCH[named], logged_rows(), build_model()
    _, want = whole_batch(model, rows, spec)
    assert_same(trained_gradients(build_trainer(path, model, rows, spec, tmp_path)), want)
    with pytest.raises(ValueError, match=f"^{named}: "):
        build_trainer(path, build_model(), rows, spec, tmp_path, **SPLIT).train()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"torch_compile": True}, "torch_compile"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_refused_by_name(options, named, tmp_path):
    with pytest.raises(ValueError, match=f"^{named}: "):
        build_trainer("hidden", build_model(), logged_rows(), fastrl.DAPO, tmp_path, **options)


def test_foreign_labels_are_refused():
    loss, rows = hf.compute_loss_func(fastrl.DAPO), logged_rows()
    logits = torch.randn(8, 11, VOCABULARY, requires_grad=True)
    with pytest.raises(ValueError, match="^labels: .*RolloutCollator"):
        loss({"logits": logits}, torch.zeros(8, 11).long(), 3)
    with pytest.raises(ValueError, match="^labels: .*RolloutCollator"):
        loss({"logits": logits}, None)
    batch = hf.RolloutCollator(spec=fastrl.GRPO)(rows)
    with pytest.raises(ValueError, match="^labels: expected a count of tokens, as aggregation is 'token-mean'"):
        loss({"logits": logits}, batch["labels"], 3)
    batch = hf.RolloutCollator(spec=fastrl.DAPO)(rows)
    logits = torch.randn(*batch["input_ids"].shape, VOCABULARY, requires_grad=True)
    with pytest.raises(ValueError, match="^num_items_in_batch: "):
        loss({"logits": logits}, batch["labels"])
    with pytest.raises(ValueError, match="^outputs: "):
        loss((logits,), batch["labels"], 3)
    with pytest.raises(ValueError, match="^logits: "):
        loss({"logits": logits[:, 1:]}, batch["labels"], 3)
    with torch.no_grad():
        assert torch.isfinite(loss({"logits": logits}, batch["labels"]))


def test_a_window_that_counts_nothing_moves_nothing(tmp_path):
    rows = [row | {"completion_mask": [0] * len(row["completion_ids"])} for row in logged_rows()]
    for path in ("logits", "hidden"):
        got = trained_gradients(build_trainer(path, build_model(), rows, fastrl.DAPO, tmp_path, **SPLIT))
        assert all(bool((gradient == 0).all()) for gradient in got.values())


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    """DDP over gloo, micro-batches of 2 rows, two of them accumulated; without the average over devices each process
    divides by its own count, and the gradients are averaged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = str(Path(__file__).parent / "hf_two_processes.py")
    command = [sys.executable, "-X", "faulthandler", script, str(tmp_path)]
    ranks, logs = [], [tmp_path / f"rank{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + 180
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > deadline:
                for rank in ranks:
                    rank.send_signal(signal.SIGABRT)  # it says where it waits
                    rank.wait()
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], [log.read_text()[-6000:] for log in logs]
    tokens = sum(sum(row["completion_mask"]) for row in logged_rows())
    assert json.loads((tmp_path / "report.json").read_text()) == {"compared": 4, "tokens": tokens}
