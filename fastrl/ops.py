"""The drivers as opaque operators (`torch.library`), so that `torch.compile(fullgraph=True)` steps over them.

They take and return plain tensors and numbers; `op_gradients.py` registers their gradients. An output that was not
asked for has no elements. A spec travels as its key, which the fake operators never look up: under torch.compile it may
be a symbol, so that another spec of the same structure needs no new graph.

Without torch.compile the plain function is called, below the `autograd.Function`s of `autograd.py`: the dispatcher
would only cost time, and below it autograd, which differentiates the specification, is switched off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl import backend as backends
from fastrl import levels
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.metrics import SPARSE_STATISTICS, STATISTICS
from fastrl.operators import fake, operator
from fastrl.projection import HiddenOptions
from fastrl.rows import RowScores, Scoring
from fastrl.spec import spec_of

Tensors = Sequence[Tensor | None]


def pack_scoring(scoring: Scoring) -> tuple[list[Tensor | None], list[float]]:
    """Tensors and numbers of a `Scoring` without rows."""
    tensors = [scoring.ids, scoring.mask, scoring.temperature]
    return tensors, [scoring.factor, scoring.softcap or 0.0, scoring.inner]


def _scoring(tensors: Tensors, numbers: Sequence[float]) -> Scoring:
    ids, mask, temperature = tensors
    factor, softcap, inner = numbers
    return Scoring(ids, mask, None, temperature, factor, softcap or None, inner)


def _flat(tensors: Tensors, sizes: Sequence[int]) -> Flat:
    return Flat._make([*tensors, *sizes])


def _with_rows(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and entropies as tensors of their own: an operator's outputs share no memory."""
    return scores[0].clone(), scores[1].clone(), scores


