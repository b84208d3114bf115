"""The reverse recursion that returns and advantages are made of, in plain torch and without a loop over T.

A row is cut in blocks of about √T steps. The steps of a block are taken one after the other, but in all blocks and rows
at once; then the blocks' results are chained, again one step for all rows. That is O(√T) calls instead of O(T), on
numbers that lie side by side and stay in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reverse_scan(factor: Tensor, term: Tensor, last: Tensor, keep: Tensor | None = None) -> Tensor:
    """(B, T): cₜ₊₁ for every t, where cₜ = factor·cₜ₊₁ + termₜ, or cₜ = cₜ₊₁ where `keep` is False, and c_T = last.

    Args:
        factor: (B,).
        term: (B, T); must be 0 where `keep` is False.
        last: (B,).
        keep: (B, T) bool; None = every step counts.
    """
    rows, width = term.shape
    if width == 0:
        return torch.empty_like(term)
    length = 1 << math.ceil(math.log2(width) / 2)
    blocks = -(-width // length)
    b = _by_step(term, length)  # (L, B·blocks)
    x = factor.repeat_interleave(blocks)
    if keep is None:
        a = [x] * length
        product = factor.expand(blocks, -1) ** length
    else:
        # lerp is exact at both ends, and many times faster than where
        a = list(torch.lerp(x.new_ones(()), x, _by_step(keep, length).to(x.dtype)))
        product = _product(a).view(rows, blocks).t()
    alone = _alone(a, b).view(rows, blocks).t()
    carry = _steps(list(product), alone.contiguous(), last)[1:]  # (blocks, B)
    c = _steps(a, b, carry.t().reshape(-1))[1:]
    return c.t().contiguous().view(rows, -1)[:, -width:]


def _by_step(x: Tensor, length: int) -> Tensor:
    """(B, T) -> (L, B·blocks): a step's numbers side by side. A row is filled up with zeros in front, where the last
    steps are, whose results nobody reads."""
    pad = -x.shape[1] % length
    if pad:
        x = torch.nn.functional.pad(x, (pad, 0))
    return x.reshape(-1, length).t().contiguous()


def _product(a: list[Tensor]) -> Tensor:
    """(n,): what a block multiplies its carry by."""
    product = a[0].clone()
    for factor in a[1:]:
        product *= factor
    return product


def _alone(a: list[Tensor], b: Tensor) -> Tensor:
    """(n,): c₀ of blocks whose carry is 0."""
    terms = b.unbind(0)
    c = terms[-1].clone()
    for t in range(len(a) - 2, -1, -1):
        torch.addcmul(terms[t], a[t], c, out=c)
    return c


def _steps(a: list[Tensor], b: Tensor, last: Tensor) -> Tensor:
    """(L + 1, n): c₀ … c_L of blocks with carries `last`."""
    out = torch.empty((b.shape[0] + 1, b.shape[1]), dtype=b.dtype, device=b.device)
    c, terms = out.unbind(0), b.unbind(0)
    c[-1].copy_(last)
    for t in range(len(a) - 1, -1, -1):
        torch.addcmul(terms[t], a[t], c[t + 1], out=c[t])
    return out
