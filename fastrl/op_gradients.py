"""The gradients of the operators, registered with `torch.library`: what `torch.compile` differentiates.

Each is the graph's form of the `autograd.Function` of the same level in `autograd.py`: operators instead of functions,
nothing in place, no state. The loss, log-probs and entropies are differentiable, the other outputs are marked as not.
The operators that return gradients refuse to be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastrl import ops  # noqa: F401  # defines the operators
from fastrl.double_backward import once, refuse_second_derivative
from fastrl.operators import library


def cotangent(gradient: Tensor | None, scores: Tensor) -> Tensor | None:
    """An upstream gradient of any shape, stride and dtype as (N,) in the dtype of the scores; None stays None."""
    return None if gradient is None else gradient.reshape(-1).to(scores.dtype).contiguous()


def _register(name: str, setup: Callable[..., None], backward: Callable[..., Any], first: int) -> None:
    """Register the gradient of `fastrl::name`, whose first `first` inputs are the differentiable ones.

    `setup(ctx, inputs, outputs)` saves; `backward(ctx, *gradients)` returns the gradients of those inputs.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.others = [_nothing(value) for value in inputs[first:]]
        setup(ctx, inputs, output)

    def gradients(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(value is None for value in cotangents):
            return *([None] * first), *ctx.others
        return *(once(gradient) for gradient in backward(ctx, *cotangents)), *ctx.others

    torch.library.register_autograd(f"fastrl::{name}", gradients, setup_context=setup_context, lib=library)


def _nothing(value: Any) -> Any:
    """No gradient for this input: None, or one for each of a list of tensors, as `register_autograd` wants it."""
    is_tensors = isinstance(value, list | tuple) and all(isinstance(item, Tensor) for item in value)
    return [None] * len(value) if is_tensors else None


def _refuse(name: str) -> None:
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        refuse_second_derivative()

    torch.library.register_autograd(f"fastrl::{name}", backward, lib=library)


def _score_logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, scoring, ctx.numbers, ctx.backend = inputs
    ctx.save_for_backward(logits, output[2], *scoring)
    ctx.mark_non_differentiable(output[2])


def _score_logits_backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, _: None) -> list[Tensor | None]:
    logits, scores, *scoring = ctx.saved_tensors
    c, e = cotangent(dlogp, scores), cotangent(dentropy, scores)
    return [torch.ops.fastrl.score_logits_grad(logits.detach(), scoring, ctx.numbers, scores, c, e, ctx.backend)]


def _score_hidden_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, scoring, ctx.numbers, ctx.options, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, bias, output[2], *scoring)
    ctx.mark_non_differentiable(output[2])


def _score_hidden_backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, _: None) -> list[Tensor | None]:
    hidden, weight, bias, scores, *scoring = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.fastrl.score_hidden_grad(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        scoring,
        ctx.numbers,
        scores,
        cotangent(dlogp, scores),
        cotangent(dentropy, scores),
        needs,
        ctx.options,
        ctx.backend,
    )
    parts = zip(gradients, (hidden, weight, bias), needs, strict=True)
    return [g.to(x.dtype) if need else None for g, x, need in parts]


def _token_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logps, entropy = inputs[:2]
    ctx.asked = (inputs[6], inputs[6])
    ctx.dtypes = (logps.dtype, logps.dtype if entropy is None else entropy.dtype)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _token_loss_backward(ctx: Any, gradient: Tensor, *_: None) -> list[Tensor | None]:
    _check_asked("token_loss", ctx.asked, ctx.needs_input_grad)
    needs = ctx.needs_input_grad
    dlogp, dentropy = ctx.saved_tensors
    return [
        (dlogp * gradient).to(ctx.dtypes[0]) if needs[0] else None,
        (dentropy * gradient).to(ctx.dtypes[1]) if needs[1] and dentropy.numel() else None,
    ]


def _logits_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, scoring, ctx.numbers = inputs[:3]
    ctx.asked, ctx.now, ctx.backend = inputs[7:8], inputs[9], inputs[10]
    _, _, scores, dlogp, dentropy, dlogits = output
    ctx.save_for_backward(*((dlogits,) if ctx.now else (logits, scores, dlogp, dentropy, *scoring)))
    ctx.mark_non_differentiable(*output[1:])


def _logits_loss_backward(ctx: Any, gradient: Tensor, *_: None) -> list[Tensor | None]:
    _check_asked("logits_loss", ctx.asked, ctx.needs_input_grad)
    if ctx.now:
        (dlogits,) = ctx.saved_tensors
        return [(dlogits * gradient).to(dlogits.dtype)]
    logits, scores, dlogp, dentropy, *scoring = ctx.saved_tensors
    e = dentropy * gradient if dentropy.numel() else None
    run = torch.ops.fastrl.score_logits_grad
    return [run(logits.detach(), scoring, ctx.numbers, scores, dlogp * gradient, e, ctx.backend)]


def _hidden_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.asked = inputs[9]
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _hidden_loss_backward(ctx: Any, gradient: Tensor, *_: None) -> list[Tensor | None]:
    _check_asked("hidden_loss", ctx.asked, ctx.needs_input_grad)
    *gradients, scale = ctx.saved_tensors
    factor = gradient / scale if scale.numel() else gradient
    parts = zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
    return [(g * factor).to(dtype) if need else None for g, dtype, need in parts]


def _check_asked(name: str, asked: Sequence[bool], needs: Sequence[bool]) -> None:
    """The gradient is computed in forward, if it was asked for there."""
    if any(need and not there for need, there in zip(needs, asked, strict=False)):
        raise RuntimeError(f"fastrl::{name}: a gradient is needed that the call did not ask for in forward")


_register("score_logits", _score_logits_setup, _score_logits_backward, first=1)
_register("score_hidden", _score_hidden_setup, _score_hidden_backward, first=3)
_register("token_loss", _token_loss_setup, _token_loss_backward, first=2)
_register("logits_loss", _logits_loss_setup, _logits_loss_backward, first=1)
_register("hidden_loss", _hidden_loss_setup, _hidden_loss_backward, first=3)
_refuse("score_logits_grad")
_refuse("score_hidden_grad")
