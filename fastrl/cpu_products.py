"""Products with the head on processors whose default library for them is not the fastest that torch brings.

torch multiplies fp32 matrices with MKL. On an AMD processor with AVX-512 oneDNN, which every torch for x86 brings too,
takes less time for the products of a chunk of rows with the head (bench/NOTES.md). Only its linear operator, which
Inductor uses, takes plain fp32 tensors. The head's gradient stays with MKL: that product is as fast there, and MKL adds
it to the sum in place.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
_FEWEST_ROWS = 16  # a remainder of rows is not worth a second library
_SMALLEST_HEAD = 2**20  # elements; at 2^19 nothing is gained
_TILE_BYTES = 2**20  # of logits on their way through the cache to their buffer: the operator writes into none itself


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether these products are the faster ones for (r, H) hidden states or (r, V) gradients and a (V, H) head."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[0] >= _FEWEST_ROWS
        and weight.numel() >= _SMALLEST_HEAD
        # Of a padded matrix the operator makes a copy, of other strides it may take minutes.
        and x.is_contiguous()
        and weight.is_contiguous()
        and bool(torch.backends.mkldnn.enabled)
        and _faster_here()
    )


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out ← hidden @ weightᵀ + bias: (r, H), (V, H), (V,) -> (r, V), rows of `out` may be padded."""
    step = max(64, _TILE_BYTES // (out.element_size() * hidden.shape[0]) // 64 * 64)
    for v in range(0, weight.shape[0], step):
        here = slice(v, v + step)
        out[:, here] = _linear(hidden, weight[here], None if bias is None else bias[here])


def hidden_gradient(dlogits: Tensor, weight: Tensor) -> Tensor:
    """dlogits @ weight: (r, V), (V, H) -> (r, H)."""
    return _linear(dlogits, weight.t(), None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _faster_here() -> bool:
    """Only where it was measured; and where the operator, which torch calls private, is the one that we know."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() == "AuthenticAMD"
        and operator is not None
        and str(operator.default._schema) == _SCHEMA
    )


def _vendor() -> str:
    """Who made the processor, "" where the system does not say so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
