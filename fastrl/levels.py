"""The drivers: steps A, B, C over whole logits, or chunk by chunk between the GEMMs of the language-model head.

Written once for both backends. Nothing here knows an objective, and nothing here waits for the device except, at the
hidden level, to learn how many rows count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import reference
from fastrl.chunking import row_stride, rows_per_chunk
from fastrl.flat import Flat, segment_sum
from fastrl.plan import PlanKind, plan
from fastrl.reference import TokenInputs, wide
from fastrl.rows import RowScores, Scoring
from fastrl.spec import LossSpec


class LogitsLoss(NamedTuple):
    loss: Tensor
    statistics: Tensor
    scores: Tensor  # (4, N), the fields of RowScores
    dlogp: Tensor | None  # (N,)
    dentropy: Tensor | None  # (N,)


def logits_score(logits: Tensor, scoring: Scoring, backend: Any) -> Tensor:
    """(4, N) scores of logits rows."""
    scores = torch.zeros((4, scoring.ids.shape[0]), dtype=wide(logits.dtype), device=logits.device)
    backend.score(logits, scoring, RowScores(*scores.unbind(0)))
    return scores


def logits_loss(
    logits: Tensor,
    scoring: Scoring,
    flat: Flat,
    normalizer: Tensor | None,
    spec: LossSpec,
    dlogits: Tensor | None,
    grad: bool,
    backend: Any,
) -> LogitsLoss:
    """The loss from logits. With `dlogits` (may be the logits themselves) its gradient is written there; with `grad`
    only, the derivatives per token are returned and the gradient is left to `backend.differentiate`."""
    if dlogits is not None and plan(spec, backend.fuses_objectives).kind in backend.one_pass:
        scores = torch.empty((4, flat.num_tokens), dtype=wide(logits.dtype), device=logits.device)
        inputs = reference.token_inputs(flat, normalizer, spec, scores.dtype)
        dlogp = torch.empty_like(scores[0])
        dentropy = torch.empty_like(dlogp) if spec.entropy_coef else None
        rows = RowScores(*scores.unbind(0))
        backend.score_and_differentiate(logits, scoring, inputs, spec, rows, dlogp, dentropy, dlogits)
        loss, statistics, _, _ = backend.token_loss(*scores[:2].unbind(0), flat, normalizer, spec, grad=False)
        return LogitsLoss(loss, statistics, scores, dlogp, dentropy)
    scores = logits_score(logits, scoring, backend)
    rows = RowScores(*scores.unbind(0))
    loss, statistics, dlogp, dentropy = backend.token_loss(rows.logp, rows.entropy, flat, normalizer, spec, grad=grad)
    if dlogits is not None:
        backend.differentiate(logits, scoring, rows, dlogp, dentropy, dlogits)
    return LogitsLoss(loss, statistics, scores, dlogp, dentropy)


class _Rows(NamedTuple):
    """The rows worth projecting, those that can carry a gradient first."""

    order: Tensor  # (n,) int64
    total: int  # how many there are
    grad_count: int  # how many of them, from the front, can carry a gradient
    ends: list[int]  # sequence boundaries within `order`, when the plan needs them
    found: Tensor | None = None  # (2,) the counts as the device knows them, to hold the caller's against

    @classmethod
    def select(cls, flat: Flat, spec: LossSpec, advantages: Tensor, by_sequence: bool, row_counts: list[int]) -> _Rows:
        """Drop masked rows; put rows whose gradient is known to be zero (zero advantage, no penalty) last.

        One host synchronisation, to learn the counts (and for whole sequences their lengths); none when the counts are
        given, or when every row counts and can carry a gradient.
        """
        valid = flat.valid()
        live = valid & (advantages != 0) if spec.vanishes else valid
        sequence = flat.sequence_of_token()
        if by_sequence:
            live_sequences = segment_sum(live.float(), sequence, flat.num_sequences) > 0
            live = valid & live_sequences[sequence]
        elif flat.mask is None and not spec.vanishes and not row_counts:
            rows = torch.arange(flat.num_tokens, device=valid.device)
            return cls(rows, flat.num_tokens, flat.num_tokens, [])
        key = 2 - valid.int() - live.int()
        order = torch.argsort(key, stable=True)
        if not by_sequence:
            found = torch.stack([valid.sum(), live.sum()])
            counts = row_counts or found.tolist()
            return cls(order[: counts[0]], counts[0], counts[1], [], found)
        lengths, alive = torch.stack([flat.lengths, live_sequences.float()]).tolist()
        ends = [0]
        for wanted in (1.0, 0.0):
            for length, is_live in zip(lengths, alive, strict=True):
                if is_live == wanted and length:
                    ends.append(ends[-1] + int(length))
        grad_count = int(sum(length for length, is_live in zip(lengths, alive, strict=True) if is_live))
        if row_counts and row_counts[0] != ends[-1]:
            raise ValueError(
                f"row_counts: expected ({ends[-1]}, ...), the tokens that count, got {tuple(row_counts)}; leave it None"
            )
        # The second count is of whole sequences here, as read above: the caller's is not needed.
        found = torch.stack([valid.sum(), torch.full_like(valid.sum(), row_counts[1])]) if row_counts else None
        return cls(order[: ends[-1]], ends[-1], grad_count, ends, found)

    def chunks(self, start: int, stop: int, limit: int) -> Iterator[Tensor]:
        """Rows start:stop in pieces of at most `limit`, on sequence boundaries if there are any."""
        while start < stop:
            end = min(start + limit, stop)
            if self.ends and end < stop:
                end = max(at for at in self.ends if at <= end)
            yield self.order[start:end]
            start = end


class _Projection:
    """One buffer of logits for a chunk of rows, and the gradients that its GEMMs add up."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, limit: int, needs: tuple[bool, bool, bool]):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        vocab = weight.shape[0]
        self._buffer = torch.empty((limit, row_stride(vocab)), dtype=weight.dtype, device=weight.device)
        self._vocab = vocab
        self._chunk = hidden
        need_hidden, need_weight, need_bias = needs
        self.dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        sums = wide(weight.dtype)
        self.dweight = torch.empty(weight.shape, dtype=sums, device=weight.device) if need_weight else None
        self.dbias = torch.zeros(vocab, dtype=sums, device=weight.device) if need_bias else None
        self._first = True

    def logits(self, rows: Tensor) -> Tensor:
        """(r, V) logits of some tokens, in the buffer."""
        self._chunk = self.hidden[rows]
        out = self._buffer[: rows.shape[0], : self._vocab]
        if self.bias is None:
            return torch.mm(self._chunk, self.weight.t(), out=out)
        return torch.addmm(self.bias, self._chunk, self.weight.t(), out=out)

    def accumulate(self, rows: Tensor, dlogits: Tensor) -> None:
        """Take the gradient of the chunk whose logits were computed last."""
        if self.dhidden is not None:
            self.dhidden[rows] = torch.mm(dlogits, self.weight)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        if self.dweight is not None:
            _add_outer(self.dweight, dlogits, self._chunk, beta=0 if self._first else 1)
            self._first = False

    def gradients(self) -> list[Tensor | None]:
        """dhidden, dweight, dbias; a half-precision head keeps its sums in fp32, for the loss scale to come."""
        if self.dweight is not None and self._first:
            self.dweight.zero_()
        keep = self.weight.dtype == torch.float16
        parameters = [g if g is None or keep else g.to(self.weight.dtype) for g in (self.dweight, self.dbias)]
        return [self.dhidden, *parameters]


