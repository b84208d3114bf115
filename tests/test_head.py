"""LMHead.from_model on tiny Hugging Face models: from hidden states we get what the model's own logits give."""

from __future__ import annotations

import pytest
import torch
from common import close

import fastrl

SPEC = fastrl.GRPO.replace(entropy_coef=0.02)
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

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MODELS = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},  # softcap
    "Gemma3": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.25},  # multiplies
    "Granite": {"logits_scaling": 4.0},  # divides
    "Phi": {},  # a head with a bias
    "GPTNeoX": {},  # embed_out
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}
CASES = [(name, tying) for name in MODELS for tying in (TIED, UNTIED) if (name, tying) != ("Phi", TIED)]


def build(name, extra):
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SMALL, **extra})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def loud(model):
    """A head large enough for softcap and bias to matter."""
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return model


def sampled():
    ids = torch.randint(2, 61, (2, 7))
    mask = torch.rand(2, 6) > 0.2
    advantages = torch.tensor([1.0, -0.5])
    return ids, fastrl.Rollouts(ids[:, 1:], mask, advantages, old_logps=-4 - torch.rand(2, 6))


@pytest.mark.parametrize("name, tying", CASES, ids=[f"{n}-{'tied' if t is TIED else 'untied'}" for n, t in CASES])
def test_from_model(name, tying):
    """Log-probs, loss and every gradient from hidden states are those of the model's own logits."""
    torch.manual_seed(0)
    model = loud(build(name, MODELS[name] | tying))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (tying is TIED)
    ids, rollouts = sampled()
    logits = model(input_ids=ids).logits[:, :-1]
    from_logits = fastrl.policy_loss_from_logits(logits, rollouts, SPEC)
    from_logits.loss.backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    head = fastrl.LMHead.from_model(model)
    assert head.weight is model.get_output_embeddings().weight
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1]
    out = fastrl.policy_loss_from_hidden(hidden, head, rollouts, SPEC)
    out.loss.backward()
    close(out.logps, from_logits.logps, ulps=128)
    close(out.entropy, from_logits.entropy, ulps=128)
    close(out.loss, from_logits.loss, ulps=512)
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got.keys() == want.keys()
    for parameter, gradient in want.items():
        close(got[parameter], gradient, ulps=4000, what=parameter)
    plain = torch.log_softmax(logits.detach().double(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    close(out.logps, torch.where(rollouts.mask, plain, 0.0), ulps=128)


def test_from_a_wrapped_model():
    """torch.compile and DistributedDataParallel hold the model below them."""
    model = build("Qwen2", {})
    want = model.get_output_embeddings().weight
    assert fastrl.LMHead.from_model(torch.compile(model)).weight is want
    wrapper = type("DistributedDataParallel", (torch.nn.Module,), {})()
    wrapper.module = model
    assert fastrl.LMHead.from_model(wrapper).weight is want


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


def test_an_unknown_wrapper_of_the_head_is_refused():
    """trl#4612: LoRA on lm_head was silently ignored."""
    model = build("Qwen2", {})
    layer = model.lm_head
    layer.base_layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="adapter"):
        fastrl.LMHead.from_model(model)
