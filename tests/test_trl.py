"""The TRL adapter: the same scored batch through TRL's own loss and ours gives the same loss, gradients and metrics; and
what it does not honour it refuses by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

from datasets import Dataset  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from fastrl.adapters.trl import GRPOTrainer, spec_from_config  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, so that a trainer can load its reference from it."""
    from tokenizers import Tokenizer, models

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, 40)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return path


def build(cls, folder, **options):
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # peaked enough for ratios and entropies to vary
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    trainer = cls(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["t2"] * 8}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
    )
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    return trainer


def scored_batch(trainer, *, old=True, tool=False, ref=False, seed=1):
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(2, 40, (4, 3), generator=g)
    completion = torch.randint(2, 40, (4, 6), generator=g)
    lengths = torch.tensor([6, 4, 1, 0])
    mask = (torch.arange(6) < lengths[:, None]).long()
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": torch.tensor([1.3, -0.7, 0.4, 2.0]),
        "num_items_in_batch": torch.tensor(29.0),
    }
    ids = torch.cat([prompt, completion], 1)
    attention = torch.cat([inputs["prompt_mask"], mask], 1)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 6)
    noise = 0.4 * torch.randn(4, 6, generator=g)
    if old:
        inputs["old_per_token_logps"] = logps + noise
    if ref:
        inputs["ref_per_token_logps"] = logps + 0.5 * noise.roll(1, 1)
    if tool:
        inputs["tool_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1]] * 4)
    return inputs


def loss_and_gradients(trainer, inputs, train=True):
    trainer.model.train(train)
    trainer.model.zero_grad()
    with torch.set_grad_enabled(train):
        loss = trainer._compute_loss(trainer.model, dict(inputs))
    if train:
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


CASES = {
    "dapo": {},
    "dapo-accumulated": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "dapo-kl": {"beta": 0.3, "use_bias_correction_kl": False},
    "grpo": {"loss_type": "grpo", "gradient_accumulation_steps": 2},
    "grpo-kl-delta": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False, "delta": 1.4},
    "bnpo": {"loss_type": "bnpo", "epsilon_high": 0.28, "gradient_accumulation_steps": 3},
    "dr_grpo": {"loss_type": "dr_grpo", "gradient_accumulation_steps": 2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
    "gspo-dapo-kl": {"importance_sampling_level": "sequence", "beta": 0.2, "use_bias_correction_kl": False},
    "temperature": {"temperature": 0.7},
}


@pytest.mark.parametrize("old", [True, False], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("tool", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("name", CASES)
def test_same_batch_same_loss(folder, name, tool, old):
    options = CASES[name]
    theirs, ours = build(trl.GRPOTrainer, folder, **options), build(GRPOTrainer, folder, **options)
    inputs = scored_batch(theirs, tool=tool, old=old, ref="beta" in options)
    want, want_gradients = loss_and_gradients(theirs, inputs)
    got, gradients = loss_and_gradients(ours, inputs)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    assert set(gradients) == set(want_gradients)
    largest = max(g.abs().max() for g in want_gradients.values())
    for parameter, gradient in want_gradients.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=2e-6 * float(largest), msg=parameter)
    logged, expected = ours._metrics["train"], theirs._metrics["train"]
    for metric in expected:
        if metric in logged and not (metric.startswith("clip_ratio") and "gspo" in name):
            assert logged[metric][-1] == pytest.approx(expected[metric][-1], rel=1e-4, abs=1e-6), metric
    assert {"fastrl/ratio_mean", "fastrl/approx_kl", "entropy"} <= set(logged)
    want, _ = loss_and_gradients(theirs, inputs, train=False)
    got, none = loss_and_gradients(ours, inputs, train=False)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    assert none == {}


@pytest.mark.parametrize("mutation", ["normalizer", "mask"])
def test_the_parity_test_can_fail(folder, mutation, monkeypatch):
    """Without the normaliser, or without the tool mask, the comparison above breaks."""
    import fastrl.adapters.trl as adapter

    theirs, ours = build(trl.GRPOTrainer, folder), build(GRPOTrainer, folder)
    inputs = scored_batch(theirs, tool=True)
    if mutation == "normalizer":
        monkeypatch.setattr(GRPOTrainer, "_normalizer", lambda *_: None)
    else:
        original = adapter.rollouts_from_batch
        monkeypatch.setattr(adapter, "rollouts_from_batch", lambda batch: original({**batch, "tool_mask": None}))
    want, got = loss_and_gradients(theirs, inputs)[0], loss_and_gradients(ours, inputs)[0]
    assert abs(want - got) > 1e-3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss_type"),
        ({"loss_type": "sapo"}, "loss_type"),
        ({"beta": 0.1}, "use_bias_correction_kl"),
        ({"entropy_coef": 0.01}, "entropy_coef"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(folder, options, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        build(GRPOTrainer, folder, **options)


def test_an_unknown_field_is_refused(folder):
    """A later TRL may add an option that changes the loss: it must not be ignored."""
    args = trl.GRPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False)
    spec_from_config(args)
    later = dataclasses.make_dataclass("Later", [("kl_log_ratio_clip", float, 1.0)], bases=(trl.GRPOConfig,))
    with pytest.raises(ValueError, match="^kl_log_ratio_clip: "):
        spec_from_config(later(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False))


def test_an_unknown_input_is_refused(folder):
    trainer = build(GRPOTrainer, folder)
    inputs = scored_batch(trainer) | {"importance_sampling_ratio": torch.ones(4, 6)}
    with pytest.raises(ValueError, match="importance_sampling_ratio"):
        trainer._compute_loss(trainer.model, inputs)
