"""Logits of a few rows at a time in bounded buffers, and what their gradient adds to hidden states and head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import backend as backends
from fastrl import cpu_products
from fastrl.chunking import BUFFER_BYTES, row_stride, rows_per_chunk
from fastrl.dtypes import wide
from fastrl.rows import SparseRows

_TILE_BYTES = 2**24  # of the head's weight held in a wider dtype where the library cannot widen by itself
_PLACE_BYTES = 32  # of one place in a row's list: column and gradient, and both again while they are sorted
_LARGE_HEAD = 2**24  # elements: tiles enough that no library need split the sum over the rows (a GPU test asks)
_ROWS_AT_ONCE = 64  # a CPU's library sums a row in an order that depends on how many there are: always as many


class HiddenOptions(NamedTuple):
    """How the hidden level computes: how much at once, how exactly, in which order."""

    buffer_bytes: int  # 0 = the default of `chunking.rows_per_chunk`
    wide_logits: bool = False  # fp32 logits from half-precision operands
    sparse_eps: float | None = None
    capacity: int = 0  # places per row of a sparse gradient
    overlap: bool = False

    def numbers(self) -> list[float]:
        """The same as a list of floats, for an operator."""
        eps = -1.0 if self.sparse_eps is None else self.sparse_eps
        return [float(self.buffer_bytes), float(self.wide_logits), eps, float(self.capacity), float(self.overlap)]

    @classmethod
    def of(cls, numbers: Iterable[float]) -> HiddenOptions:
        size, wide_logits, eps, capacity, overlap = numbers
        return cls(int(size), bool(wide_logits), None if eps < 0 else eps, int(capacity), bool(overlap))

    def rows_per_buffer(self, weight: Tensor, rows: int, whole: int = 0) -> int:
        """How many of `rows` rows of logits fit a buffer, at least one. The same with and without a gradient, trainable
        or frozen, so that scoring takes the same rows at once as training does. `whole` of them belong together.

        All rows of a large bfloat16 head in one product need no fp32 sum of its gradient, which would take as much
        memory as a buffer twice the size takes more."""
        item = weight.element_size()
        # fp32 logits stand beside their gradient in the dtype of the operands
        row = row_stride(weight.shape[0]) * (item + 4 if self.wide_logits else item) + _PLACE_BYTES * self.capacity
        if not (self.buffer_bytes or self.overlap) and _rounds_once(weight) and row * rows <= 2 * BUFFER_BYTES:
            return rows
        return rows_per_chunk(weight, self.buffer_bytes, rows, whole, row * (2 if self.overlap else 1))


class _Buffer(NamedTuple):
    logits: Tensor
    gradient: Tensor
    sparse: SparseRows | None


class Chunk(NamedTuple):
    """Some rows between the products."""

    rows: Tensor  # (r,) the tokens that they score
    span: slice | Tensor  # the same, as a slice where they follow each other: nothing is gathered or scattered then
    hidden: Tensor  # (r, H)
    logits: Tensor  # (r, V)
    gradient: Tensor  # (r, V) of the logits, in their place unless they are fp32 beside half-precision operands
    sparse: SparseRows | None  # the gradient as lists instead


class Projection:
    """The buffers for chunks of rows, the three products, and the gradients that they add up."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: HiddenOptions,
        count: int,  # of rows that will come
        needs: tuple[bool, bool, bool] = (False, False, False),
        backend: Any = None,  # where the gradient may be sparse
        whole: int = 0,  # rows that belong together
    ):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.limit = min(options.rows_per_buffer(weight, hidden.shape[0], whole), max(count, 1))
        self._sparse = None if options.sparse_eps is None or not any(needs) else backends.load_sparse(backend.name)
        buffers = 2 if options.overlap and count > self.limit else 1
        self._buffers = [self._allocate(options, any(needs)) for _ in range(buffers)]
        self._taken = 0
        need_hidden, need_weight, need_bias = needs
        self._whole = 0 < count <= self.limit  # one chunk: nothing is added up
        self.dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        sums, device = wide(weight.dtype), weight.device
        self.dweight = torch.empty(weight.shape, dtype=self._sums(), device=device) if need_weight else None
        self.dbias = torch.zeros(weight.shape[0], dtype=sums, device=device) if need_bias else None
        self._first = True

    def _sums(self) -> torch.dtype:
        """What the head's gradient is summed in: fp32 for a half-precision head, unless one bfloat16 product makes it
        up, which a library rounds once as well. (float16 keeps fp32 for the loss scale to come.)"""
        once = self._whole and self._sparse is None and _rounds_once(self.weight)
        return self.weight.dtype if once else wide(self.weight.dtype)

    def _allocate(self, options: HiddenOptions, grad: bool) -> _Buffer:
        shape, device = (self.limit, row_stride(self.weight.shape[0])), self.weight.device
        dtype = torch.float32 if options.wide_logits else self.weight.dtype
        logits = torch.empty(shape, dtype=dtype, device=device)
        apart = grad and dtype != self.weight.dtype
        gradient = torch.empty(shape, dtype=self.weight.dtype, device=device) if apart else logits
        if self._sparse is None:
            return _Buffer(logits, gradient, None)
        columns = torch.empty((self.limit, options.capacity), dtype=torch.int32, device=device)
        return _Buffer(logits, gradient, SparseRows(columns, torch.empty_like(columns, dtype=wide(dtype))))

    def run(
        self,
        chunks: Iterable[Tensor],
        work: Callable[[Chunk], None],
        *,
        grad: bool,
        dense: bool = False,
        in_order: bool = False,
    ) -> None:
        """Logits, `work` on them, and with `grad` the products of their gradient, for each of several sets of rows.
        `in_order`: the sets are all rows from the first on, in their order.

        With two buffers the logits of a chunk are computed before the gradient of the one before it is taken, so that
        on a GPU `work`, on a stream of its own, runs beside the products. Sums add up in the same order either way.
        """
        beside = _Beside.of(self.weight.device) if len(self._buffers) > 1 else None
        before: Chunk | None = None
        first = 0
        try:
            for rows in chunks:
                last = first + rows.shape[0]
                done = chunk = self._project(rows, slice(first, last) if in_order else rows, dense)
                first = last
                if beside is None:
                    work(chunk)
                else:
                    beside.join()
                    beside.start(work, chunk)
                    done, before = before, chunk
                if grad and done is not None:
                    self._accumulate(done)
        finally:  # also after an error: what the second stream still reads must not be given to others
            if beside is not None:
                beside.join()
        if grad and before is not None:
            self._accumulate(before)

    def _project(self, rows: Tensor, span: slice | Tensor, dense: bool) -> Chunk:
        """The logits of some tokens, in the next buffer."""
        buffer = self._buffers[self._taken % len(self._buffers)]
        self._taken += 1
        count, vocab = rows.shape[0], self.weight.shape[0]
        logits, gradient = buffer.logits[:count, :vocab], buffer.gradient[:count, :vocab]
        lists = None if dense or buffer.sparse is None else SparseRows(*(x[:count] for x in buffer.sparse))
        chunk = Chunk(rows, span, self.hidden[span], logits, gradient, lists)
        if logits.dtype != self.weight.dtype:
            _widening_product(logits, chunk.hidden, self.weight, self.bias)
        elif cpu_products.usable(chunk.hidden, self.weight):
            cpu_products.logits(chunk.hidden, self.weight, self.bias, logits)
        elif self.bias is None:
            torch.mm(chunk.hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, chunk.hidden, self.weight.t(), out=logits)
        return chunk

    def _accumulate(self, chunk: Chunk) -> None:
        """Add what the gradient of a chunk's logits gives."""
        if chunk.sparse is not None:
            self._accumulate_lists(chunk, chunk.sparse)
            return
        if self.dhidden is not None and cpu_products.usable(chunk.gradient, self.weight):
            self.dhidden[chunk.span] = cpu_products.hidden_gradient(chunk.gradient, self.weight)
        elif self.dhidden is not None and isinstance(chunk.span, slice):
            torch.mm(chunk.gradient, self.weight, out=self.dhidden[chunk.span])
        elif self.dhidden is not None:
            self.dhidden[chunk.span] = torch.mm(chunk.gradient, self.weight)
        if self.dbias is not None:
            self.dbias += chunk.gradient.sum(0, dtype=self.dbias.dtype)
        if self.dweight is not None:
            _add_outer(self.dweight, chunk.gradient, chunk.hidden, beta=0 if self._first else 1)
            self._first = False

    def _accumulate_lists(self, chunk: Chunk, sparse: SparseRows) -> None:
        if self.dhidden is not None:
            self._sparse.hidden_gradient(sparse, self.weight, chunk.rows, self.dhidden)
        if self.dweight is not None or self.dbias is not None:
            self._sparse.weight_gradient(sparse, chunk.hidden, self.dweight, self.dbias, self._first)
            self._first = False

    def gradients(self) -> list[Tensor | None]:
        """dhidden, dweight, dbias; a half-precision head keeps its sums in fp32, for the loss scale to come."""
        if self.dweight is not None and self._first:
            self.dweight.zero_()
        keep = self.weight.dtype == torch.float16
        parameters = [g if g is None or keep else g.to(self.weight.dtype) for g in (self.dweight, self.dbias)]
        return [self.dhidden, *parameters]


