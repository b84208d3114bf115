"""Multiply a gradient by the upstream scalar in place, reading the scalar on the device; nothing moves when it is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tune import CHIPS, architecture, on_device

_BLOCK = 4096
_PROGRAMS = 8  # of 256 threads per multiprocessor: as many as run at once


@triton.jit(do_not_specialize=["numel"])
def _scale_kernel(x_ptr, factor_ptr, numel: tl.int64, BLOCK: tl.constexpr):
    """2 bytes read and 2 written per bf16 element, none when the factor is exactly 1: then all that happens is that as
    many programs as run at once read one number, however large the gradient is."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
            offs = start + tl.arange(0, BLOCK)
            if start + BLOCK <= numel:  # without a mask the accesses are 16 bytes wide
                x = tl.load(x_ptr + offs).to(tl.float32)
                tl.store(x_ptr + offs, (x * factor).to(x_ptr.dtype.element_ty))
            else:
                mask = offs < numel
                x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
                tl.store(x_ptr + offs, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


def programs(numel: int, arch: str) -> int:
    """How many programs share the elements: those that run at once, or fewer. Unknown chips get one per block."""
    blocks = triton.cdiv(numel, _BLOCK)
    return min(blocks, _PROGRAMS * CHIPS[arch].multiprocessors) if arch in CHIPS else blocks


def scale_(x: Tensor, factor: Tensor) -> None:
    """x ← factor·x for a contiguous tensor and a 0-d factor on its device."""
    if x.numel():
        with on_device(x):
            grid = (programs(x.numel(), architecture(x.device)),)
            _scale_kernel[grid](x, factor, x.numel(), _BLOCK, num_warps=8)
