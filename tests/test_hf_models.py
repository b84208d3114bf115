"""Transformers: models that `PolicyTrainer` and `compute_loss_func` refuse by name, before a step is made of part of their
loss; among them every mixture of experts whose router loss is on, wherever its config holds the switch."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs transformers 5.23")
pytest.importorskip("accelerate", reason="needs accelerate")

import transformers
from hf_cases import VOCABULARY, arguments, build_model, build_trainer, logged_rows, lora

import fastrl
from fastrl.adapters import hf

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def mixtral(**options):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=2, **options))


def qwen3_vl_moe(**options):
    """The switch is in the config of its text model."""
    text = {
        **TEXT, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "decoder_sparse_step": 1, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}, **options,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "spatial_merge_size": 2,
    }  # fmt: skip
    ids = {"image_token_id": 19, "video_token_id": 20, "vision_start_token_id": 21, "vision_end_token_id": 22}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


@pytest.mark.parametrize("path", ["logits", "hidden"])
@pytest.mark.parametrize("build", [mixtral, qwen3_vl_moe])
def test_a_router_loss_is_refused(build, path, tmp_path):
    rows = logged_rows()
    for row in rows:  # no placeholder of an image
        for name in ("prompt_ids", "completion_ids"):
            row[name] = [token % 19 for token in row[name]]
    with pytest.raises(ValueError, match="router loss"):
        build_trainer(path, build(output_router_logits=True), rows, fastrl.DAPO, tmp_path).train()
    trainer = build_trainer(path, build(), rows, fastrl.DAPO, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 1


def test_models_refused_by_name(tmp_path):
    rows = logged_rows()
    with pytest.raises(ValueError, match="of the kind DoraLinearVariant"):
        dora = lora(build_model(), target_modules=["lm_head"], use_dora=True)
        build_trainer("hidden", dora, rows, fastrl.DAPO, tmp_path)
    peft = pytest.importorskip("peft", reason="needs peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig 'default', which adds virtual tokens"):
        build_trainer("hidden", peft.get_peft_model(build_model(), prompt), rows, fastrl.DAPO, tmp_path)
    t5 = transformers.T5Config(vocab_size=23, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="^model: "):
        build_trainer("hidden", transformers.T5ForConditionalGeneration(t5), rows, fastrl.DAPO, tmp_path)
    with pytest.raises(ValueError, match="^compute_loss_func: "):
        hf.PolicyTrainer(build_model(), arguments(tmp_path), spec=fastrl.DAPO, compute_loss_func=print)
    with pytest.raises(TypeError, match="^spec: "):
        hf.PolicyTrainer(build_model(), arguments(tmp_path), spec="dapo")
    with pytest.raises(TypeError, match="^spec: "):
        hf.compute_loss_func("dapo")
