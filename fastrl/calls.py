"""What a level takes besides its differentiable tensors, as one frozen object; the call of `ops.py` that it makes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import ops
from fastrl.flat import Flat
from fastrl.projection import HiddenOptions
from fastrl.rows import Scoring
from fastrl.spec import LossSpec

LossInputs = tuple[list[Tensor | None], list[float], list[Tensor | None], list[int], Tensor | None, int]


class ScoreParams(NamedTuple):
    scoring: Scoring
    backend: str
    options: HiddenOptions | None = None


class LossParams(NamedTuple):
    flat: Flat
    normalizer: Tensor | None
    spec: LossSpec
    backend: str
    grad: bool
    scoring: Scoring | None = None
    inplace: bool = False
    options: HiddenOptions | None = None
    row_counts: tuple[int, int] | None = None


def _entropy_grad(params: LossParams) -> bool:
    """Whether the loss has a derivative by the entropies."""
    return params.grad and params.spec.entropy_coef != 0


def score_logits(logits: Tensor, params: ScoreParams) -> tuple[Tensor, Tensor, Tensor]:
    return ops.score_logits(logits, *ops.pack_scoring(params.scoring), params.backend)


def score_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, params: ScoreParams) -> tuple[Tensor, ...]:
    scoring = ops.pack_scoring(params.scoring)
    return ops.score_hidden(hidden, weight, bias, *scoring, params.options.numbers(), params.backend)


def token_loss(logps: Tensor, entropy: Tensor | None, params: LossParams) -> tuple[Tensor, ...]:
    tensors, sizes = params.flat.split_fields()
    return ops.token_loss(
        logps,
        entropy,
        tensors,
        sizes,
        params.normalizer,
        params.spec.key,
        params.grad,
        _entropy_grad(params),
        params.backend,
    )


def loss_inputs(params: LossParams) -> LossInputs:
    """What the losses from logits take besides them, before the flags."""
    scoring, numbers = ops.pack_scoring(params.scoring)
    tensors, sizes = params.flat.split_fields()
    return scoring, numbers, tensors, sizes, params.normalizer, params.spec.key


def grad_now(logits: Tensor, params: LossParams) -> bool:
    """Whether the gradient of the logits is computed in forward.

    float16 logits leave it to backward, where the upstream scalar (a GradScaler's) is known: 1/N times a probability
    has no float16 value.
    """
    return params.grad and logits.dtype != torch.float16


def logits_loss(logits: Tensor, params: LossParams) -> tuple[Tensor, ...]:
    return ops.logits_loss(
        logits, *loss_inputs(params), params.grad, _entropy_grad(params), grad_now(logits, params), params.backend
    )


def hidden_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, params: LossParams, needs: list[bool]
) -> tuple[Tensor, ...]:
    return ops.hidden_loss(
        hidden,
        weight,
        bias,
        *loss_inputs(params),
        needs,
        list(params.row_counts or ()),
        params.options.numbers(),
        params.backend,
    )
