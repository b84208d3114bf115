"""What a row of logits is scored with, and what comes out: the interface between the drivers and the two backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowScores(NamedTuple):
    """(N,) statistics of every row: what scoring returns and what the gradient needs to rebuild the softmax."""

    logp: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor


class Scoring(NamedTuple):
    """How logits become z = softcap(scale·x)/temperature, and which token each row scores."""

    ids: Tensor  # (N,) int64
    mask: Tensor | None  # (N,) bool
    rows: Tensor | None  # (n,) int64: row i of the logits scores token rows[i]; None = token i
    temperature: Tensor | None  # (N,), when it differs between tokens
    factor: float  # on u: 1 / temperature, times the logit scale when there is no softcap
    softcap: float | None
    inner: float  # logit scale / softcap, the factor inside the tanh; 0 without a softcap

    @classmethod
    def of(
        cls, ids: Tensor, mask: Tensor | None, temperature: Tensor | float, scale: float = 1.0, softcap: float = 0.0
    ) -> Scoring:
        per_token = temperature if isinstance(temperature, Tensor) else None
        divisor = 1.0 if isinstance(temperature, Tensor) else temperature
        factor = (1.0 if softcap else scale) / divisor
        return cls(
            ids=ids,
            mask=mask,
            rows=None,
            temperature=per_token,
            factor=float(factor),
            softcap=softcap or None,
            inner=scale / softcap if softcap else 0.0,
        )

    def at(self, rows: Tensor) -> Scoring:
        """The same for logits whose row i scores token rows[i]; those rows all count."""
        return self._replace(rows=rows, mask=None)


class SparseRows(NamedTuple):
    """The gradient of n rows of logits as lists of C columns each, in the order of the columns; an unused place holds
    column V and gradient 0."""

    columns: Tensor  # (n, C) int32
    gradients: Tensor  # (n, C) fp32 (fp64 for fp64 logits)


class KeptColumns(NamedTuple):
    """(N,) what the sparse gradient kept of every token's row."""

    number: Tensor  # int32: columns kept; 0 = nothing to differentiate; C + 1 = too many, or NaN: left to the dense way
    dropped: Tensor  # Σ p of the columns left out, 0 for a row that goes the dense way
