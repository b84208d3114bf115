"""The sparse gradient in plain torch: lists of kept columns, and the two sums over them that replace dense products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl import torch_backend
from fastrl.dtypes import wide
from fastrl.rows import KeptColumns, RowScores, Scoring, SparseRows

_BLOCK = {"cpu": 2**18}  # elements of a block of rows; on a CPU a core's L2 cache holds a few such
_TILE = 4096  # columns of the head whose gradient is held a second time, on a CPU


def sparsify(
    logits: Tensor,  # (n, V)
    scoring: Scoring,  # with rows
    scores: RowScores,
    dlogp: Tensor,
    dentropy: Tensor | None,
    eps: float,
    out: SparseRows,
    kept: KeptColumns,
) -> None:
    """Step C as lists: of each row the target and the columns with p > eps, in the order of the columns.

    A row with more of them than `out` has room for, or with NaN, gets an empty list and the count C + 1."""
    n, vocab = logits.shape
    tokens, capacity = scoring.rows, out.columns.shape[1]
    live = dlogp[tokens] != 0 if dentropy is None else (dlogp[tokens] != 0) | (dentropy[tokens] != 0)
    broken = scores.logp[tokens].isnan()
    list_columns = list_by_search if logits.device.type == "cpu" else list_by_position
    counts, dropped = torch.empty_like(tokens, dtype=torch.int32), torch.empty_like(scores.logp[tokens])
    for here in _blocks(n, vocab, logits.device):
        p = _probabilities(logits[here], scoring, scores, tokens[here])
        targets = scoring.ids[tokens[here], None].clamp(0, vocab - 1)
        counts[here] = list_columns((p > eps).scatter_(1, targets, True), p, out.columns[here])
        dropped[here] = p.sum(1)
    counts.masked_fill_(~live, 0).masked_fill_((counts > capacity) | broken, capacity + 1)
    listed = (counts > 0) & (counts <= capacity)
    kept.number[tokens], kept.dropped[tokens] = counts, dropped.masked_fill_(~listed, 0)
    out.columns.masked_fill_(~listed[:, None], vocab)
    _differentiate_kept(logits, scoring, scores, dlogp, dentropy, out)


def _blocks(n: int, width: int, device: torch.device) -> Iterator[slice]:
    step = max(1, _BLOCK.get(device.type, 2**24) // max(width, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _probabilities(logits: Tensor, scoring: Scoring, scores: RowScores, tokens: Tensor) -> Tensor:
    """(r, V) softmax of some rows."""
    u = logits.to(wide(logits.dtype))
    if scoring.softcap is not None:
        u = torch.tanh(u * scoring.inner) * scoring.softcap
    factor = scoring.factor if scoring.temperature is None else scoring.factor / scoring.temperature[tokens, None]
    return (u - scores.row_max[tokens, None]).mul_(factor).sub_(scores.log_sum[tokens, None]).exp_()


def list_by_search(keep: Tensor, p: Tensor, columns: Tensor) -> Tensor:
    """Write the set columns of every row, in order, into its list, as many as there is room for; the rest of the list
    becomes V. Returns how many are set; their p becomes 0."""
    (r, vocab), capacity = keep.shape, columns.shape[1]
    rows, found = keep.nonzero().unbind(1)
    counts = torch.bincount(rows, minlength=r)
    place = torch.arange(rows.shape[0], device=keep.device) - (counts.cumsum(0) - counts)[rows]
    fits = place < capacity
    columns.fill_(vocab)
    columns[rows[fits], place[fits]] = found[fits].to(columns.dtype)
    p[rows, found] = 0
    return counts.to(columns.dtype)


def list_by_position(keep: Tensor, p: Tensor, columns: Tensor) -> Tensor:
    """The same without waiting for the device: what has no place goes to one place more, which is dropped."""
    vocab, capacity = keep.shape[1], columns.shape[1]
    place = keep.cumsum(1, dtype=torch.int32)
    counts = place[:, -1].clone()
    place = place.sub_(1).masked_fill_(~keep, capacity).clamp_max_(capacity)
    every = torch.arange(vocab, dtype=columns.dtype, device=keep.device).expand_as(place)
    longer = torch.full((keep.shape[0], capacity + 1), vocab, dtype=columns.dtype, device=keep.device)
    columns.copy_(longer.scatter_(1, place.long(), every)[:, :capacity])
    p.masked_fill_(keep, 0)
    return counts


def _differentiate_kept(
    logits: Tensor, scoring: Scoring, scores: RowScores, dlogp: Tensor, dentropy: Tensor | None, out: SparseRows
) -> None:
    """The gradients of the listed columns: step C on the (n, C) logits that they hold, empty places at −inf."""
    columns = out.columns.long()
    empty = columns == logits.shape[1]
    listed = logits.gather(1, columns.clamp_max(logits.shape[1] - 1)).masked_fill_(empty, float("-inf"))
    target = (columns == scoring.ids[scoring.rows, None]).int().argmax(1)
    places = torch.zeros_like(scoring.ids).index_copy_(0, scoring.rows, target)
    torch_backend.differentiate(listed, scoring._replace(ids=places), scores, dlogp, dentropy, out.gradients)
    out.gradients.masked_fill_(empty, 0)  # the row of an empty list has its target nowhere


def _width(columns: Tensor, vocab: int) -> int:
    """How many places of the lists are in use, where knowing it costs no synchronisation; else all."""
    if columns.device.type != "cpu" or not columns.numel():
        return columns.shape[1]
    return int((columns < vocab).sum(1).max())


def hidden_gradient(sparse: SparseRows, weight: Tensor, rows: Tensor, dhidden: Tensor) -> None:
    """dhidden[rows] ← Σₖ gₖ·weight[columnₖ], summed in fp32; empty lists give 0."""
    width = _width(sparse.columns, weight.shape[0])
    columns = sparse.columns[:, :width].long().clamp_max_(weight.shape[0] - 1)
    gradients = sparse.gradients[:, :width]
    if gradients.dtype == weight.dtype and width:
        dhidden[rows] = F.embedding_bag(columns, weight, mode="sum", per_sample_weights=gradients)
        return
    for here in _blocks(columns.shape[0], width * weight.shape[1], weight.device):
        gathered = weight[columns[here]].to(gradients.dtype)
        dhidden[rows[here]] = torch.bmm(gradients[here, None], gathered)[:, 0].to(dhidden.dtype)


def weight_gradient(
    sparse: SparseRows, hidden: Tensor, dweight: Tensor | None, dbias: Tensor | None, first: bool
) -> None:
    """dweight[v] += Σ g·hidden[row], dbias[v] += Σ g over the entries of column v, sorted by column; `first`: dweight
    has nothing in it yet. Off a CPU a second dweight exists meanwhile."""
    like = dbias if dweight is None else dweight
    vocab, capacity = like.shape[0], sparse.columns.shape[1]
    columns, order = sparse.columns.flatten().sort(stable=True)
    offsets = torch.searchsorted(columns, torch.arange(vocab + 1, dtype=columns.dtype, device=columns.device))
    gradients = sparse.gradients.flatten()[order].to(like.dtype)
    rows = order // capacity
    source = hidden.to(like.dtype)
    for bag, entries, starts in _column_tiles(offsets):
        taken, shares = rows[entries], gradients[entries]
        for total, values in ((dweight, source), (dbias, torch.ones_like(source[:, :1]))):
            if total is None:
                continue
            sums = F.embedding_bag(
                taken, values, starts, mode="sum", per_sample_weights=shares, include_last_offset=True
            )
            here = total[bag]
            here.copy_(sums) if first and total is dweight else here.add_(sums.view_as(here))


def _column_tiles(offsets: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(columns, their entries, where each column's entries start among them); one tile where bounds are not known."""
    vocab = offsets.shape[0] - 1
    if offsets.device.type != "cpu":
        yield slice(0, vocab), slice(None), offsets
        return
    for start in range(0, vocab, _TILE):
        stop = min(start + _TILE, vocab)
        low, high = int(offsets[start]), int(offsets[stop])
        yield slice(start, stop), slice(low, high), offsets[start : stop + 1] - low
