"""The TRL adapter over model families and ways to train them: heads with softcap, scale and bias, tied heads, experts,
images, PEFT, autocast, gradient checkpointing. TRL's loss and ours on one trainer, as in `test_trl.py`."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
transformers = pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

from trl_common import IMAGE, SMALL, B, P, T, both, differences, grpo_batch, model, rloo_batch, trainer  # noqa: E402

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "Qwen2": {},
    "Qwen2-tied": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Gemma3": {"head_dim": 8, "final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # a head with a bias
    "GPTNeoX": {},
    "Mixtral": {**EXPERTS, "router_aux_loss_coef": 0.5},
    "Qwen3Moe": {
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.5,
    },
}
OPTIONS = {"loss_type": "grpo", "entropy_coef": 0.1, "top_entropy_quantile": 0.8}


def build(cls, policy, **options):
    return trainer(cls, policy, **OPTIONS | options)


@pytest.mark.parametrize("level", ["hidden", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, level):
    policy = model(family.split("-")[0], **FAMILIES[family])
    it = build(trl.GRPOTrainer, policy, gradient_accumulation_steps=2)
    theirs, ours = both(it, grpo_batch(it), level=level)
    assert differences(theirs, ours, rtol=5e-5) == []
    assert len(ours.gradients) == len(list(policy.parameters()))
    experts = "num_experts_per_tok" in FAMILIES[family]
    assert ("aux_loss" in ours.metrics) == experts
    if experts:
        router = next(g for name, g in ours.gradients.items() if "gate" in name and "gate_proj" not in name)
        assert router.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_evaluation(family):
    it = build(trl.GRPOTrainer, model(family.split("-")[0], **FAMILIES[family]))
    inputs = grpo_batch(it)
    for level in ("hidden", "logits"):
        assert differences(*both(it, inputs, False, level=level), rtol=5e-5) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_rloo_over_families(family):
    it = trainer(trl.RLOOTrainer, model(family.split("-")[0], **FAMILIES[family]))
    inputs = rloo_batch(it)
    for level in ("hidden", "logits", "logprobs"):
        theirs, ours = both(it, inputs, level=level)
        assert differences(theirs, ours, rtol=5e-5) == [] and ours.gradients
        assert ("aux_loss" in ours.metrics) == ("num_experts_per_tok" in FAMILIES[family])
        assert differences(*both(it, inputs, False, level=level), rtol=5e-5) == []


def lora(**options):
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)


@pytest.mark.parametrize("level", ["hidden", "logits"])
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}], ids=["body", "whole-head"])
def test_peft(extra, level):
    """LoRA on the body, with the head frozen or trained whole."""
    config = lora(target_modules=["q_proj", "down_proj"], **extra)
    it = build(trl.GRPOTrainer, model("Qwen2"), peft_config=config)
    theirs, ours = both(it, grpo_batch(it), level=level)
    assert differences(theirs, ours) == []
    trained = {name for name, parameter in it.model.named_parameters() if parameter.requires_grad}
    assert ours.gradients.keys() == trained
    assert any("lora_A" in name for name in trained) and any("lm_head" in name for name in trained) == bool(extra)


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_peft_with_virtual_tokens(level):
    """The backbone then sees more positions than there are ids."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    it = build(trl.GRPOTrainer, model("Qwen2"), peft_config=config)
    theirs, ours = both(it, grpo_batch(it), level=level)
    assert differences(theirs, ours) == [] and len(ours.gradients) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_another_dtype_than_the_body(bias):
    """As PEFT keeps a trained copy of the head, in float32, over a bf16 body."""
    policy = model("Phi" if bias else "Qwen2").bfloat16()
    policy.get_output_embeddings().float()
    it = build(trl.GRPOTrainer, policy)
    theirs, ours = both(it, grpo_batch(it))
    assert differences(theirs, ours, rtol=3e-2) == []
    assert ours.gradients["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    it = build(trl.GRPOTrainer, model("Qwen2"), **options)
    it.model.gradient_checkpointing_enable(options["gradient_checkpointing_kwargs"])
    theirs, ours = both(it, grpo_batch(it))
    assert differences(theirs, ours) == []


def error(result, truth):
    """The largest error of a gradient against the largest entry of all, and that of the loss."""
    scale = max(g.abs().max() for g in truth.gradients.values())
    worst = max((result.gradients[name].float() - g).abs().max() for name, g in truth.gradients.items())
    return (worst / scale).item(), (result.loss - truth.loss).abs().item()


@pytest.mark.parametrize(
    ("level", "head"),
    [("hidden", ""), ("logits", ""), ("hidden", "float32-head"), ("hidden", "float32-tied-head")],
)
def test_bf16_autocast(level, head):
    """As accelerate prepares a model for it; both are as far from the float32 gradient, and the head may be float32."""
    policy = model("Qwen2", tie_word_embeddings="tied" in head)
    it = build(trl.GRPOTrainer, policy, bf16=True, cast_lm_head_to_fp32=bool(head))
    inputs = grpo_batch(it)
    exact = build(trl.GRPOTrainer, model("Qwen2", tie_word_embeddings="tied" in head))
    truth, _ = both(exact, inputs)
    prepared = it.accelerator.prepare(it.model)
    theirs, ours = both(it, inputs, level=level, through=prepared)
    for mine, other in zip(error(ours, truth), error(theirs, truth), strict=True):
        assert mine <= 1.5 * other + 1e-3, (mine, other)
    assert ours.gradients.keys() == theirs.gradients.keys()
    if head:
        assert differences(theirs, ours, rtol=1e-4) == []


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_fp16_autocast(level):
    it, exact = (build(trl.GRPOTrainer, model("Qwen2"), loss_type="bnpo") for _ in range(2))
    inputs = grpo_batch(it)
    truth, _ = both(exact, inputs)
    with torch.autocast("cpu", torch.float16):
        theirs, ours = both(it, inputs, level=level)
    for mine, other in zip(error(ours, truth), error(theirs, truth), strict=True):
        assert mine <= 1.5 * other + 1e-3, (mine, other)


def test_bf16_weights():
    it = build(trl.GRPOTrainer, model("Qwen2").bfloat16())
    theirs, ours = both(it, grpo_batch(it))
    assert differences(theirs, ours, rtol=2e-2) == []


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config={**SMALL, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 1},
        image_token_id=IMAGE,
        video_token_id=38,
        vision_start_token_id=37,
        vision_end_token_id=36,
    )
    pixels = 3 * 2 * 2 * 2
    grid = torch.tensor([[1, 2, 2]] * B)
    forward = {"pixel_values": torch.randn(4 * B, pixels), "image_grid_thw": grid, "num_images": [1] * B}
    kinds = torch.zeros(B, P + T).long()
    kinds[:, P - 1] = 1
    return transformers.Qwen2VLForConditionalGeneration(config), forward | {"mm_token_type_ids": kinds}


