"""The task, tokenizer and model that the examples share: add two small numbers, and be paid for the right answer.

Everything is built here; nothing is downloaded.
"""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

LARGEST = 4
VOCABULARY = ["<pad>", "<eos>", *map(str, range(10)), "+", "="]


def quiet_libraries() -> None:
    """Leave the terminal to the progress bar: no notices of transformers and TRL on their own deprecations."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=32
    )


def build_model(folder: Path, seed: int = 0) -> Qwen2ForCausalLM:
    """A two-layer Qwen2, random weights; saved and loaded, so that a trainer can load its reference from `folder`."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts() -> list[str]:
    """Every sum of two numbers from 0 to LARGEST."""
    return [f"{a}+{b}=" for a in range(LARGEST + 1) for b in range(LARGEST + 1)]


def answer(prompt: str) -> str:
    left, right = prompt.removesuffix("=").split("+")
    return str(int(left) + int(right))


def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """1 for the right number and nothing else, else 0."""
    return [float(completion == answer(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]


def shuffled_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` prompts, each sum about equally often."""
    every, rng = prompts(), random.Random(seed)
    rounds = [rng.sample(every, len(every)) for _ in range(-(-count // len(every)))]
    return [prompt for part in rounds for prompt in part][:count]