def _rounds_once(weight: Tensor) -> bool:
    """Whether the head's gradient from one product is the fp32 sum rounded once."""
    return weight.dtype == torch.bfloat16 and weight.numel() >= _LARGE_HEAD and _library_widens(weight)


def _add_outer(total: Tensor, dlogits: Tensor, hidden: Tensor, beta: int) -> None:
    """total ← beta·total, beta 0 or 1, + dlogitsᵀ @ hidden, added in the dtype of `total`."""
    if total.dtype == dlogits.dtype:
        total.addmm_(dlogits.t(), hidden, beta=beta)
    elif _library_widens(dlogits) and beta == 0:
        torch.mm(dlogits.t(), hidden, out_dtype=total.dtype, out=total)
    elif _library_widens(dlogits) and _library_adds_wide():
        torch.addmm(total, dlogits.t(), hidden, beta=beta, out_dtype=total.dtype, out=total)
    elif _library_widens(dlogits):
        total.add_(torch.mm(dlogits.t(), hidden, out_dtype=total.dtype))
    else:
        tile = 4096
        wide_hidden = hidden.to(total.dtype)
        for v in range(0, total.shape[0], tile):
            total[v : v + tile].addmm_(dlogits[:, v : v + tile].t().to(total.dtype), wide_hidden, beta=beta)