def llava():
    vision = {**VISION, "image_size": 4, "projection_dim": 16, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(
        text_config={**SMALL, "model_type": "llama"}, vision_config=vision, image_token_id=IMAGE
    )
    return transformers.LlavaForConditionalGeneration(config), {
        "pixel_values": torch.randn(B, 3, 4, 4),
        "num_images": [1] * B,
    }


def gemma3():
    text = {**SMALL, "head_dim": 8, "model_type": "gemma3_text"}  # the class with images never applies a softcap
    vision = {**VISION, "image_size": 4, "model_type": "siglip_vision_model"}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_id=IMAGE,
        boi_token_index=37,
        eoi_token_index=36,
    )
    kinds = torch.zeros(B, P + T).long()
    kinds[:, P - 1] = 1
    forward = {"pixel_values": torch.randn(B, 3, 4, 4), "num_images": [1] * B, "token_type_ids": kinds}
    policy = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(policy.model.multi_modal_projector.mm_input_projection_weight)  # 0 from the config
    return policy, forward


@pytest.mark.parametrize("level", ["hidden", "logits"])
@pytest.mark.parametrize("family", [qwen2_vl, llava, gemma3])
def test_images(family, level):
    """One image in every prompt, passed to the model as TRL passes it; the vision tower gets its gradient."""
    torch.manual_seed(0)
    policy, forward = family()
    it = build(trl.GRPOTrainer, policy)
    inputs = grpo_batch(it, images=forward)
    theirs, ours = both(it, inputs, level=level)
    assert differences(theirs, ours, rtol=5e-5) == []
    assert any("vision" in name or "visual" in name for name, g in ours.gradients.items() if g.abs().sum() > 0)
    assert differences(*both(it, inputs, False, level=level), rtol=5e-5) == []
    seen = both(it, inputs | {"pixel_values": inputs["pixel_values"] + 1})[1]
    assert seen.loss != ours.loss


@pytest.mark.parametrize("family", [qwen2_vl, llava, gemma3])
def test_rloo_with_images(family):
    torch.manual_seed(0)
    policy, forward = family()
    it = trainer(trl.RLOOTrainer, policy)
    inputs = rloo_batch(it, images=forward)
    for level in ("hidden", "logits"):
        assert differences(*both(it, inputs, level=level), rtol=5e-5) == []
