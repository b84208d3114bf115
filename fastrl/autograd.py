"""The `torch.autograd.Function`s: one per level, above the operators of `ops.py`.

A loss computes its gradient in forward, when one is wanted, and hands it out in the first backward, scaled in place by
the upstream scalar; a second backward (retain_graph) computes it again from the saved inputs. Every input that is not
differentiable travels in one frozen parameter object.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import backend as backends
from fastrl import ops
from fastrl.flat import Flat
from fastrl.projection import HiddenOptions
from fastrl.rows import Scoring
from fastrl.spec import LossSpec


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


class _OnceOnly(torch.autograd.Function):
    """Identity whose backward says that there is no second derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "fastrl: double backward is not supported; the gradient of a loss cannot be differentiated again. "
            "Use fastrl.reference, which is plain torch, where second derivatives are needed"
        )


def _once(gradient: Tensor | None) -> Tensor | None:
    """The gradient, guarded against being differentiated."""
    if gradient is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    return _OnceOnly.apply(gradient.detach().requires_grad_())


def _cotangent(gradient: Tensor | None, scores: Tensor) -> Tensor | None:
    """An upstream gradient of any shape, stride and dtype as (N,) in the dtype of the scores; None stays None."""
    return None if gradient is None else gradient.reshape(-1).to(scores.dtype).contiguous()


class ScoreLogits(torch.autograd.Function):
    """logits -> (4, N) scores, of which log-prob and entropy are differentiable."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, params: ScoreParams) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        tensors, numbers = ops.pack_scoring(params.scoring)
        scores = ops.score_logits(logits, tensors, numbers, params.backend)
        ctx.save_for_backward(logits, scores, *tensors)
        ctx.numbers, ctx.backend = numbers, params.backend
        return scores[0].clone(), scores[1].clone()

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, None]:
        if dlogp is None and dentropy is None:
            return None, None
        logits, scores, *tensors = ctx.saved_tensors
        c, e = _cotangent(dlogp, scores), _cotangent(dentropy, scores)
        gradient = ops.score_logits_grad(logits.detach(), tensors, ctx.numbers, scores, c, e, ctx.backend)
        return _once(gradient), None


class ScoreHidden(torch.autograd.Function):
    """hidden states and head -> log-probs and entropies; the logits are computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, params: ScoreParams
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        tensors, numbers = ops.pack_scoring(params.scoring)
        options = params.options.numbers()
        scores = ops.score_hidden(hidden, weight, bias, tensors, numbers, options, params.backend)
        ctx.save_for_backward(hidden, weight, bias, scores, *tensors)
        ctx.numbers, ctx.backend, ctx.options = numbers, params.backend, options
        return scores[0].clone(), scores[1].clone()

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogp is None and dentropy is None:
            return None, None, None, None
        hidden, weight, bias, scores, *tensors = ctx.saved_tensors
        c, e = _cotangent(dlogp, scores), _cotangent(dentropy, scores)
        needs = list(ctx.needs_input_grad[:3])
        gradients = ops.score_hidden_grad(
            hidden.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            tensors,
            ctx.numbers,
            scores,
            c,
            e,
            needs,
            ctx.options,
            ctx.backend,
        )
        parts = zip(gradients, (hidden, weight, bias), needs, strict=True)
        return *(_once(g.to(x.dtype)) if need else None for g, x, need in parts), None