def _add_outer(total: Tensor, dlogits: Tensor, hidden: Tensor, beta: int) -> None:
    """total ← beta·total + dlogitsᵀ @ hidden, added in the dtype of `total`."""
    if total.dtype == dlogits.dtype:
        total.addmm_(dlogits.t(), hidden, beta=beta)
    elif dlogits.is_cuda and torch.version.hip is None:
        torch.addmm(total, dlogits.t(), hidden, beta=beta, out_dtype=total.dtype, out=total)
    else:
        tile = 4096
        wide_hidden = hidden.to(total.dtype)
        for v in range(0, total.shape[0], tile):
            total[v : v + tile].addmm_(dlogits[:, v : v + tile].t().to(total.dtype), wide_hidden, beta=beta)


def hidden_score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scoring: Scoring, buffer_bytes: int, backend: Any
) -> Tensor:
    """(4, N) scores from hidden states (N, H), masked rows dropped before the GEMM."""
    limit = min(rows_per_chunk(weight, buffer_bytes, hidden.shape[0]), max(hidden.shape[0], 1))
    project = _Projection(hidden, weight, bias, limit, (False, False, False))
    scores = torch.zeros((4, hidden.shape[0]), dtype=wide(hidden.dtype), device=hidden.device)
    order = _valid_rows(scoring)
    for rows in order.split(limit):
        backend.score(project.logits(rows), scoring.at(rows), RowScores(*scores.unbind(0)))
    return scores


def _valid_rows(scoring: Scoring) -> Tensor:
    if scoring.mask is None:
        return torch.arange(scoring.ids.shape[0], device=scoring.ids.device)
    return scoring.mask.nonzero().squeeze(-1)


def hidden_score_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scoring: Scoring,
    scores: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    needs: tuple[bool, bool, bool],
    buffer_bytes: int,
    backend: Any,
) -> list[Tensor | None]:
    """Gradients of Σ dlogp·logp + dentropy·entropy; the logits are computed again (8NHV in all)."""
    limit = min(rows_per_chunk(weight, buffer_bytes, hidden.shape[0]), max(hidden.shape[0], 1))
    project = _Projection(hidden, weight, bias, limit, needs)
    for rows in _valid_rows(scoring).split(limit):
        logits = project.logits(rows)
        backend.differentiate(logits, scoring.at(rows), RowScores(*scores.unbind(0)), dlogp, dentropy, logits)
        project.accumulate(rows, logits)
    return project.gradients()


