"""PEFT models: LoRA on the body, LoRA or a saved copy on the head, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from common import close
from test_head import TIED, UNTIED, build, loud, sampled

import fastrl

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore")

SPEC = fastrl.GRPO.replace(entropy_coef=0.02)
BODY, HEAD = ["q_proj", "down_proj"], ["q_proj", "lm_head"]


def adapted(config, name="Qwen2", extra=UNTIED, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = peft.get_peft_model(loud(build(name, extra)).to(dtype), config)
    randomise(model)
    return model


def randomise(model):
    """LoRA starts with B = 0, where it neither shows nor gives A a gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def through(model, level, seed=0):
    """Loss and gradients of everything that is trained, from hidden states or from the model's own logits."""
    model.zero_grad()
    torch.manual_seed(seed)
    ids, rollouts = sampled()
    torch.manual_seed(seed + 1)  # dropout draws the same in both
    if level == "logits":
        out = fastrl.policy_loss_from_logits(model(input_ids=ids).logits[:, :-1], rollouts, SPEC)
    else:
        hidden = model.get_base_model().base_model(input_ids=ids).last_hidden_state
        head = fastrl.LMHead.from_model(model)
        scored = hidden[:, :-1]
        out = fastrl.policy_loss_from_hidden(scored, head, rollouts, SPEC)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model, trained, ulps=4000, dtype=torch.float32):
    want, gradients = through(model, "logits")
    got, found = through(model, "hidden")
    assert found.keys() == gradients.keys()
    assert any(trained in name for name in found), trained
    close(got.loss, want.loss, ulps=ulps, dtype=dtype)
    close(got.logps, want.logps, ulps=ulps / 8, dtype=dtype)
    for name, gradient in gradients.items():
        close(found[name], gradient, ulps=ulps, dtype=dtype, what=name)
    return found


@pytest.mark.parametrize("tying", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [BODY, HEAD, [*HEAD, "embed_tokens"]], ids=["body", "head", "head-and-embedding"])
def test_lora(targets, tying):
    """Value and all gradients; the frozen base gets none."""
    model = adapted(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets), extra=tying)
    found = same(model, "lora_A")
    assert all("lora_" in name for name in found)
    assert any("lm_head.lora_B" in name for name in found) == (targets != BODY)


@pytest.mark.parametrize(
    "name, extra",
    [
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Phi", {}),
    ],
    ids=["softcap", "scale", "bias"],
)
def test_lora_on_a_head_with_a_transform(name, extra):
    same(adapted(peft.LoraConfig(r=3, target_modules=["lm_head"], use_rslora=True), name, extra), "lora_A")


def test_lora_with_a_trained_base():
    """The base weight's own gradient beside those of the adapter."""
    model = adapted(peft.LoraConfig(r=3, target_modules=HEAD))
    model.get_base_model().lm_head.base_layer.weight.requires_grad_(True)
    assert any("base_layer" in name for name in same(model, "lora_A"))


def test_lora_in_bfloat16_is_not_rounded_into_the_weight():
    """A step of 1e-3 of a weight is below bfloat16's resolution: an adapter merged into it would be lost."""
    model = adapted(peft.LoraConfig(r=3, target_modules=["lm_head"]), dtype=torch.bfloat16)
    layer = model.get_base_model().lm_head
    same(model, "lora_A", ulps=16, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_A["default"].weight.normal_(std=1.0)
        layer.lora_B["default"].weight.normal_(std=2e-4)
        hidden = torch.randn(64, 16).bfloat16()
        low = hidden.float() @ layer.get_delta_weight("default").float().t()
        merged = (layer.base_layer.weight + layer.get_delta_weight("default")).bfloat16()
        kept = (hidden.double() @ (merged.double() - layer.base_layer.weight.double()).t() - low).norm() / low.norm()
        head = fastrl.LMHead.from_model(model)
        h, w = head.projection(hidden, head.weight)
        ours = (h.double() @ w.double().t() - hidden.double() @ head.weight.double().t() - low).norm() / low.norm()
    assert ours < 0.01 < 0.2 < kept


def test_several_active_adapters_add_up():
    model = adapted(peft.LoraConfig(r=3, target_modules=HEAD))
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=HEAD))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    found = same(model, "second")
    assert any("default" in name for name in found)
    model.set_adapter("second")
    assert len(fastrl.LMHead.from_model(model).adapters) == 1