class TokenLoss(torch.autograd.Function):
    """log-probs and entropies (N,) -> loss, statistics."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, entropy: Tensor | None, params: LossParams) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        tensors, sizes = params.flat.split_fields()
        loss, statistics, dlogp, dentropy = ops.token_loss(
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
        ctx.save_for_backward(dlogp, dentropy)
        ctx.dtypes = (logps.dtype, logps.dtype if entropy is None else entropy.dtype)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None
        dlogp, dentropy = ctx.saved_tensors
        needs = ctx.needs_input_grad
        out = (dlogp * gradient).to(ctx.dtypes[0]) if needs[0] else None
        has_entropy = needs[1] and dentropy.numel() > 0
        return _once(out), _once((dentropy * gradient).to(ctx.dtypes[1])) if has_entropy else None, None


def _take(ctx: Any) -> Any:
    """The precomputed gradients, once: the caller may scale them in place and autograd may keep them."""
    ready, ctx.ready = ctx.ready, None
    return ready


def _scaled(x: Tensor, factor: Tensor, backend: str) -> Tensor:
    """factor·x, in place on a buffer that nobody else holds (a new tensor under torch.compile)."""
    if torch.compiler.is_compiling():
        return (x * factor).to(x.dtype)
    return backends.load(backend).scale_(x, factor)


class LogitsLoss(torch.autograd.Function):
    """logits -> loss, statistics, scores.

    float16 logits leave their gradient to backward, where the upstream scalar (a GradScaler's) is known: 1/N times a
    probability has no float16 value.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, params: LossParams) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        scoring, numbers = ops.pack_scoring(params.scoring)
        tensors, sizes = params.flat.split_fields()
        common = (scoring, numbers, tensors, sizes, params.normalizer, params.spec.key)
        now = params.grad and logits.dtype != torch.float16
        if params.inplace and now:
            loss, statistics, scores, dlogp, dentropy = ops.logits_loss_(logits, *common, params.backend)
            ready = logits.detach()
            torch.autograd.graph.increment_version(logits)  # whoever saved them for backward must hear of it
        else:
            loss, statistics, scores, dlogp, dentropy, ready = ops.logits_loss(
                logits, *common, params.grad, _entropy_grad(params), now, params.backend
            )
        ctx.ready = ready if now else None
        ctx.numbers, ctx.backend, ctx.inplace = numbers, params.backend, params.inplace and now
        ctx.save_for_backward(None if ctx.inplace else logits, scores, dlogp, dentropy, *scoring)
        ctx.mark_non_differentiable(statistics, scores)
        return loss, statistics, scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if gradient is None:
            return None, None
        ready = _take(ctx)
        if ready is not None:
            return _once(_scaled(ready, gradient, ctx.backend)), None
        if ctx.inplace:
            raise RuntimeError(
                "fastrl: a second backward through a loss made with inplace=True, whose logits now hold the first "
                "gradient; use inplace=False with retain_graph"
            )
        logits, scores, dlogp, dentropy, *scoring = ctx.saved_tensors
        e = dentropy * gradient if dentropy.numel() else None
        out = ops.score_logits_grad(logits.detach(), scoring, ctx.numbers, scores, dlogp * gradient, e, ctx.backend)
        return _once(out), None


class HiddenLoss(torch.autograd.Function):
    """hidden states and head -> loss, statistics, scores."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, params: LossParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        needs = [need and params.grad for need in ctx.needs_input_grad[:3]]
        loss, statistics, scores, *ready = _hidden_loss(hidden, weight, bias, params, needs)
        ctx.ready = ready
        ctx.params = params
        ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(statistics, scores)
        return loss, statistics, scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        inputs = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        ready = _take(ctx)
        if ready is None:
            hidden, weight, bias = (None if x is None else x.detach() for x in inputs)
            ready = _hidden_loss(hidden, weight, bias, ctx.params, needs)[3:]
        *gradients, scale = ready
        factor = gradient / scale if scale.numel() else gradient
        parts = zip(gradients, inputs, needs, strict=True)
        backend = ctx.params.backend
        return *(_once(_scaled(g, factor, backend).to(x.dtype)) if need else None for g, x, need in parts), None


def _hidden_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, params: LossParams, needs: list[bool]
) -> tuple[Tensor, ...]:
    scoring, numbers = ops.pack_scoring(params.scoring)
    tensors, sizes = params.flat.split_fields()
    return ops.hidden_loss(
        hidden,
        weight,
        bias,
        scoring,
        numbers,
        tensors,
        sizes,
        params.normalizer,
        params.spec.key,
        needs,
        list(params.row_counts or ()),
        params.options.numbers(),
        params.backend,
    )
