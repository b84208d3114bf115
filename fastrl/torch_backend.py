"""Steps A, B and C in plain torch: what runs on a CPU, and wherever Triton does not.

Rows are taken a few at a time, so that the temporaries stay in the cache and nothing of [N, V] is allocated besides
the gradient that is asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import reference
from fastrl.flat import Flat
from fastrl.reference import TokenInputs, wide
from fastrl.rows import RowScores, Scoring
from fastrl.spec import LossSpec

name = "torch"
fuses_objectives = False  # no one-pass kernel: A, B, C always run one after the other

_BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**27}  # on a CPU two cores' L2 caches hold three such blocks
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


class _Targets(NamedTuple):
    """Per row of a call, gathered once: what the blocks then slice."""

    tokens: Tensor | slice  # the tokens that the rows score
    ids: Tensor  # (n, 1) int64, safe to index with
    outside: Tensor  # (n,) bool: the id was not in the vocabulary
    valid: Tensor | None  # (n,) bool; None = all count
    factor: Tensor | None  # (n, 1), when the temperature differs between tokens

    @classmethod
    def of(cls, scoring: Scoring, vocab: int, dtype: torch.dtype) -> _Targets:
        tokens = slice(None) if scoring.rows is None else scoring.rows
        ids = scoring.ids[tokens]
        safe = ids.clamp(0, vocab - 1)
        factor = (
            None if scoring.temperature is None else scoring.factor / scoring.temperature[tokens].to(dtype)[:, None]
        )
        valid = None if scoring.mask is None else scoring.mask[tokens]
        return cls(tokens, safe[:, None], ids != safe, valid, factor)


def _scale_rows(x: Tensor, scoring: Scoring, targets: _Targets, start: int, stop: int) -> None:
    """x ← f·x for rows start:stop."""
    if targets.factor is not None:
        x.mul_(targets.factor[start:stop])
    elif scoring.factor != 1.0:
        x.mul_(scoring.factor)


def _nothing_in(rows: Tensor | None) -> bool:
    """Whether no row is set, where knowing it costs no synchronisation."""
    return rows is not None and rows.device.type == "cpu" and not rows.any()


def score(logits: Tensor, scoring: Scoring, out: RowScores) -> None:
    """Step A: write logp, entropy, row maximum and log-sum of every row; 0 under the mask."""
    vocab, dtype = logits.shape[-1], wide(logits.dtype)
    targets = _Targets.of(scoring, vocab, dtype)
    scratch = _scratch(logits, 2)
    chosen, others, weighted, top = torch.zeros((4, targets.ids.shape[0]), dtype=dtype, device=logits.device).unbind(0)
    for start, stop, rows in _blocks(logits):
        here = slice(start, stop)
        if targets.valid is not None and _nothing_in(targets.valid[here]):
            continue
        u, _ = _transform(rows, scoring)
        d, e = scratch[:, : stop - start]
        torch.amax(u, -1, out=top[here])
        torch.sub(u, top[here, None], out=d)
        _scale_rows(d, scoring, targets, start, stop)
        chosen[here] = d.gather(-1, targets.ids[here])[:, 0]
        torch.exp(d.clamp_(min=_LOWEST), out=e)
        e.scatter_(-1, targets.ids[here], 0)
        others[here] = _row_sum(e)
        weighted[here] = _row_sum(e.mul_(d))
    # The target joins last: where it is the maximum, log1p keeps what 1 + the others would round away.
    own = chosen.exp()
    log_sum = torch.where(own == 1, others.log1p(), (others + own).log())
    entropy = (log_sum - (weighted + own * chosen.clamp_min(_LOWEST)) / (others + own)).clamp(0, math.log(vocab))
    logp = (chosen - log_sum).clamp_max(0).masked_fill(targets.outside, torch.nan)
    for field, values in zip(out, (logp, entropy, top, log_sum), strict=True):
        field[targets.tokens] = values if targets.valid is None else values.masked_fill(~targets.valid, 0)


def differentiate(
    logits: Tensor, scoring: Scoring, scores: RowScores, dlogp: Tensor | None, dentropy: Tensor | None, out: Tensor
) -> None:
    """Step C: out ← d(Σ dlogp·logp + dentropy·entropy)/dlogits, row by row; `out` may be `logits`."""
    vocab, dtype = logits.shape[-1], wide(logits.dtype)
    targets = _Targets.of(scoring, vocab, dtype)
    row = RowScores(*(field[targets.tokens][:, None] for field in scores))
    c = torch.zeros_like(row.logp) if dlogp is None else dlogp[targets.tokens][:, None].to(dtype)
    e = None if dentropy is None else dentropy[targets.tokens][:, None].to(dtype)
    live = _live(targets, c, e, row.logp)
    c = c.masked_fill(targets.outside[:, None], torch.nan)
    share = -c * torch.exp(-row.log_sum)
    own = -c * torch.expm1(row.logp)  # c·(1 − p) of the target, without cancellation
    if e is not None:
        own -= e * row.logp.exp() * (row.logp.clamp_min(_LOWEST) + row.entropy)
    scratch = _scratch(logits, 1) if out.dtype != dtype else None
    for (start, stop, rows), target in zip(_blocks(logits), _blocks_like(out, logits), strict=True):
        here = slice(start, stop)
        if _nothing_in(live[here]):
            target.zero_()
            continue
        u, tanh = _transform(rows, scoring)
        g = target if scratch is None else scratch[0, : stop - start]
        torch.sub(u, row.row_max[here], out=g)
        _scale_rows(g, scoring, targets, start, stop)
        if e is None:
            g.exp_().mul_(share[here])
        else:
            g.sub_(row.log_sum[here])
            slope = (g.clamp(min=_LOWEST) + row.entropy[here]).mul_(e[here]).add_(c[here])
            g.exp_().mul_(slope).neg_()
        g.scatter_(-1, targets.ids[here], own[here])
        _scale_rows(g, scoring, targets, start, stop)
        if tanh is not None:
            g.mul_(tanh.square_().neg_().add_(1)).mul_(scoring.inner * scoring.softcap)
        if targets.valid is not None:  # a zero cotangent gives zeros by itself, garbage under the mask may not
            g.masked_fill_(~live[here, None], 0)
        if g is not target:
            target.copy_(g)


def _live(targets: _Targets, c: Tensor, e: Tensor | None, logp: Tensor) -> Tensor:
    """(n,) rows that can have a gradient; NaN among them, whatever the cotangents."""
    live = (((c if e is None else c.abs() + e.abs()) != 0) | logp.isnan())[:, 0]
    return live if targets.valid is None else live & targets.valid


def _blocks_like(out: Tensor, logits: Tensor) -> Iterator[Tensor]:
    """The blocks of `out` that match those of `logits`, whose batches may merge where `out`'s do not."""
    merged = logits.ndim == 2 or logits.stride(0) == logits.shape[1] * logits.stride(1)
    for start, stop, _ in _blocks(logits):
        if merged:
            yield (out.flatten(0, 1) if out.ndim == 3 else out)[start:stop]
        else:
            b, t = divmod(start, out.shape[1])
            yield out[b, t : t + stop - start]


def _value_and_grad(
    logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ w·ℓ and its derivatives, by autograd over the specification."""

    def loss(logps: Tensor, entropy: Tensor | None) -> Tensor:
        return reference.total_loss(logps, entropy, inputs, spec)

    variables = (logps,) if not spec.entropy_coef or entropy is None else (logps, entropy)
    with _autograd():
        leaves = [x.detach().requires_grad_() for x in variables]
        value = loss(leaves[0], leaves[1] if len(leaves) > 1 else entropy)
        gradients = (
            torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        )
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(variables, gradients, strict=True)]
    # A NaN log-prob poisons its row also where the objective's own derivative is finite (−A·log π).
    dlogp = torch.where(logps.isnan() & inputs.valid, torch.nan, filled[0])
    return value.detach(), dlogp, filled[1] if len(filled) > 1 else None


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
    logps, entropy, inputs = reference.expand(logps, entropy, flat, normalizer, spec)
    statistics = reference.statistics(logps, entropy, inputs, spec)
    if not grad:
        loss = reference.total_loss(logps, entropy, inputs, spec)
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
