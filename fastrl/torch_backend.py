"""Steps A, B and C in plain torch: what runs on a CPU, and wherever Triton does not.

Rows are taken a few at a time, so that the temporaries stay in the cache and nothing of [N, V] is allocated besides
the gradient that is asked for. Where that gradient has the working dtype it first holds the exponentials of step A, and
step C only scales them: an exponential costs as much as all other passes over a logit together.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import reference
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.plan import PlanKind
from fastrl.reference import Measured
from fastrl.rows import RowScores, Scoring
from fastrl.spec import LossSpec
from fastrl.token_inputs import TokenInputs, expand

name = "torch"
fuses_objectives = False  # B is the specification itself, in torch, between A and C
one_pass = frozenset({PlanKind.ROWS, PlanKind.SEQUENCES})

_BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**27}  # on a CPU large enough for a call's overhead, small enough for the cache
_LOWEST = -1e5  # exp of it is 0 in float32 and float64, and 0·_LOWEST is 0 where 0·(−inf) is NaN
_LOG2E = 1 / math.log(2)  # torch's exp2 is its own vector code everywhere, its exp a library's, on some CPUs 3x slower


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
    factor: Tensor | float  # f of z = f·u; (n, 1) when the temperature differs between tokens

    @classmethod
    def of(cls, scoring: Scoring, vocab: int, dtype: torch.dtype) -> _Targets:
        tokens = slice(None) if scoring.rows is None else scoring.rows
        ids = scoring.ids[tokens]
        safe = ids.clamp(0, vocab - 1)
        factor: Tensor | float = scoring.factor
        if scoring.temperature is not None:
            factor = scoring.factor / scoring.temperature[tokens].to(dtype)[:, None]
        valid = None if scoring.mask is None else scoring.mask[tokens]
        return cls(tokens, safe[:, None], ids != safe, valid, factor)

    def factor_of(self, rows: slice) -> Tensor | float:
        return self.factor[rows] if isinstance(self.factor, Tensor) else self.factor


def _exponents(u: Tensor, top: Tensor, factor: Tensor | float, out: Tensor) -> Tensor:
    """out ← log₂e·f·(u − m), the exponents of 2. The maximum goes first: the product of a large logit is rounded."""
    return torch.sub(u, top, out=out).mul_(factor * _LOG2E)


def _nothing_in(rows: Tensor | None) -> bool:
    """Whether no row is set, where knowing it costs no synchronisation."""
    return rows is not None and rows.device.type == "cpu" and not rows.any()


def _weighted_sum(d: Tensor, e: Tensor) -> Tensor:
    """(r, V), (r, V) -> (r,): Σ e·d with 0·(−inf) = 0; d is overwritten. On a CPU it is looked for in the sums."""
    if d.device.type != "cpu":
        return _row_sum(d.clamp_(min=_LOWEST).mul_(e))
    sums = _row_sum(d.mul_(e))
    # A NaN logit made the sum of e NaN as well: nothing is hidden here.
    return _row_sum(d.nan_to_num_(nan=0.0)) if bool(sums.isnan().any()) else sums


def score(logits: Tensor, scoring: Scoring, out: RowScores, keep: Tensor | None = None) -> None:
    """Step A: write logp, entropy, row maximum and log-sum of every row; 0 under the mask. With `keep`, in the working
    dtype and maybe the logits themselves, leave exp(z − m) there, 0 at the target, but nothing under the mask."""
    vocab, dtype = logits.shape[-1], wide(logits.dtype)
    targets = _Targets.of(scoring, vocab, dtype)
    scratch = _scratch(logits, 2 if keep is None else 1)
    chosen, others, weighted, top = torch.zeros((4, targets.ids.shape[0]), dtype=dtype, device=logits.device).unbind(0)
    places: Iterable[Tensor | None] = itertools.repeat(None) if keep is None else _blocks_like(keep, logits)
    for (start, stop, rows), place in zip(_blocks(logits), places, strict=False):
        here = slice(start, stop)
        if targets.valid is not None and _nothing_in(targets.valid[here]):
            continue
        u, _ = _transform(rows, scoring)
        f = targets.factor_of(here)
        torch.amax(u, -1, out=top[here])
        chosen[here] = (u.gather(-1, targets.ids[here]) - top[here, None]).mul_(f)[:, 0]
        d = _exponents(u, top[here, None], f, out=scratch[0, : stop - start])
        e = torch.exp2(d, out=scratch[1, : stop - start] if place is None else place)
        e.scatter_(-1, targets.ids[here], 0)
        others[here] = _row_sum(e)
        weighted[here] = _weighted_sum(d, e)
    # The target joins last: where it is the maximum, log1p keeps what 1 + the others would round away.
    own = chosen.exp()
    log_sum = torch.where(own == 1, others.log1p(), (others + own).log())
    mean = (weighted / _LOG2E + own * chosen.clamp_min(_LOWEST)) / (others + own)
    entropy = (log_sum - mean).clamp(0, math.log(vocab))
    logp = (chosen - log_sum).clamp_max(0).masked_fill(targets.outside, torch.nan)
    for field, values in zip(out, (logp, entropy, top, log_sum), strict=True):
        field[targets.tokens] = values if targets.valid is None else values.masked_fill(~targets.valid, 0)


def differentiate(
    logits: Tensor,
    scoring: Scoring,
    scores: RowScores,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    out: Tensor,
    kept: bool = False,
) -> None:
    """Step C: out ← d(Σ dlogp·logp + dentropy·entropy)/dlogits, row by row; `out` may be `logits`, or hold what `score`
    kept of them (`kept`, which is for logits without softcap and no dentropy)."""
    vocab, dtype = logits.shape[-1], wide(logits.dtype)
    targets = _Targets.of(scoring, vocab, dtype)
    row = RowScores(*(field[targets.tokens][:, None] for field in scores))
    c = torch.zeros_like(row.logp) if dlogp is None else dlogp[targets.tokens][:, None].to(dtype)
    e = None if dentropy is None else dentropy[targets.tokens][:, None].to(dtype)
    live = _live(targets, c, e, row.logp)
    c = c.masked_fill(targets.outside[:, None], torch.nan)
    share = -c * torch.exp(-row.log_sum) * targets.factor
    own = -c * torch.expm1(row.logp)  # c·(1 − p) of the target, without cancellation
    if e is not None:
        own -= e * row.logp.exp() * (row.logp.clamp_min(_LOWEST) + row.entropy)
    own = own * targets.factor
    scratch = _scratch(logits, 1) if out.dtype != dtype else None
    for (start, stop, rows), target in zip(_blocks(logits), _blocks_like(out, logits), strict=True):
        here = slice(start, stop)
        if _nothing_in(live[here]):
            target.zero_()
            continue
        g = target if scratch is None else scratch[0, : stop - start]
        f = targets.factor_of(here)
        tanh = None
        if not kept:
            u, tanh = _transform(rows, scoring)
            _exponents(u, row.row_max[here], f, out=g)
        if e is None:
            (g if kept else g.exp2_()).mul_(share[here])
        else:
            g.sub_(row.log_sum[here] * _LOG2E)  # log₂ p
            slope = g.clamp(min=_LOWEST).mul_(e[here] * (-f / _LOG2E)).sub_((e[here] * row.entropy[here] + c[here]) * f)
            g.exp2_().mul_(slope)
        g.scatter_(-1, targets.ids[here], own[here])
        if tanh is not None:
            g.mul_(tanh.square_().neg_().add_(1)).mul_(scoring.inner * scoring.softcap)
        if targets.valid is not None:  # a zero cotangent gives zeros by itself, garbage under the mask may not
            g.masked_fill_(~live[here, None], 0)
        if g is not target:
            target.copy_(g)


def score_and_differentiate(
    logits: Tensor,
    scoring: Scoring,
    inputs: TokenInputs,
    spec: LossSpec,
    scores: RowScores,
    dlogp: Tensor,
    dentropy: Tensor | None,
    out: Tensor,
) -> None:
    """A, B, C on rows that hold whole sequences if the spec needs them; `out` may be `logits`. Every number is, to the
    bit, what the steps give one by one."""
    keeps = out.dtype == wide(logits.dtype) and scoring.softcap is None and dentropy is None
    score(logits, scoring, scores, out if keeps else None)
    rows = slice(None) if scoring.rows is None else scoring.rows
    coefficients(scores, inputs, rows, spec, dlogp, dentropy)
    differentiate(logits, scoring, scores, dlogp, dentropy, out, keeps)


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


def _derive(
    logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor | None, Measured]:
    """Σ w·ℓ and its derivatives, by autograd over the specification, and what it was computed from."""
    with _autograd():
        leaves = [logps.detach().requires_grad_()]
        if spec.entropy_coef and entropy is not None:
            entropy = entropy.detach().requires_grad_()
            leaves.append(entropy)
        measured = reference.measure(leaves[0], inputs, spec)
        loss = reference.total_loss(measured, entropy, inputs, spec)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    dlogp, *rest = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))
    # A NaN log-prob poisons its row also where the objective's own derivative is finite (−A·log π).
    dlogp = torch.where(logps.isnan() & inputs.valid, torch.nan, dlogp)
    return loss.detach(), dlogp, rest[0] if rest else None, measured


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
    logps, entropy, inputs = expand(logps, entropy, flat, normalizer, spec)
    if grad:
        loss, dlogp, dentropy, measured = _derive(logps, entropy, inputs, spec)
    else:
        measured, dlogp, dentropy = reference.measure(logps, inputs, spec), None, None
        loss = reference.total_loss(measured, entropy, inputs, spec)
    return loss, reference.statistics(measured, entropy, inputs, spec), dlogp, dentropy


def coefficients(
    scores: RowScores, inputs: TokenInputs, rows: Tensor | slice, spec: LossSpec, dlogp: Tensor, dentropy: Tensor | None
) -> None:
    """Step B for some rows only, whole sequences if the ratio needs them: write their derivatives."""
    _, c, e, _ = _derive(scores.logp[rows], scores.entropy[rows], inputs.take(rows), spec)
    dlogp[rows] = c
    if dentropy is not None:
        dentropy[rows] = e


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x ← factor·x, in place; on a CPU nothing moves when the factor is 1."""
    if x.device.type != "cpu" or factor.item() != 1.0:
        x.mul_(factor.to(x.dtype) if x.dtype == torch.float64 else factor)
    return x
