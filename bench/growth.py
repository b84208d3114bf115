"""Suite `memory`: peak memory as N and V grow, one size at a time; on a GPU, where it takes little, time as well."""

from __future__ import annotations

import dataclasses

from bench import hidden, logits
from bench.case import Case, Shape

HIDDEN_PROVIDERS = ("eager", "torch.compile", "torch-native", "fastrl", "liger", "trl", "verl", "cut-cross-entropy")
LOGITS_PROVIDERS = ("eager", "torch.compile", "fastrl", "fastrl-inplace", "liger", "trl")


def _sizes(device: str, quick: bool) -> tuple[int, list[int], int, list[int], int]:
    """Sequences; their lengths, at the vocabulary that follows; vocabularies, at the first length; hidden size."""
    if quick:
        return 4, [8, 16], 256, [256, 512], 32
    if device == "cpu":
        return 8, [64, 128, 256, 512], 32000, [8000, 16000, 32000, 64000], 256
    return 8, [512, 1024, 2048, 4096], 128256, [32000, 64000, 128256, 256000], 4096


def cases(device: str, quick: bool) -> list[Case]:
    batch, lengths, vocab, vocabularies, width = _sizes(device, quick)
    dtype = "fp32" if device == "cpu" or quick else "bf16"
    sizes = dict.fromkeys([*((length, vocab) for length in lengths), *((lengths[0], v) for v in vocabularies)])
    made = []
    for length, v in sizes:
        flat = Shape(batch, length, v, dtype=dtype, device=device)
        deep = Shape(batch, length, v, width, dtype, device)
        made.append(_point(hidden.loss_case(deep, frozen=False, only=HIDDEN_PROVIDERS)))
        made.append(_point(logits.loss_case(flat, only=LOGITS_PROVIDERS)))
    return sorted(made, key=lambda case: case.name.split("-N")[0])


def _point(case: Case) -> Case:
    name, alone = f"memory-{case.name}", case.shape.device == "cpu"
    return dataclasses.replace(case, name=name, suite="memory", target=None, first_call=False, memory_only=alone)
