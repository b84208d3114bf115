"""LMHead.from_model on tiny Hugging Face models: our log-probs from hidden states equal those of the model's own logits."""

from __future__ import annotations

import pytest
import torch
from common import close

import fastrl

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}

MODELS = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},  # softcap
    "Cohere": {"logit_scale": 0.25},  # multiplies
    "Granite": {"logits_scaling": 4.0},  # divides
    "Phi": {},  # a head with a bias
    "GPTNeoX": {},  # embed_out
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def build(name, extra):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **extra})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_from_model(name):
    torch.manual_seed(0)
    model = build(name, MODELS[name])
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=0.8)  # large enough for softcap and bias to matter
    ids = torch.randint(2, 61, (2, 7))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        head = fastrl.LMHead.from_model(model)
        scores = fastrl.shift_for_next_token(hidden, ids)
        got = fastrl.logprobs_from_hidden(scores[0], head, scores[1])
    want = torch.log_softmax(logits[:, :-1].double(), -1)
    close(got.logps, want.gather(-1, ids[:, 1:, None]).squeeze(-1), ulps=128)
    close(got.entropy, -(want.exp() * want).sum(-1), ulps=128)
    assert head.weight is model.get_output_embeddings().weight


def test_an_unknown_transform_is_refused():
    """unsloth-zoo#593: a transform that nobody reads trains silently wrong."""

    class Squashed(transformers.Qwen2ForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            hidden_states = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            logits = self.lm_head(hidden_states)
            logits = torch.tanh(logits) * 5
            return logits

    with pytest.raises(ValueError, match="hidden_states = self.model"):
        fastrl.LMHead.from_model(Squashed(transformers.Qwen2Config(**SMALL)))
    recurrent = transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaForCausalLM
    with pytest.raises(ValueError, match=r"model: .*tanh"):
        fastrl.head_model._refuse_unknown_transforms(recurrent)


def test_an_adapter_on_the_head_is_refused():
    """trl#4612: LoRA on lm_head was silently ignored."""
    model = build("Qwen2", {})
    layer = model.lm_head
    layer.base_layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="adapter"):
        fastrl.LMHead.from_model(model)


def test_tied_embeddings_add_up():
    """The head's gradient joins the embedding's in the shared weight."""
    torch.manual_seed(0)
    model = build("Qwen2", {"tie_word_embeddings": True})
    ids = torch.randint(2, 61, (2, 6))
    rollouts = fastrl.Rollouts(ids[:, 1:], advantages=torch.tensor([1.0, -0.5]))
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
    fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead.from_model(model), rollouts).loss.backward()
    fused = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=ids).logits[:, :-1]
    fastrl.policy_loss_from_logits(logits, rollouts).loss.backward()
    close(fused, model.get_input_embeddings().weight.grad, ulps=2000)
