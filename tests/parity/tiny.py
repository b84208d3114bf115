"""A tiny language model for training runs, and one thread for them: more only wait for each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

V, PROMPT, LENGTH = 24, 3, 6


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # peaked enough for ratios to vary
    return model


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
