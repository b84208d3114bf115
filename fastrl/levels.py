"""The drivers: steps A, B, C over whole logits, or chunk by chunk between the GEMMs of the language-model head.

Written once for both backends. Nothing here knows an objective, and nothing here waits for the device except, at the
hidden level, to learn how many rows count, and which rows of a sparse gradient had no room.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import backend as backends
from fastrl.chunking import pieces
from fastrl.compaction import LiveRows
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.plan import PlanKind, plan
from fastrl.projection import Chunk, HiddenOptions, Projection
from fastrl.rows import KeptColumns, RowScores, Scoring
from fastrl.spec import LossSpec
from fastrl.token_inputs import TokenInputs, token_inputs


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
        inputs = token_inputs(flat, normalizer, spec, scores.dtype)
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


def hidden_score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scoring: Scoring, options: HiddenOptions, backend: Any
) -> Tensor:
    """(4, N) scores from hidden states (N, H), masked rows dropped before the GEMM."""
    project = Projection(hidden, weight, bias, options, hidden.shape[0])
    scores = torch.zeros((4, hidden.shape[0]), dtype=wide(hidden.dtype), device=hidden.device)

    def work(chunk: Chunk) -> None:
        backend.score(chunk.logits, scoring.at(chunk.rows), RowScores(*scores.unbind(0)))

    valid = _valid_rows(scoring)
    project.run(pieces(valid, project.limit), work, grad=False, in_order=len(valid) == hidden.shape[0])
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
    options: HiddenOptions,
    backend: Any,
) -> list[Tensor | None]:
    """Gradients of Σ dlogp·logp + dentropy·entropy; the logits are computed again (8NHV in all)."""
    project = Projection(hidden, weight, bias, options, hidden.shape[0], needs)
    rows = RowScores(*scores.unbind(0))

    def work(chunk: Chunk) -> None:
        backend.differentiate(chunk.logits, scoring.at(chunk.rows), rows, dlogp, dentropy, chunk.gradient)

    valid = _valid_rows(scoring)
    project.run(pieces(valid, project.limit), work, grad=True, in_order=len(valid) == hidden.shape[0])
    return project.gradients()


class HiddenLoss(NamedTuple):
    loss: Tensor
    statistics: Tensor  # with a sparse gradient two more: Σ dropped mass, differentiated rows
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
    options: HiddenOptions,
    backend: Any,
) -> HiddenLoss:
    """The loss from hidden states, with its gradients in the same pass: 6NHV FLOP with a trainable head, 4NHV with a
    frozen one, 2NHV per row without a gradient or with a sparse one; gradients plus the buffers of
    `HiddenOptions.rows_per_buffer` in memory."""
    kind = plan(spec, backend.fuses_objectives).kind
    dtype = wide(hidden.dtype)
    inputs = token_inputs(flat, normalizer, spec, dtype)
    rows = LiveRows.select(flat, spec, inputs.advantages, kind == PlanKind.SEQUENCES, row_counts)
    longest = max((b - a for a, b in zip(rows.ends, rows.ends[1:], strict=False)), default=0)
    project = Projection(hidden, weight, bias, options, rows.total, needs, backend, longest)
    scale = _half_scale(inputs, spec) if any(needs) and hidden.dtype == torch.float16 else None
    stack = torch.zeros((4, flat.num_tokens), dtype=dtype, device=hidden.device)
    passes = _Passes.of(kind, scoring, inputs, spec, RowScores(*stack.unbind(0)), scale, options, backend)
    grad_count = rows.grad_count if any(needs) else 0

    if (longest > project.limit or kind == PlanKind.BATCH) and grad_count:
        rows = rows._replace(ends=[])
        project.run(rows.chunks(0, rows.total, project.limit), passes.score, grad=False, in_order=rows.in_order)
        _, _, dlogp, dentropy = backend.token_loss(*passes.scores[:2], flat, normalizer, spec, grad=True)
        passes = passes.with_derivatives(dlogp, dentropy, scale)
        project.run(rows.chunks(0, grad_count, project.limit), passes.differentiate, grad=True, in_order=rows.in_order)
    else:
        work = passes.score_and_differentiate
        project.run(rows.chunks(0, grad_count, project.limit), work, grad=True, in_order=rows.in_order)
        rows = rows._replace(ends=[])
        in_order = rows.in_order and not grad_count
        project.run(rows.chunks(grad_count, rows.total, project.limit), passes.score, grad=False, in_order=in_order)

    loss, statistics, _, _ = backend.token_loss(*passes.scores[:2], flat, normalizer, spec, grad=False)
    if options.sparse_eps is not None:
        statistics = torch.cat([statistics, passes.finish(project, options.capacity, any(needs)).to(statistics.dtype)])
    if row_counts and rows.found is not None:
        # A row that the caller's counts leave out must not pass unseen, and looking would cost a synchronisation.
        right = (rows.found[0] == row_counts[0]) & (rows.found[1] == row_counts[1])
        loss = torch.where(right, loss, torch.nan)
        if any(needs):
            scale = torch.where(right, torch.ones_like(loss) if scale is None else scale, torch.nan)
    return HiddenLoss(loss, statistics, stack, project.gradients(), scale)


class _Passes(NamedTuple):
    """What is done to the logits of a chunk, the results written at its tokens."""

    kind: PlanKind
    scoring: Scoring
    inputs: TokenInputs  # weights times the scale of the gradient
    spec: LossSpec
    scores: RowScores  # (N,), as the next three
    dlogp: Tensor
    dentropy: Tensor | None
    kept: KeptColumns | None
    eps: float | None
    backend: Any

    @classmethod
    def of(
        cls,
        kind: PlanKind,
        scoring: Scoring,
        inputs: TokenInputs,
        spec: LossSpec,
        scores: RowScores,
        scale: Tensor | None,
        options: HiddenOptions,
        backend: Any,
    ) -> _Passes:
        dlogp = torch.zeros_like(scores.logp)
        dentropy = torch.zeros_like(dlogp) if spec.entropy_coef else None
        scaled = inputs if scale is None else _scaled_weights(inputs, scale)
        kept = None
        if options.sparse_eps is not None:
            kept = KeptColumns(torch.zeros_like(dlogp, dtype=torch.int32), torch.zeros_like(dlogp))
        return cls(kind, scoring, scaled, spec, scores, dlogp, dentropy, kept, options.sparse_eps, backend)

    def with_derivatives(self, dlogp: Tensor, dentropy: Tensor | None, scale: Tensor | None) -> _Passes:
        if scale is not None:
            dlogp, dentropy = dlogp * scale, None if dentropy is None else dentropy * scale
        return self._replace(dlogp=dlogp, dentropy=dentropy)

    def score(self, chunk: Chunk) -> None:
        """A."""
        self.backend.score(chunk.logits, self.scoring.at(chunk.rows), self.scores)

    def differentiate(self, chunk: Chunk) -> None:
        """C, in place of the logits, in a buffer of its own or as lists."""
        scoring = self.scoring.at(chunk.rows)
        if chunk.sparse is None:
            self.backend.differentiate(chunk.logits, scoring, self.scores, self.dlogp, self.dentropy, chunk.gradient)
            return
        sparsify = backends.load_sparse(self.backend.name).sparsify
        sparsify(chunk.logits, scoring, self.scores, self.dlogp, self.dentropy, self.eps, chunk.sparse, self.kept)

    def score_and_differentiate(self, chunk: Chunk) -> None:
        """A, B, C."""
        scoring, derivatives = self.scoring.at(chunk.rows), (self.dlogp, self.dentropy)
        if self.kind in self.backend.one_pass and chunk.sparse is None:
            self.backend.score_and_differentiate(
                chunk.logits, scoring, self.inputs, self.spec, self.scores, *derivatives, chunk.gradient
            )
            return
        self.score(chunk)
        self.backend.coefficients(self.scores, self.inputs, chunk.rows, self.spec, *derivatives)
        self.differentiate(chunk)

    def finish(self, project: Projection, capacity: int, grad: bool) -> Tensor:
        """(2,) dropped mass and differentiated rows, after the rows without room in a list have gone the dense way.

        One host synchronisation, to learn which rows these are."""
        if grad:
            over = (self.kept.number > capacity).nonzero().squeeze(-1)
            project.run(pieces(over, project.limit), self.differentiate, grad=True, dense=True)
        return torch.stack([self.kept.dropped.sum(), (self.kept.number > 0).sum()])


def _scaled_weights(inputs: TokenInputs, scale: Tensor) -> TokenInputs:
    own = None if inputs.entropy_weights is None else inputs.entropy_weights * scale
    return inputs._replace(weights=inputs.weights * scale, entropy_weights=own)


def _half_scale(inputs: TokenInputs, spec: LossSpec) -> Tensor:
    """A power of two that lifts the largest weight to about 1: fp16 cannot hold 1/N times a probability."""
    largest = inputs.weights.max() if inputs.weights.numel() else inputs.weights.new_ones(())
    if inputs.entropy_weights is not None and inputs.entropy_weights.numel():
        largest = torch.maximum(largest, abs(spec.entropy_coef) * inputs.entropy_weights.max())
    return torch.where(largest > 0, torch.exp2(-largest.log2().floor()), 1.0)
