"""The levels with their gradients: one `torch.autograd.Function` each, above the functions of `ops.py`.

Under torch.compile the operator takes its place, whose gradient is registered (`op_gradients.py`).

A loss computes its gradient in forward, when one is wanted, and hands it out in the first backward, scaled in place by
the upstream scalar; a second backward (retain_graph) computes it again from the saved inputs. Every input that is not
differentiable travels in one frozen parameter object.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import backend as backends
from fastrl import calls, ops
from fastrl.calls import LossParams, ScoreParams
from fastrl.double_backward import once
from fastrl.op_gradients import cotangent


def score_logits(logits: Tensor, params: ScoreParams) -> tuple[Tensor, ...]:
    """Differentiable (N,) log-probs and entropies of logits."""
    if torch.compiler.is_compiling():
        return calls.score_logits(logits, params)[:2]
    return ScoreLogits.apply(logits, params)


def score_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None, params: ScoreParams) -> tuple[Tensor, ...]:
    """Differentiable (N,) log-probs and entropies of hidden states (N, H)."""
    if torch.compiler.is_compiling():
        return calls.score_hidden(hidden, weight, bias, params)[:2]
    return ScoreHidden.apply(hidden, weight, bias, params)


def token_loss(logps: Tensor, entropy: Tensor | None, params: LossParams) -> tuple[Tensor, ...]:
    """Differentiable loss, and statistics, of log-probs and entropies (N,)."""
    if torch.compiler.is_compiling():
        return calls.token_loss(logps, entropy, params)[:2]
    return TokenLoss.apply(logps, entropy, params)


def logits_loss(logits: Tensor, params: LossParams) -> tuple[Tensor, ...]:
    """Differentiable loss, statistics and scores of logits."""
    if torch.compiler.is_compiling():
        return calls.logits_loss(logits, params)[:3]
    return LogitsLoss.apply(logits, params)


def hidden_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, params: LossParams) -> tuple[Tensor, ...]:
    """Differentiable loss, statistics and scores of hidden states (N, H)."""
    if torch.compiler.is_compiling():
        needs = [params.grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        return calls.hidden_loss(hidden, weight, bias, params, needs)[:3]
    return HiddenLoss.apply(hidden, weight, bias, params)


class ScoreLogits(torch.autograd.Function):
    """logits -> log-probs and entropies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, params: ScoreParams) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logps, entropy, scores = calls.score_logits(logits, params)
        tensors, ctx.numbers = ops.pack_scoring(params.scoring)
        ctx.save_for_backward(logits, scores, *tensors)
        ctx.backend = params.backend
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, None]:
        if dlogp is None and dentropy is None:
            return None, None
        logits, scores, *tensors = ctx.saved_tensors
        c, e = cotangent(dlogp, scores), cotangent(dentropy, scores)
        gradient = ops.score_logits_grad(logits.detach(), tensors, ctx.numbers, scores, c, e, ctx.backend)
        return once(gradient), None


class ScoreHidden(torch.autograd.Function):
    """hidden states and head -> log-probs and entropies; the logits are computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, params: ScoreParams
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logps, entropy, scores = calls.score_hidden(hidden, weight, bias, params)
        tensors, ctx.numbers = ops.pack_scoring(params.scoring)
        ctx.save_for_backward(hidden, weight, bias, scores, *tensors)
        ctx.backend, ctx.options = params.backend, params.options.numbers()
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogp is None and dentropy is None:
            return None, None, None, None
        hidden, weight, bias, scores, *tensors = ctx.saved_tensors
        c, e = cotangent(dlogp, scores), cotangent(dentropy, scores)
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
        return *(once(g.to(x.dtype)) if need else None for g, x, need in parts), None


class TokenLoss(torch.autograd.Function):
    """log-probs and entropies (N,) -> loss, statistics."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, entropy: Tensor | None, params: LossParams) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        loss, statistics, dlogp, dentropy = calls.token_loss(logps, entropy, params)
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
        return once(out), once((dentropy * gradient).to(ctx.dtypes[1])) if has_entropy else None, None


def _take(ctx: Any) -> Any:
    """The precomputed gradients, once: the caller may scale them in place and autograd may keep them."""
    ready, ctx.ready = ctx.ready, None
    return ready


def _scaled(x: Tensor, factor: Tensor, backend: str) -> Tensor:
    """factor·x, in place on a buffer that nobody else holds."""
    return backends.load(backend).scale_(x, factor)


class LogitsLoss(torch.autograd.Function):
    """logits -> loss, statistics, scores."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, params: LossParams) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        now = calls.grad_now(logits, params)
        if params.inplace and now:
            loss, statistics, scores, dlogp, dentropy = ops.logits_loss_(
                logits, *calls.loss_inputs(params), params.backend
            )
            ready = logits.detach()
            torch.autograd.graph.increment_version(logits)  # whoever saved them for backward must hear of it
        else:
            loss, statistics, scores, dlogp, dentropy, ready = calls.logits_loss(logits, params)
        scoring, ctx.numbers = ops.pack_scoring(params.scoring)
        ctx.ready = ready if now else None
        ctx.backend, ctx.inplace = params.backend, params.inplace and now
        ctx.save_for_backward(None if ctx.inplace else logits, scores, dlogp, dentropy, *scoring)
        ctx.mark_non_differentiable(statistics, scores)
        return loss, statistics, scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if gradient is None:
            return None, None
        ready = _take(ctx)
        if ready is not None:
            return once(_scaled(ready, gradient, ctx.backend)), None
        if ctx.inplace:
            raise RuntimeError(
                "fastrl: a second backward through a loss made with inplace=True, whose logits now hold the first "
                "gradient; use inplace=False with retain_graph"
            )
        logits, scores, dlogp, dentropy, *scoring = ctx.saved_tensors
        e = dentropy * gradient if dentropy.numel() else None
        out = ops.score_logits_grad(logits.detach(), scoring, ctx.numbers, scores, dlogp * gradient, e, ctx.backend)
        return once(out), None


class HiddenLoss(torch.autograd.Function):
    """hidden states and head -> loss, statistics, scores."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, params: LossParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        needs = [need and params.grad for need in ctx.needs_input_grad[:3]]
        loss, statistics, scores, *ready = calls.hidden_loss(hidden, weight, bias, params, needs)
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
            ready = calls.hidden_loss(hidden, weight, bias, ctx.params, needs)[3:]
        *gradients, scale = ready
        factor = gradient / scale if scale.numel() else gradient
        parts = zip(gradients, inputs, needs, strict=True)
        backend = ctx.params.backend
        return *(once(_scaled(g, factor, backend).to(x.dtype)) if need else None for g, x, need in parts), None