def _some(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


@operator("score_logits")
def score_logits(
    logits: Tensor, scoring: Sequence[Tensor | None], numbers: Sequence[float], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log-probs, (N,) entropies, and for the gradient the (4, N) row scores."""
    return _with_rows(levels.logits_score(logits, _scoring(scoring, numbers), backends.load(backend)))


@fake("score_logits")
def _(logits, scoring, numbers, backend):
    return _with_rows(logits.new_empty((4, scoring[0].shape[0]), dtype=wide(logits.dtype)))


@operator("score_logits_grad")
def score_logits_grad(
    logits: Tensor,
    scoring: Sequence[Tensor | None],
    numbers: Sequence[float],
    scores: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    backend: str,
) -> Tensor:
    """The gradient of the logits from cotangents of log-probs and entropies."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = RowScores(*scores.unbind(0))
    backends.load(backend).differentiate(logits, _scoring(scoring, numbers), rows, dlogp, dentropy, out)
    return out


@fake("score_logits_grad")
def _(logits, scoring, numbers, scores, dlogp, dentropy, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operator("token_loss")
def token_loss(
    logps: Tensor,
    entropy: Tensor | None,
    flat: Sequence[Tensor | None],
    sizes: Sequence[int],
    normalizer: Tensor | None,
    spec: int,
    grad: bool,
    entropy_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step B: loss, statistics, dloss/dlogp, dloss/dentropy."""
    run = backends.load(backend).token_loss
    loss, statistics, dlogp, dentropy = run(logps, entropy, _flat(flat, sizes), normalizer, spec_of(spec), grad=grad)
    return loss, statistics, _some(dlogp, loss), _some(dentropy, loss)


@fake("token_loss")
def _(logps, entropy, flat, sizes, normalizer, spec, grad, entropy_grad, backend):
    sums = logps.new_empty((), dtype=wide(logps.dtype))
    per_token = sums.new_empty(logps.shape if grad else 0)
    dentropy = sums.new_empty(logps.shape if entropy_grad else 0)
    return sums, sums.new_empty(len(STATISTICS), dtype=torch.float32), per_token, dentropy


def _logits_loss(logits, scoring, numbers, flat, sizes, normalizer, spec, dlogits, grad, backend):
    result = levels.logits_loss(
        logits,
        _scoring(scoring, numbers),
        _flat(flat, sizes),
        normalizer,
        spec_of(spec),
        dlogits,
        grad,
        backends.load(backend),
    )
    per_token = [_some(values, result.loss) for values in (result.dlogp, result.dentropy)]
    return result.loss, result.statistics, result.scores, *per_token


@operator("logits_loss")
def logits_loss(
    logits: Tensor,
    scoring: Sequence[Tensor | None],
    numbers: Sequence[float],
    flat: Sequence[Tensor | None],
    sizes: Sequence[int],
    normalizer: Tensor | None,
    spec: int,
    grad: bool,
    entropy_grad: bool,
    now: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, scores, dloss/dlogp, dloss/dentropy, and with `now` the gradient of the logits."""
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if now else None
    result = _logits_loss(logits, scoring, numbers, flat, sizes, normalizer, spec, dlogits, grad, backend)
    return *result, _some(dlogits, logits)


@fake("logits_loss")
def _(logits, scoring, numbers, flat, sizes, normalizer, spec, grad, entropy_grad, now, backend):
    n = scoring[0].shape[0]
    loss = logits.new_empty((), dtype=wide(logits.dtype))
    dentropy = loss.new_empty(n if entropy_grad else 0)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if now else logits.new_empty(0)
    statistics = loss.new_empty(len(STATISTICS), dtype=torch.float32)
    return loss, statistics, loss.new_empty((4, n)), loss.new_empty(n if grad else 0), dentropy, dlogits


def logits_loss_(
    logits: Tensor,
    scoring: Sequence[Tensor | None],
    numbers: Sequence[float],
    flat: Sequence[Tensor | None],
    sizes: Sequence[int],
    normalizer: Tensor | None,
    spec: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `logits_loss`, the gradient written over the logits; no operator, as torch.compile plans memory itself."""
    return _logits_loss(logits, scoring, numbers, flat, sizes, normalizer, spec, logits, True, backend)


@operator("score_hidden")
def score_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scoring: Sequence[Tensor | None],
    numbers: Sequence[float],
    options: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `score_logits`, from hidden states."""
    with torch.autocast(hidden.device.type, enabled=False):
        scores = levels.hidden_score(
            hidden, weight, bias, _scoring(scoring, numbers), HiddenOptions.of(options), backends.load(backend)
        )
    return _with_rows(scores)


@fake("score_hidden")
def _(hidden, weight, bias, scoring, numbers, options, backend):
    return _with_rows(hidden.new_empty((4, hidden.shape[0]), dtype=wide(hidden.dtype)))


@operator("score_hidden_grad")
def score_hidden_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scoring: Sequence[Tensor | None],
    numbers: Sequence[float],
    scores: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from cotangents of log-probs and entropies."""
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = levels.hidden_score_grad(
            hidden,
            weight,
            bias,
            _scoring(scoring, numbers),
            scores,
            dlogp,
            dentropy,
            (needs[0], needs[1], needs[2]),
            HiddenOptions.of(options),
            backends.load(backend),
        )
    dhidden, dweight, dbias = (_some(gradient, scores) for gradient in gradients)
    return dhidden, dweight, dbias


def _fake_gradients(hidden, weight, bias, needs):
    sums = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape if needs[1] else 0, dtype=sums),
        weight.new_empty(weight.shape[:1] if needs[2] else 0, dtype=sums),
    )


@fake("score_hidden_grad")
def _(hidden, weight, bias, scoring, numbers, scores, dlogp, dentropy, needs, options, backend):
    return _fake_gradients(hidden, weight, bias, needs)


@operator("hidden_loss")
def hidden_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scoring: Sequence[Tensor | None],
    numbers: Sequence[float],
    flat: Sequence[Tensor | None],
    sizes: Sequence[int],
    normalizer: Tensor | None,
    spec: int,
    needs: Sequence[bool],
    row_counts: Sequence[int],
    options: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, scores, the gradients of hidden, weight and bias, and the scale they carry."""
    with torch.autocast(hidden.device.type, enabled=False):
        result = levels.hidden_loss(
            hidden,
            weight,
            bias,
            _scoring(scoring, numbers),
            _flat(flat, sizes),
            normalizer,
            spec_of(spec),
            (needs[0], needs[1], needs[2]),
            list(row_counts),
            HiddenOptions.of(options),
            backends.load(backend),
        )
    dhidden, dweight, dbias, scale = (_some(x, result.loss) for x in (*result.gradients, result.scale))
    return result.loss, result.statistics, result.scores, dhidden, dweight, dbias, scale


@fake("hidden_loss")
def _(hidden, weight, bias, scoring, numbers, flat, sizes, normalizer, spec, needs, row_counts, options, backend):
    loss = hidden.new_empty((), dtype=wide(hidden.dtype))
    columns = len(STATISTICS) + (0 if HiddenOptions.of(options).sparse_eps is None else len(SPARSE_STATISTICS))
    statistics = loss.new_empty(columns, dtype=torch.float32)
    scores = loss.new_empty((4, hidden.shape[0]))
    scaled = any(needs) and (hidden.dtype == torch.float16 or len(row_counts) > 0)
    scale = loss.new_empty(() if scaled else 0)
    return loss, statistics, scores, *_fake_gradients(hidden, weight, bias, needs), scale
