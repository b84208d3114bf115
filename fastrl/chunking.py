"""How many rows of logits the hidden level holds at once, and how they lie."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

BUFFER_BYTES = 1280 * 2**20
"""Of logits held at once on an accelerator."""
_CPU_BUFFER_BYTES = 128 * 2**20
_CPU_FEWEST_ROWS, _CPU_MOST_ROWS = 64, 512
_FEW = 16  # a CPU's library may sum a product of under 13 rows in one run over V, ten times less exactly
_LINE = 16  # elements: 16-byte alignment in every dtype
_PAGE = 1024  # elements whose rows would start in the same cache set, 4 KiB of fp32
_SHIFT = 64  # elements, 4 cache lines of fp32


def row_stride(vocab: int) -> int:
    """Elements between the rows of a buffer of logits: aligned for an odd vocabulary, and no multiple of 4 KiB, at
    which a column's elements would all fall in one cache set and the products take up to a third longer."""
    stride = -(-vocab // _LINE) * _LINE
    return stride + _SHIFT if stride % _PAGE == 0 else stride


def rows_per_chunk(weight: Tensor, buffer_bytes: int, rows: int, whole: int = 0, row_bytes: int = 0) -> int:
    """How many of `rows` rows of logits fit the buffer, at least one. `buffer_bytes` 0 means the default, `row_bytes` 0
    that a row is its logits alone.

    On a CPU that is an eighth of the rows, 64 at least (128 from H = 256 on) and 512 at most, and 128 MiB at most: with
    fewer rows its library packs the head, of V·H elements, too often, with more it gains nothing, and an eighth of the
    logits is small beside what plain torch holds. The number does not depend on how many rows count, so that scoring
    and training take the same rows at once, and is a multiple of 8 where the buffer allows: a library may sum fewer
    rows in another order. `whole` rows, the longest sequence of a loss that needs whole ones, are taken at once if
    128 MiB hold them.
    """
    kind = weight.device.type
    size = buffer_bytes or (_CPU_BUFFER_BYTES if kind == "cpu" else BUFFER_BYTES)
    fit = max(1, size // (row_bytes or row_stride(weight.shape[0]) * weight.element_size()))
    if buffer_bytes or kind != "cpu":
        return fit
    least = max(_CPU_FEWEST_ROWS, min(weight.shape[1] // 2, 2 * _CPU_FEWEST_ROWS))
    wanted = min(max(rows // 8, least), _CPU_MOST_ROWS, fit)
    wanted = max(wanted // 8 * 8, min(wanted, 8))
    return max(wanted, whole) if whole <= fit else wanted


def pieces(rows: Tensor, limit: int) -> Iterator[Tensor]:
    """`rows` in pieces of at most `limit`; the last takes some rows of the one before it rather than be a few alone."""
    start, stop = 0, rows.shape[0]
    while start < stop:
        end = min(start + limit, stop)
        if 0 < stop - end < _FEW and limit >= 2 * _FEW:
            end -= _FEW
        yield rows[start:end]
        start = end
