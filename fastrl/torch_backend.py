"""Steps A, B and C in plain torch: what runs on a CPU, and wherever Triton does not.

Rows are taken a few at a time, so that the temporaries stay in the cache and nothing of [N, V] is allocated besides
the gradient that is asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastrl import reference
from fastrl.flat import Flat
from fastrl.reference import TokenInputs, wide
from fastrl.rows import RowScores, Scoring
from fastrl.spec import LossSpec

name = "torch"
fuses_objectives = False  # no one-pass kernel: A, B, C always run one after the other

_BLOCK_BYTES = {"cpu": 2**19, "cuda": 2**27}  # on a CPU three such blocks should fit a core's L2 cache
_LOWEST = -1e5  # exp of it is 0 in float32 and float64, and 0·_LOWEST is 0 where 0·(−inf) is NaN


def _blocks(logits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, last row, (r, V) view) over (B, T, V) or (n, V) logits of any strides, without a copy."""
    if logits.ndim == 3 and logits.stride(0) == logits.shape[1] * logits.stride(1):
        logits = logits.flatten(0, 1)
    batches = logits if logits.ndim == 3 else logits[None]
    width = batches.shape[1]
    step = _block_rows(logits)
    for b, batch in enumerate(batches.unbind(0)):
        for t in range(0, width, step):
            rows = batch[t : t + step]
            yield b * width + t, b * width + t + rows.shape[0], rows


def _scratch(logits: Tensor, count: int) -> Tensor:
    """(count, r, V) working space for blocks of rows, allocated once per call: a fresh megabyte per block would cost
    its page faults every time."""
    rows = logits.shape[0] * (logits.shape[1] if logits.ndim == 3 else 1)
    step = min(_block_rows(logits), max(rows, 1))
    return torch.empty((count, step, logits.shape[-1]), dtype=wide(logits.dtype), device=logits.device)