class HiddenLoss(NamedTuple):
    loss: Tensor
    statistics: Tensor
    scores: Tensor  # (4, N)
    gradients: list[Tensor | None]  # of hidden, weight, bias, times `scale`
    scale: Tensor | None  # 0-d; None = 1


def hidden_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    scoring: Scoring,
    flat: Flat,
    normalizer: Tensor | None,
    spec: LossSpec,
    needs: tuple[bool, bool, bool],
    row_counts: list[int],
    buffer_bytes: int,
    backend: Any,
) -> HiddenLoss:
    """The loss from hidden states, with its gradients in the same pass: 6NHV FLOP with a trainable head, 4NHV with a
    frozen one, 2NHV per row without a gradient; gradients plus one buffer of `buffer_bytes` in memory."""
    kind = plan(spec, backend.fuses_objectives).kind
    dtype = wide(hidden.dtype)
    inputs = reference.token_inputs(flat, normalizer, spec, dtype)
    rows = _Rows.select(flat, spec, inputs.advantages, kind == PlanKind.SEQUENCES, row_counts)
    longest = max((b - a for a, b in zip(rows.ends, rows.ends[1:], strict=False)), default=0)
    limit = min(rows_per_chunk(weight, buffer_bytes, hidden.shape[0], longest), max(rows.total, 1))
    project = _Projection(hidden, weight, bias, limit, needs)
    stack = torch.zeros((4, flat.num_tokens), dtype=dtype, device=hidden.device)
    scores = RowScores(*stack.unbind(0))
    scale = _half_scale(inputs, spec) if any(needs) and hidden.dtype == torch.float16 else None
    scaled = inputs if scale is None else _scaled_weights(inputs, scale)
    grad_count = rows.grad_count if any(needs) else 0
    dlogp = torch.zeros_like(scores.logp)
    dentropy = torch.zeros_like(dlogp) if spec.entropy_coef else None

    if (longest > limit or kind == PlanKind.BATCH) and grad_count:
        rows = rows._replace(ends=[])
        for chunk in rows.chunks(0, rows.total, limit):
            backend.score(project.logits(chunk), scoring.at(chunk), scores)
        _, _, dlogp, dentropy = backend.token_loss(*scores[:2], flat, normalizer, spec, grad=True)
        if scale is not None:
            dlogp, dentropy = dlogp * scale, None if dentropy is None else dentropy * scale
        for chunk in rows.chunks(0, grad_count, limit):
            logits = project.logits(chunk)
            backend.differentiate(logits, scoring.at(chunk), scores, dlogp, dentropy, logits)
            project.accumulate(chunk, logits)
    else:
        for chunk in rows.chunks(0, grad_count, limit):
            logits = project.logits(chunk)
            _score_and_differentiate(backend, kind, logits, scoring.at(chunk), scaled, spec, scores, dlogp, dentropy)
            project.accumulate(chunk, logits)
        rows = rows._replace(ends=[])
        for chunk in rows.chunks(grad_count, rows.total, limit):
            backend.score(project.logits(chunk), scoring.at(chunk), scores)

    loss, statistics, _, _ = backend.token_loss(scores.logp, scores.entropy, flat, normalizer, spec, grad=False)
    if row_counts and rows.found is not None:
        # A row that the caller's counts leave out must not pass unseen, and looking would cost a synchronisation.
        right = (rows.found[0] == row_counts[0]) & (rows.found[1] == row_counts[1])
        loss = torch.where(right, loss, torch.nan)
        if any(needs):
            scale = torch.where(right, torch.ones_like(loss) if scale is None else scale, torch.nan)
    return HiddenLoss(loss, statistics, stack, project.gradients(), scale)


def _score_and_differentiate(
    backend: Any,
    kind: PlanKind,
    logits: Tensor,
    scoring: Scoring,
    inputs: TokenInputs,
    spec: LossSpec,
    scores: RowScores,
    dlogp: Tensor,
    dentropy: Tensor | None,
) -> None:
    """A, B, C on one chunk, the gradient in place of the logits."""
    if kind in backend.one_pass:
        backend.score_and_differentiate(logits, scoring, inputs, spec, scores, dlogp, dentropy, logits)
        return
    backend.score(logits, scoring, scores)
    backend.coefficients(scores, inputs, scoring.rows, spec, dlogp, dentropy)
    backend.differentiate(logits, scoring, scores, dlogp, dentropy, logits)


def _scaled_weights(inputs: TokenInputs, scale: Tensor) -> TokenInputs:
    own = None if inputs.entropy_weights is None else inputs.entropy_weights * scale
    return inputs._replace(weights=inputs.weights * scale, entropy_weights=own)


def _half_scale(inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """A power of two that lifts the largest weight to about 1: fp16 cannot hold 1/N times a probability."""
    largest = inputs.weights.max() if inputs.weights.numel() else inputs.weights.new_ones(())
    if inputs.entropy_weights is not None and inputs.entropy_weights.numel():
        largest = torch.maximum(largest, abs(spec.entropy_coef) * inputs.entropy_weights.max())
    return torch.where(largest > 0, torch.exp2(-largest.log2().floor()), 1.0)