def test_dropout_draws_as_peft_does():
    """One draw per hidden unit and call, from the same generator state the same draw."""
    model = adapted(peft.LoraConfig(r=3, target_modules=["lm_head"], lora_dropout=0.4)).train()
    hidden = torch.randn(2, 5, 16)
    head, layer = fastrl.LMHead.from_model(model), model.get_base_model().lm_head
    ids = torch.randint(0, 61, (2, 5))
    torch.manual_seed(3)
    want = torch.log_softmax(layer(hidden), -1).gather(-1, ids[..., None]).squeeze(-1)
    torch.manual_seed(3)
    close(fastrl.logprobs_from_hidden(hidden, head, ids).logps, want, ulps=128)
    model.eval()
    want = torch.log_softmax(layer(hidden), -1).gather(-1, ids[..., None]).squeeze(-1)
    close(fastrl.logprobs_from_hidden(hidden, head, ids).logps, want, ulps=128)


def test_merged_and_disabled_adapters():
    model = adapted(peft.LoraConfig(r=3, target_modules=HEAD))
    with model.disable_adapter():
        head = fastrl.LMHead.from_model(model)
        assert head.adapters == () and head.weight is model.get_base_model().lm_head.base_layer.weight
    before, _ = through(model, "logits")
    model.merge_adapter()
    assert fastrl.LMHead.from_model(model).adapters == ()
    ids = torch.randint(2, 61, (2, 7))
    with torch.no_grad():
        hidden = model.get_base_model().base_model(input_ids=ids).last_hidden_state
        got = fastrl.logprobs_from_hidden(hidden, fastrl.LMHead.from_model(model), ids)
        want = fastrl.logprobs_from_logits(model(input_ids=ids).logits, ids)
    close(got.logps, want.logps, ulps=128)
    model.unmerge_adapter()
    after, _ = through(model, "hidden")
    close(after.loss, before.loss, ulps=4000)


@pytest.mark.parametrize("tying", [TIED, UNTIED], ids=["tied", "untied"])
def test_modules_to_save(tying):
    """A head trained in full beside LoRA: the active copy, or the original while adapters are disabled."""
    model = adapted(peft.LoraConfig(r=3, target_modules=BODY, modules_to_save=["lm_head"]), extra=tying)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    found = same(model, "modules_to_save")
    assert any("lm_head.modules_to_save.default.weight" in name for name in found)
    with model.disable_adapter():
        assert fastrl.LMHead.from_model(model).weight is model.get_base_model().lm_head.original_module.weight


REFUSED = {
    "DoRA": (lambda: peft.LoraConfig(r=3, target_modules=HEAD, use_dora=True), "DoraLinearVariant"),
    "IA3": (lambda: peft.IA3Config(target_modules=HEAD, feedforward_modules=[]), "peft.tuners.ia3"),
    "LoHa": (lambda: peft.LoHaConfig(r=2, target_modules=HEAD), "peft.tuners.loha"),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PROMPT_TUNING, whose virtual tokens",
    ),
    "prefix tuning": (
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "PREFIX_TUNING, whose virtual tokens",
    ),
    "trainable tokens": (
        lambda: peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
        "trainable_tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    config, named = REFUSED[case]
    model = adapted(config(), extra=TIED if case == "trainable tokens" else UNTIED)
    with pytest.raises(ValueError, match=f"model: .*{named}"):
        fastrl.LMHead.from_model(model)


def test_lora_with_a_bias_is_refused():
    model = adapted(peft.LoraConfig(r=3, target_modules=["lm_head"], lora_bias=True), "Phi", {})
    with pytest.raises(ValueError, match="'default' with a bias"):
        fastrl.LMHead.from_model(model)


def test_merged_and_disabled_at_once_is_refused():
    model = adapted(peft.LoraConfig(r=3, target_modules=HEAD))
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="merged and disabled"):
        fastrl.LMHead.from_model(model)


def test_shapes_of_adapters_are_checked():
    from fastrl.head_weights import LowRank

    with pytest.raises(ValueError, match="adapters: expected a of shape"):
        fastrl.LMHead(torch.zeros(5, 4), adapters=(LowRank(torch.zeros(2, 4), torch.zeros(4, 2)),))