def _block_rows(logits: Tensor) -> int:
    limit = _BLOCK_BYTES.get(logits.device.type, 2**24)
    return max(2, limit // (logits.shape[-1] * wide(logits.dtype).itemsize))


def _row_sum(x: Tensor) -> Tensor:
    """(r, V) -> (r,). A single row is summed as one of two: torch splits a lone sum over threads, and a row must give
    the same bits alone as in a batch."""
    return x.expand(2, -1).sum(-1)[:1] if x.shape[0] == 1 else x.sum(-1)


def _transform(rows: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor | None]:
    """(r, V) logits in the working dtype after the softcap, and the softcap's slope for the gradient."""
    u = rows.to(wide(rows.dtype))
    if scoring.softcap is None:
        return u, None
    t = torch.tanh(u * scoring.inner)
    return t * scoring.softcap, t


def _tokens(scoring: Scoring, start: int, stop: int) -> Tensor | slice:
    """The tokens that rows start:stop score."""
    return slice(start, stop) if scoring.rows is None else scoring.rows[start:stop]


def _factor(scoring: Scoring, tokens: Tensor | slice, dtype: torch.dtype) -> Tensor | float:
    if scoring.temperature is None:
        return scoring.factor
    return (scoring.factor / scoring.temperature[tokens].to(dtype))[:, None]


def _targets(scoring: Scoring, tokens: Tensor | slice, vocab: int) -> tuple[Tensor, Tensor]:
    """Ids that are safe to index with, and which of them were out of range."""
    ids = scoring.ids[tokens]
    safe = ids.clamp(0, vocab - 1)
    return safe, ids != safe


def score(logits: Tensor, scoring: Scoring, out: RowScores) -> None:
    """Step A: write logp, entropy, row maximum and log-sum of every row; 0 under the mask."""
    vocab = logits.shape[-1]
    scratch = _scratch(logits, 2)
    for start, stop, rows in _blocks(logits):
        tokens = _tokens(scoring, start, stop)
        valid = None if scoring.mask is None else scoring.mask[tokens]
        if valid is not None and valid.device.type == "cpu" and not valid.any():
            for field in out:
                field[tokens] = 0
            continue
        u, _ = _transform(rows, scoring)
        factor = _factor(scoring, tokens, u.dtype)
        ids, outside = _targets(scoring, tokens, vocab)
        top = u.amax(-1)
        d, e = scratch[:, : stop - start]
        torch.sub(u, top[:, None], out=d)
        if not isinstance(factor, float) or factor != 1.0:
            d.mul_(factor)
        chosen = d.gather(-1, ids[:, None]).squeeze(-1)
        torch.exp(d.clamp_(min=_LOWEST), out=e)
        total = _row_sum(e)
        log_sum = total.log()
        entropy = (log_sum - _row_sum(e.mul_(d)) / total).clamp(0, math.log(vocab))
        logp = (chosen - log_sum).clamp_max(0).masked_fill(outside, torch.nan)
        for field, values in zip(out, (logp, entropy, top, log_sum), strict=True):
            field[tokens] = values if valid is None else values.masked_fill(~valid, 0)


def differentiate(
    logits: Tensor, scoring: Scoring, scores: RowScores, dlogp: Tensor | None, dentropy: Tensor | None, out: Tensor
) -> None:
    """Step C: out ← d(Σ dlogp·logp + dentropy·entropy)/dlogits, row by row; `out` may be `logits`."""
    vocab = logits.shape[-1]
    scratch = _scratch(logits, 1) if out.dtype != wide(logits.dtype) else None
    for (start, stop, rows), (_, _, target) in zip(_blocks(logits), _blocks_like(out, logits), strict=True):
        tokens = _tokens(scoring, start, stop)
        live = _live(scoring, tokens, dlogp, dentropy)
        if live.device.type == "cpu" and not live.any():
            target.zero_()
            continue
        u, tanh = _transform(rows, scoring)
        factor = _factor(scoring, tokens, u.dtype)
        ids, outside = _targets(scoring, tokens, vocab)
        c = torch.zeros_like(scores.logp[tokens]) if dlogp is None else dlogp[tokens]
        c = torch.where(outside, torch.nan, c).to(u.dtype)
        g = target if scratch is None else scratch[0, : stop - start]
        torch.sub(u, scores.row_max[tokens][:, None], out=g)
        if not isinstance(factor, float) or factor != 1.0:
            g.mul_(factor)
        g.sub_(scores.log_sum[tokens][:, None])
        if dentropy is None:
            g.exp_().mul_(-c[:, None])
        else:
            e = dentropy[tokens].to(u.dtype)
            slope = (g.clamp(min=_LOWEST) + scores.entropy[tokens][:, None]).mul_(e[:, None]).add_(c[:, None])
            g.exp_().mul_(slope).neg_()
        g.scatter_add_(-1, ids[:, None], c[:, None])
        if not isinstance(factor, float) or factor != 1.0:
            g.mul_(factor)
        if tanh is not None:
            g.mul_(tanh.square_().neg_().add_(1)).mul_(scoring.inner * scoring.softcap)
        if scoring.mask is not None:  # a zero cotangent gives zeros by itself, garbage under the mask may not
            g.masked_fill_(~live[:, None], 0)
        if g is not target:
            target.copy_(g)


def _blocks_like(out: Tensor, logits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of `out` that match those of `logits`, whose strides may merge where `out`'s do not."""
    if out.ndim == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        width, step = out.shape[1], None
        for start, stop, _ in _blocks(logits):
            b, t = divmod(start, width)
            step = stop - start
            yield start, stop, out[b, t : t + step]
        return
    flat = out.flatten(0, 1) if out.ndim == 3 else out
    for start, stop, _ in _blocks(logits):
        yield start, stop, flat[start:stop]


def _live(scoring: Scoring, tokens: Tensor | slice, dlogp: Tensor | None, dentropy: Tensor | None) -> Tensor:
    """(r,) rows that can have a gradient."""
    live = torch.zeros_like(scoring.ids[tokens], dtype=torch.bool)
    for cotangent in (dlogp, dentropy):
        if cotangent is not None:
            live = live | (cotangent[tokens] != 0)
    return live if scoring.mask is None else live & scoring.mask[tokens]


def _value_and_grad(
    logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ w·ℓ and its derivatives, by autograd over the specification."""

    def loss(logps: Tensor, entropy: Tensor | None) -> Tensor:
        return reference.aggregate(reference.per_token_loss(logps, entropy, inputs, spec), inputs)

    variables = (logps,) if not spec.entropy_coef or entropy is None else (logps, entropy)
    with _autograd():
        leaves = [x.detach().requires_grad_() for x in variables]
        value = loss(leaves[0], leaves[1] if len(leaves) > 1 else entropy)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(variables, gradients, strict=True)]
    return value.detach(), filled[0], filled[1] if len(filled) > 1 else None


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Record gradients, also below the dispatcher: inside an operator of a compiled graph torch excludes the autograd
    keys, and `torch.func` fails under the dispatch mode that AOTAutograd runs operators in (torch 2.13)."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradXPU):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def token_loss(
    logps: Tensor, entropy: Tensor | None, flat: Flat, normalizer: Tensor | None, spec: LossSpec, *, grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Step B: (loss, statistics, dloss/dlogp, dloss/dentropy); the derivatives are None unless `grad`."""
    dtype = wide(logps.dtype)
    logps = logps.to(dtype)
    entropy = None if entropy is None else entropy.to(dtype)
    inputs = reference.token_inputs(flat, normalizer, spec, dtype)
    statistics = reference.statistics(logps, entropy, inputs, spec)
    if not grad:
        loss = reference.aggregate(reference.per_token_loss(logps, entropy, inputs, spec), inputs)
        return loss, statistics, None, None
    loss, dlogp, dentropy = _value_and_grad(logps, entropy, inputs, spec)
    return loss, statistics, dlogp, dentropy


def coefficients(
    scores: RowScores, inputs: TokenInputs, rows: Tensor, spec: LossSpec, dlogp: Tensor, dentropy: Tensor | None
) -> None:
    """Step B for some rows only, whole sequences if the ratio needs them: write their derivatives."""
    _, c, e = _value_and_grad(scores.logp[rows], scores.entropy[rows], inputs.take(rows), spec)
    dlogp[rows] = c
    if dentropy is not None:
        dentropy[rows] = e


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x ← factor·x, in place; on a CPU nothing moves when the factor is 1."""
    if x.device.type != "cpu" or factor.item() != 1.0:
        x.mul_(factor.to(x.dtype) if x.dtype == torch.float64 else factor)
    return x
