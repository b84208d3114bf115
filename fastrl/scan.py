"""The reverse recursion that returns and advantages are made of, in plain torch and without a loop over T.

A row is cut in blocks of about √T steps. The steps of a block are taken one after the other, but in all blocks and rows
at once; then the blocks' results are chained, again one step for all rows. That is O(√T) calls instead of O(T).

For the numbers of one step to lie side by side the blocks are transposed, and moving single numbers would cost more
than all arithmetic. So the recursion first goes over a window of a few steps, cₜ = a·cₜ₊₄ + b: four move at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_UNIT = 16  # bytes that are moved at once in a transposition


def reverse_scan(factor: Tensor, term: Tensor, last: Tensor, bits: Tensor | None = None) -> Tensor:
    """(B, T): cₜ₊₁ for every t, where cₜ = factor·cₜ₊₁ + termₜ, or cₜ = cₜ₊₁ where `bits` is 0, and c_T = last.

    Args:
        factor: (B,).
        term: (B, T); must be 0 where `bits` is 0.
        last: (B,).
        bits: (B, T) ints as wide as a term, all ones where the step counts and 0 elsewhere; None = every step counts.
    """
    rows, width = term.shape
    if width == 0:
        return torch.empty_like(term)
    window = _UNIT // term.element_size()
    length = max(window, 1 << math.ceil(math.log2(width) / 2))
    blocks = -(-width // length)
    a, b = (_by_step(x, length) for x in _windows(_factors(factor, term, bits), term, window, blocks * length))

    _chain(a, b)
    lasts = last.repeat_interleave(window)
    carry = b[0].clone().view(rows, blocks, window).transpose(0, 1).reshape(blocks, -1)  # c of every first window
    _follow(a[0].view(rows, blocks, window).transpose(0, 1).reshape(blocks, -1), carry, lasts)
    after = torch.cat([carry[1:], lasts[None]])  # what follows each block
    b.addcmul_(a, after.view(blocks, rows, window).transpose(0, 1).reshape(-1))
    return _by_row(b, last, blocks)[:, 1 - width - window : 1 - window or None]


def _factors(factor: Tensor, term: Tensor, bits: Tensor | None) -> Tensor:
    """(B, T): the factor, or exactly 1 where a step does not count; by bits, many times faster than where or lerp."""
    if bits is None:
        return factor[:, None].expand_as(term)
    one = factor.new_ones(()).view(bits.dtype)
    return (bits & (factor.view(bits.dtype) ^ one)[:, None]).bitwise_xor_(one).view(term.dtype)


def _windows(a: Tensor, b: Tensor, window: int, size: int) -> tuple[Tensor, Tensor]:
    """(B, size) a' and b' of cₜ = a'·cₜ₊w + b', by doubling. Behind the end a is 1 and b is 0, so that c stays c_T; in
    front, where the last steps are, both are filled up with zeros, whose results nobody reads."""
    width, shift = b.shape[1], 1
    while shift < window:
        final = 2 * shift == window
        a_wide, b_wide = (b.new_empty((b.shape[0], size if final else width)) for _ in range(2))
        a_new, b_new = a_wide[:, -width:], b_wide[:, -width:]
        torch.addcmul(b[:, :-shift], a[:, :-shift], b[:, shift:], out=b_new[:, :-shift])
        torch.mul(a[:, :-shift], a[:, shift:], out=a_new[:, :-shift])
        a_new[:, -shift:], b_new[:, -shift:] = a[:, -shift:], b[:, -shift:]
        a, b, shift = a_new, b_new, 2 * shift
    for x in (a_wide, b_wide):
        x[:, : size - width] = 0
    return a_wide, b_wide


def _by_step(x: Tensor, length: int) -> Tensor:
    """(B, size) -> (L / w, B·blocks·w): a step's windows side by side."""
    units = x.view(-1, length).view(torch.complex128)
    moved = units.new_empty(units.shape[::-1]).copy_(units.t())
    return moved.view(x.dtype)


def _by_row(c: Tensor, last: Tensor, blocks: int) -> Tensor:
    """(L / w, B·blocks·w) -> (B, size + w), the inverse, with c_T behind the end."""
    units = c.view(torch.complex128)
    rows, steps = last.shape[0], units.shape[0]
    out = units.new_empty((rows, blocks * steps + 1))
    out[:, :-1].view(rows, blocks, steps).copy_(units.view(steps, rows, blocks).permute(1, 2, 0))
    back = out.view(c.dtype)
    back[:, blocks * steps * (back.shape[1] // out.shape[1]) :] = last[:, None]
    return back


def _chain(a: Tensor, b: Tensor) -> None:
    """a, b ← a', b' of cₜ = a'·c_L + b': every step of a block from what follows the block."""
    factors, terms = a.unbind(0), b.unbind(0)
    for t in range(len(terms) - 2, -1, -1):
        terms[t].addcmul_(factors[t], terms[t + 1])
        factors[t].mul_(factors[t + 1])


def _follow(a: Tensor, b: Tensor, last: Tensor) -> None:
    """b ← c₀ … c_{L−1} of cₜ = aₜ·cₜ₊₁ + bₜ and c_L = last."""
    c = last
    for factor, term in zip(reversed(a.unbind(0)), reversed(b.unbind(0)), strict=True):
        c = term.addcmul_(factor, c)
