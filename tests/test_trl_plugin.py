"""The TRL adapter on one instance, and what it refuses: by name, before training starts, and never a class or a model."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="needs trl 1.16")
transformers = pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

from trl_common import differences, grpo_batch, model, run, scored_batch, trainer  # noqa: E402

from fastrl.adapters import trl as adapter  # noqa: E402
from fastrl.adapters._versions import warn_outside  # noqa: E402
from fastrl.adapters.trl import GRPOTrainer, RLOOTrainer, config, plugin, use_fastrl  # noqa: E402


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


@pytest.mark.parametrize(
    ("installed", "warned"), [("1.15.2", 1), ("1.16.1", 0), ("1.17.0.dev0", 1), ("1.17rc1", 1), ("2", 1)]
)
def test_a_version_outside_the_range_warns_once(installed, warned, monkeypatch, caplog):
    it, version = trainer(trl.GRPOTrainer, model()), importlib.metadata.version
    warn_outside.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed if name == "trl" else version(name))
    with caplog.at_level(logging.WARNING, "fastrl"):
        use_fastrl(it)
        use_fastrl(it)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned and all(f"trl {installed}" in text and "trl >=1.16,<1.17" in text for text in said)
    warn_outside.cache_clear()


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
