"""The sparse gradient by the Triton kernels."""

from __future__ import annotations

import fastrl_kernels as kernels
import torch
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
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    kernels.gather_columns(*sparse, weight, rows, dhidden)


def weight_gradient(
    sparse: SparseRows, hidden: Tensor, dweight: Tensor | None, dbias: Tensor | None, first: bool
) -> None:
    """dweight[v] += Σ g·hidden[row], dbias[v] += Σ g over the entries of column v, sorted by column; `first`: dweight
    has nothing in it yet."""
    vocab = dbias.shape[0] if dweight is None else dweight.shape[0]
    columns, order = sparse.columns.flatten().sort(stable=True)
    every = torch.arange(vocab + 1, dtype=columns.dtype, device=columns.device)
    offsets = torch.searchsorted(columns, every, out_int32=True)
    kernels.sum_by_column(order, offsets, sparse.gradients, hidden.contiguous(), dweight, dbias, first=first)
