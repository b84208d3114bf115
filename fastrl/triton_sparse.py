"""The sparse gradient by the Triton kernels."""

from __future__ import annotations

import fastrl_kernels as kernels
from torch import Tensor

from fastrl.rows import KeptColumns, RowScores, Scoring, SparseRows


def sparsify(
    logits: Tensor,
    scoring: Scoring,
    scores: RowScores,
    dlogp: Tensor,
    dentropy: Tensor | None,
    eps: float,
    out: SparseRows,
    kept: KeptColumns,
) -> None:
    """Step C as lists: of each row the target and the columns with p > eps, in the order of the columns."""
    kernels.sparsify(
        logits, scoring.ids, scoring.rows, scoring.temperature, *scores, dlogp, dentropy, *out, *kept,
        eps=eps, factor=scoring.factor, softcap=scoring.softcap, inner=scoring.inner,
    )  # fmt: skip


def hidden_gradient(sparse: SparseRows, weight: Tensor, rows: Tensor, dhidden: Tensor) -> None:
    """dhidden[rows] ← Σₖ gₖ·weight[columnₖ], summed in fp32; empty lists give 0."""
    kernels.gather_columns(*sparse, weight, rows, dhidden)


def weight_gradient(
    sparse: SparseRows, hidden: Tensor, dweight: Tensor | None, dbias: Tensor | None, first: bool
) -> None:
    """dweight[v] += Σ g·hidden[row], dbias[v] += Σ g over the entries of column v; `first`: dweight has nothing in it
    yet."""
    kernels.sum_by_column(*sparse, hidden, dweight, dbias, first=first)
