"""Trainers over chats, built from parts without a download: a prompt with images, and a model that calls tools."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import trl_common
from datasets import Dataset
from PIL import Image
from trl_training_cases import SETTINGS

TEXT = trl_common.SMALL | {"model_type": "qwen2"}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'user' %}{{ 't30 ' }}{% elif message.role == 'tool' %}{{ 't31 ' }}{% endif %}
{%- if message.content is string %}{{ message.content + ' ' }}{% else %}
{%- for part in message.content %}{{ IMAGE if part.type == 'image' else part.text + ' ' }}{% endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- call.function.name + ' ' + call.function.arguments | tojson + ' <call> ' }}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 't32' }}{% endif %}"""
"""Whose turn it is, by a word; the tool calls of a turn after its text."""


def llava() -> tuple[Any, Any]:
    """(model, processor): every image is 8x8 pixels, four tokens."""
    vision = CLIP | {"image_size": 8, "projection_dim": 16, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(
        text_config=TEXT, vision_config=vision, image_token_id=trl_common.IMAGE, vision_feature_layer=-1
    )
    edge = {"height": 8, "width": 8}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=edge),
        trl_common.tokenizer(("<image>",)),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "'<image>'"),
    )
    return transformers.LlavaForConditionalGeneration(config), processor


class Qwen2VLProcessor(transformers.Qwen2VLProcessor):
    """Without videos, whose processor needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_token, self.image_token_id = "<|image_pad|>", trl_common.IMAGE
        self.video_token, self.video_token_id = "<|video_pad|>", trl_common.IMAGE - 1
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def qwen2_vl() -> tuple[Any, Any]:
    """(model, processor): the patches and tokens of an image depend on its size."""
    words = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<call>")
    ids = {"image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 1}
    text = trl_common.SMALL | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    size = {"shortest_edge": 16, "longest_edge": 64}
    template = TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    processor = Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessorPil(patch_size=2, size=size), trl_common.tokenizer(words), template
    )
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def pictures(count: int, black: bool = False) -> list[Image.Image]:
    """Of noise, of two sizes in turn."""
    g = torch.Generator().manual_seed(5)
    out = []
    for i in range(count):
        pixels = torch.randint(0, 256, (8, 8 if i % 2 else 4, 3), generator=g, dtype=torch.uint8)
        out.append(Image.fromarray((pixels * (not black)).numpy()))
    return out


def seeded(family: Any) -> tuple[Any, Any]:
    """Its (model, processor), with a head peaked enough for ratios and entropies to vary."""
    torch.manual_seed(0)
    policy, processor = family()
    with torch.no_grad():
        torch.nn.init.normal_(policy.get_output_embeddings().weight, std=0.5)
    return policy, processor


PROMPTS = [[{"role": "user", "content": f"t{2 + i} t3"}] for i in range(12)]


def image_trainer(cls: Any, family: Any, column: str = "images", black: bool = False, **options: Any) -> Any:
    """Prompts with one image each or, in the column `images`, one or two (TRL itself cannot mix in prompts with none)."""
    policy, processor = seeded(family)
    seen = pictures(12, black)
    rows = seen if column == "image" else [seen[i : i + n] for i, n in zip(range(12), (1, 2, 1) * 4, strict=True)]
    data = Dataset.from_dict({"prompt": PROMPTS, column: rows})
    given = {"processing_class": processor, "train_dataset": data, "eval_dataset": data.select([1])}
    return trl_common.trainer(cls, policy, **SETTINGS | given | options)


def response_template(tool: str) -> dict[str, Any]:
    """How transformers parses an answer: the word before <call> is what the tool is asked for."""
    call = {"name": tool, "arguments": {"word": "{word}"}}
    calls = {
        "open_pattern": r"(?P<word>t\d+) <call>",
        "repeats": True,
        "transform": {"type": "function", "function": call},
    }
    fields = {"content": {"content": "text"}, "tool_calls": calls}
    return {"start_anchor": "t32", "defaults": {"role": "assistant"}, "fields": fields}


def lookup(word: str) -> str:
    """Says what stands beside a word, and fails with every fifth one.

    Args:
        word: a word of the vocabulary.
    """
    number = int(word[1:])
    if number % 5 == 2:
        raise KeyError(word)
    return " ".join(f"t{(number + i) % 30 + 2}" for i in range(1 + number % 3))


def picture(word: str) -> list:
    """Shows a picture of a word.

    Args:
        word: a word of the vocabulary.
    """
    return [{"type": "text", "text": word}, {"type": "image", "image": pictures(12)[int(word[1:]) % 12]}]


def tool_trainer(cls: Any, tool: Any = lookup, image: bool = False, **options: Any) -> Any:
    """A model whose turn ends at <eos> or at <call>, which it samples as any other word: the call is the model's own,
    TRL parses it, calls the tool and lets the model go on after the answer. With `picture` as the tool the model is a
    Qwen2-VL, and with `image` its prompts have one too."""
    policy, processor = trl_common.model("Qwen2"), trl_common.tokenizer(("<call>",))
    processor.chat_template = TEMPLATE.replace("IMAGE", "''")
    if tool is picture:
        policy, processor = seeded(qwen2_vl)
        # TRL itself suppresses the first of them alone, and the model fails with a sampled second one
        options["generation_kwargs"] = {"suppress_tokens": [39, 38, 37, 36]}
    chat = getattr(processor, "tokenizer", processor)
    policy.generation_config.eos_token_id = [chat.eos_token_id, chat.convert_tokens_to_ids("<call>")]
    chat.response_template = response_template(tool.__name__)
    data = Dataset.from_dict({"prompt": PROMPTS, **({"image": pictures(12)} if image else {})})
    given = {"tools": [tool], "processing_class": processor, "train_dataset": data, "eval_dataset": data.select([1])}
    return trl_common.trainer(cls, policy, **SETTINGS | given | options)