def _widening_product(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out ← hidden @ weightᵀ + bias with fp32 sums of half-precision products, rounded nowhere.

    Without a library that does so, by tiles of the vocabulary, so that the head never exists in fp32 as a whole. There
    a row has the same bits among any others."""
    if _library_widens(out):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        rows, block = out.shape[0], _ROWS_AT_ONCE
        wide_hidden = torch.nn.functional.pad(hidden.to(out.dtype), (0, 0, 0, -rows % block))
        step = max(16, _TILE_BYTES // (out.element_size() * weight.shape[1]))
        for v in range(0, weight.shape[0], step):
            tile, here = weight[v : v + step].to(out.dtype).t(), out[:, v : v + step]
            for first in range(0, rows, block):
                product = torch.mm(wide_hidden[first : first + block], tile)
                here[first : first + block] = product[: rows - first]
    if bias is not None:
        out += bias.to(out.dtype)


def _library_widens(x: Tensor) -> bool:
    """Whether torch's products take `out_dtype` here."""
    return x.is_cuda and torch.version.hip is None


@functools.cache
def _library_adds_wide() -> bool:
    """Whether torch's addmm adds such a product to an fp32 matrix: at first its `out_dtype` wanted the matrix in half
    precision (pytorch#154086); 2.11 is the oldest that was seen to take fp32."""
    return torch.__version__ >= "2.11"  # compared as versions, which `TorchVersion` does


class _Beside:
    """Runs the work on a chunk beside what the caller does next: on a second stream, or where there is none at once."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    @classmethod
    def of(cls, device: torch.device) -> _Beside:
        return cls(_stream_of(device) if device.type == "cuda" else None)

    def start(self, work: Callable[[Chunk], None], chunk: Chunk) -> None:
        """Start `work` once what was asked of the current stream so far is done.

        No tensor is recorded on the second stream: the caller joins before it lets go of any, and a recorded buffer
        would not come back to the allocator until the device had caught up."""
        if self._stream is None:
            work(chunk)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work(chunk)

    def join(self) -> None:
        """What is asked of the current stream from now on waits for the work started so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One second stream per device: each would keep memory of its own."""
    return torch.cuda.Stream(device)
