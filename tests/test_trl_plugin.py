"""The TRL adapter on one instance, and what it refuses: by name, before training starts, and never a class or a model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import re
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
transformers = pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

from trl_common import SMALL, B, differences, model, run, scored_batch, trainer  # noqa: E402

from fastrl.adapters import trl as adapter  # noqa: E402
from fastrl.adapters.trl import GRPOTrainer, RLOOTrainer, config, plugin, spec_from_config, use_fastrl  # noqa: E402


def grpo_batch(it):
    batch = scored_batch(it)
    return {name: value for name, value in batch.items() if name not in ("old_logps", "importance_sampling_ratio")}


def state(it):
    return set(vars(it)), vars(it).get("_compute_loss"), vars(it.model).get("forward")


def test_use_and_restore():
    it, other = (trainer(trl.GRPOTrainer, model()) for _ in range(2))
    before, classes = state(it), (vars(trl.GRPOTrainer).copy(), vars(type(it.model)).copy())
    inputs = grpo_batch(it)
    theirs = run(it, inputs)
    used = use_fastrl(it)
    assert use_fastrl(it) is used and used.level == "hidden"
    ours = run(it, inputs)
    assert "fastrl/ratio_mean" in ours.metrics and differences(theirs, ours) == []
    assert "fastrl/ratio_mean" not in run(other, inputs).metrics
    assert use_fastrl(it, level="logits") is used and used.level == "logits"
    assert differences(theirs, run(it, inputs)) == []
    used.restore()
    used.restore()
    assert state(it) == before
    again = run(it, inputs)
    assert again.loss == theirs.loss and again.metrics == theirs.metrics
    assert (vars(trl.GRPOTrainer).copy(), vars(type(it.model)).copy()) == classes
    assert use_fastrl(it) is not used


@pytest.mark.parametrize("cls", [GRPOTrainer, RLOOTrainer])
def test_the_subclasses_are_drop_in_and_can_be_restored(cls):
    parent = cls.__mro__[1]
    it, own = trainer(cls, model()), trainer(parent, model())
    rloo = issubclass(cls, trl.RLOOTrainer)
    inputs = scored_batch(own)
    drop = ["tool_mask", "importance_sampling_ratio", *(n for n in inputs if n.endswith("token_logps"))]
    inputs = {
        name: value for name, value in inputs.items() if name not in (drop if rloo else [*drop[1:2], "old_logps"])
    }
    theirs = run(own, inputs)
    assert differences(theirs, run(it, inputs)) == [] and use_fastrl(it) is it.fastrl
    it.fastrl.restore()
    assert "fastrl/ratio_mean" not in run(it, inputs).metrics
    assert use_fastrl(it) is it.fastrl and "fastrl/ratio_mean" in run(it, inputs).metrics


def test_the_forward_comes_back_after_an_error(monkeypatch):
    it = trainer(GRPOTrainer, model())
    before = vars(it.model)["forward"]
    monkeypatch.setattr(plugin, "policy_loss_from_hidden", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(it, grpo_batch(it))
    assert vars(it.model)["forward"] is before


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


def test_other_objects_and_overridden_losses_are_refused():
    """trl#6808: a trainer with an objective of its own must not silently train on this one."""
    with pytest.raises(TypeError, match="^trainer: "):
        use_fastrl(transformers.Trainer)
    with pytest.raises(TypeError, match="^trainer: "):
        use_fastrl(None)
    for name in ("_compute_loss", "compute_loss", "get_gamma_weights"):
        cls = type("Own", (trl.GRPOTrainer,), {name: lambda self, *_, **__: None})
        with pytest.raises(ValueError, match=f"^{name}: "):
            use_fastrl(trainer(cls, model()))
    it = trainer(trl.GRPOTrainer, model())
    it._compute_loss = it._compute_loss
    with pytest.raises(ValueError, match="^_compute_loss: "):
        use_fastrl(it)
    with pytest.raises(ValueError, match="^get_off_policy_mask: "):
        trainer(type("Own", (GRPOTrainer,), {"get_off_policy_mask": lambda *_: None}), model())


@pytest.mark.parametrize("kind", ["subclass", "instance", "subclass of ours", "instance of ours"])
def test_an_override_of_the_scoring_is_honoured(kind, caplog):
    """TRL's loss calls it, so the loss is taken from what it returns, and this is said once."""
    cls = GRPOTrainer if "ours" in kind else trl.GRPOTrainer

    def colder(self, *args, **kwargs):
        logps, entropies, aux_loss = trl.GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)
        return 0.5 * logps, None if entropies is None else 3 * entropies, aux_loss

    plugin._say_override.cache_clear()
    name = "_get_per_token_logps_and_entropies"
    theirs = trainer(type("Own", (trl.GRPOTrainer,), {name: colder}), model(), entropy_coef=0.1)
    inputs = grpo_batch(theirs)
    it = trainer(type("Own", (cls,), {name: colder} if "subclass" in kind else {}), model(), entropy_coef=0.1)
    with caplog.at_level(logging.WARNING, "fastrl"):
        use_fastrl(it)
        if "instance" in kind:
            setattr(it, name, colder.__get__(it))
        for _ in range(2):
            assert differences(run(theirs, inputs), run(it, inputs)) == []
    assert [r.message for r in caplog.records] == [
        f"Own scores by its own {name}: the loss is taken from its log-probs"
    ]
    it.fastrl.restore()
    assert (
        differences(run(theirs, inputs), run(it, inputs)) == []
        and it._get_per_token_logps_and_entropies.__func__ is colder
    )


def test_gmpo_is_refused():
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    assert issubclass(GMPOConfig, trl.GRPOConfig)
    it = trainer(trl.GRPOTrainer, model())
    it.__class__ = GMPOTrainer
    with pytest.raises(ValueError, match="^_compute_loss: "):
        use_fastrl(it)


def test_a_version_outside_the_range_warns_once(monkeypatch, caplog):
    it, version = trainer(trl.GRPOTrainer, model()), importlib.metadata.version
    plugin._say_version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.17.0.dev0" if name == "trl" else version(name))
    with caplog.at_level(logging.WARNING, "fastrl"):
        use_fastrl(it)
        use_fastrl(it)
    assert [record.message for record in caplog.records] == [
        "fastrl.adapters.trl was tested with trl >= 1.16, < 1.17; this is trl 1.17.0.dev0"
    ]
    plugin._say_version.cache_clear()


def test_delta_without_effect_is_said(caplog):
    """TRL ignores delta unless its loss clips; so does this, and says so."""
    config._say_delta_is_not_read.cache_clear()
    config.grpo_spec.cache_clear()
    with caplog.at_level(logging.WARNING, "fastrl"):
        trainer(GRPOTrainer, model(), loss_type="sapo", delta=1.5)
    assert [record.message for record in caplog.records if record.name == "fastrl"] == [
        "delta has no effect with loss_type 'sapo', in TRL's loss and in this one"
    ]


def test_code_of_the_documentation_runs():
    page = Path(__file__).parent.parent / "docs" / "trl.md"
    namespace = {"trainer": trainer(trl.GRPOTrainer, model())}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) == 2 and namespace["GRPOTrainer"] is GRPOTrainer and not namespace["used"].active


def test_public_names():
    assert set(adapter.__all__) == {
        "GRPOTrainer",
        "Plugin",
        "RLOOTrainer",
        "rloo_rollouts_from_batch",
        "rollouts_from_batch",
        "spec_from_config",
        "use_fastrl",
    }
