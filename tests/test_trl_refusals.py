"""What the TRL adapter refuses: by name, before training starts where it can be seen then."""

from __future__ import annotations

import dataclasses

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
transformers = pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

from trl_common import SMALL, B, differences, grpo_batch, model, run, scored_batch, trainer  # noqa: E402

from fastrl.adapters.trl import GRPOTrainer, RLOOTrainer, spec_from_config, use_fastrl  # noqa: E402

REFUSED = [
    ({"loss_type": "new"}, "loss_type"),
    ({"importance_sampling_level": "sequence_token"}, "importance_sampling_level"),
    ({"delta": 1.1}, "delta"),
    ({"loss_type": "cispo", "epsilon_high": 0.0}, "epsilon_high"),
    ({"epsilon": -0.1}, "epsilon"),
    ({"loss_type": "vespo", "vespo_k_pos": 0.0}, "vespo_k_pos"),
    ({"loss_type": "sapo", "sapo_temperature_neg": -1.0}, "sapo_temperature_neg"),
    ({"top_entropy_quantile": 1.5}, "top_entropy_quantile"),
    ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, "entropy_coef"),
    ({"use_adaptive_entropy": True, "entropy_coef_delta": 0.0}, "entropy_coef_delta"),
    ({"cast_lm_head_to_fp32": True, "level": "logits"}, "cast_lm_head_to_fp32"),
    ({"level": "logps"}, "level"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused_by_name_at_construction(options, named):
    with pytest.raises((ValueError, TypeError), match=f"^{named}: "):
        trainer(GRPOTrainer, model(), **options)


def test_an_option_changed_later_is_checked_too():
    it = trainer(GRPOTrainer, model())
    inputs = grpo_batch(it)
    it.loss_type = "new"
    with pytest.raises(ValueError, match="^loss_type: "):
        run(it, inputs)


@pytest.mark.parametrize("base", [trl.GRPOConfig, trl.RLOOConfig])
def test_an_unknown_field_is_refused(base, tmp_path):
    """A later TRL may add an option that changes the loss; it must not be ignored."""
    options = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    spec_from_config(base(**options))
    later = dataclasses.make_dataclass("Later", [("kl_log_ratio_clip", float, 1.0)], bases=(base,))
    with pytest.raises(ValueError, match="^kl_log_ratio_clip: "):
        spec_from_config(later(**options))


def test_an_option_of_the_other_trainer_is_unknown(tmp_path):
    later = dataclasses.make_dataclass("Later", [("delta", float, None)], bases=(trl.RLOOConfig,))
    with pytest.raises(ValueError, match="^delta: "):
        spec_from_config(later(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False))


def test_spec_from_config(tmp_path):
    options = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    spec = spec_from_config(
        trl.GRPOConfig(**options, beta=0.1, loss_type="dr_grpo", max_completion_length=77, epsilon_high=0.3)
    )
    assert (spec.kl_coef, spec.kl_gradient, spec.max_length, spec.epsilon_high) == (0.1, "importance_weighted", 77, 0.3)
    assert spec_from_config(trl.GRPOConfig(**options, use_adaptive_entropy=True, entropy_coef=0.5)).entropy_coef == 0
    assert spec_from_config(trl.GRPOConfig(**options, loss_type="cispo", epsilon_high=5.0)).epsilon_high == 4.0
    assert spec_from_config(trl.RLOOConfig(**options, epsilon=0.1)).epsilon_high == 0.1


@pytest.mark.parametrize(
    ("extra", "named"),
    [({"turn_ids": torch.ones(B)}, "turn_ids"), ({"pixel_values_videos": torch.ones(B)}, "pixel_values_videos")],
)
@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_an_unknown_input_is_refused(cls, extra, named):
    it = trainer(cls, model())
    inputs = grpo_batch(it)
    if cls is RLOOTrainer:
        inputs = {n: v for n, v in scored_batch(it).items() if not n.endswith("token_logps") and n != "tool_mask"}
        del inputs["importance_sampling_ratio"]
    run(it, inputs | dict.fromkeys(extra))
    with pytest.raises(ValueError, match=f"^inputs: .*{named}"):
        run(it, inputs | extra)


def test_a_missing_ratio_is_refused():
    it = trainer(GRPOTrainer, model())
    it.use_vllm = True
    with pytest.raises(ValueError, match="^importance_sampling_ratio: "):
        run(it, grpo_batch(it))


def test_a_ratio_without_the_correction_is_not_used():
    """As in TRL: vLLM off, or its correction off, and the ratio multiplies nothing; VESPO takes it wherever it is."""
    it = trainer(GRPOTrainer, model())
    inputs = grpo_batch(it)
    plain = run(it, inputs)
    ratio = {"importance_sampling_ratio": torch.full((B, inputs["completion_ids"].shape[1]), 0.5)}
    assert run(it, inputs | ratio).loss == plain.loss
    it.loss_type = "vespo"
    plain = run(it, inputs)
    assert run(it, inputs | ratio).loss != plain.loss


class Squashed(transformers.Qwen2ForCausalLM):
    """A head that `LMHead.from_model` does not know."""

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        hidden_states = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden_states[:, -logits_to_keep:])
        logits = torch.tanh(logits) * 5
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def test_an_unknown_head_is_refused_and_trains_from_its_logits():
    policy = Squashed(transformers.Qwen2Config(**SMALL))
    with pytest.raises(ValueError, match=r"^model: .*Squashed.*level='logits'"):
        trainer(GRPOTrainer, policy)
    it = trainer(GRPOTrainer, Squashed(transformers.Qwen2Config(**SMALL)), level="logits", loss_type="bnpo")
    it.model.lm_head.weight.data.mul_(30)
    inputs = grpo_batch(it)
    result = run(
        it, {n: v for n, v in inputs.items() if n in ("advantages", "num_items_in_batch") or "ids" in n or "mask" in n}
    )
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = it.model(input_ids=ids, attention_mask=attention).logits
    T = inputs["completion_ids"].shape[1]
    want = -(logits[:, -T - 1 : -1].softmax(-1) * logits[:, -T - 1 : -1].log_softmax(-1)).sum(-1)
    counts = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    assert result.metrics["entropy"] == pytest.approx(want[counts].mean().item(), rel=1e-5)


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_another_length_than_asked_for_is_refused(level, monkeypatch):
    """A model may drop positions, or take `logits_to_keep` and ignore it, which is fine, or half of it, which is not."""
    it = trainer(GRPOTrainer, model(), level=level)
    inputs = grpo_batch(it)
    whole = it.model.model.forward

    def shorter(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state[:, 4:] if level == "hidden" else out.last_hidden_state[:, -3:]
        return out

    monkeypatch.setattr(it.model.model, "forward", shorter)
    with pytest.raises(ValueError, match=f"^{level}: expected length"):
        run(it, inputs)


class Ignores(transformers.Qwen2ForCausalLM):
    def forward(self, logits_to_keep=0, **kwargs):
        return super().forward(**kwargs)


class Lacks(transformers.Qwen2ForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("cls", [Ignores, Lacks])
def test_logits_to_keep_may_be_ignored(cls):
    torch.manual_seed(0)
    it = trainer(trl.GRPOTrainer, cls(transformers.Qwen2Config(**SMALL)))
    inputs = grpo_batch(it)
    theirs = run(it, inputs)
    use_fastrl(it, level="logits")
    assert differences(theirs, run(it, inputs)) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fsdp", lambda it: setattr(it, "is_fsdp_enabled", True)),
        ("device_map", lambda it: setattr(it.model, "hf_device_map", {"model": 0, "lm_head": 1})),
        ("model", lambda it: setattr(it.model, "base_model_prefix", "absent")),
    ],
)
def test_what_only_the_logits_level_can_do(name, change):
    it = trainer(trl.GRPOTrainer, model())
    change(it)
    with pytest.raises(ValueError, match=f"^{name}: .*level='logits'"):
        use_fastrl(it)
    assert "fastrl" not in vars(it)
    if name != "model":
        assert use_fastrl(it, level="logprobs").level == "logprobs"
    assert use_fastrl(it, level="logits").level == "logits"
    with pytest.raises(ValueError, match=f"^{name}: "):
        use_fastrl(it, level="hidden")
    assert it.fastrl.level == "logits"
