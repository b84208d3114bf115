"""Masked whitening against a loop over the formula."""

from __future__ import annotations

import math

import pytest
import torch
from common import BACKENDS, close

import fastrl

DEVICES = [param for param in BACKENDS if param.id != "triton"]  # plain torch on every device


def by_loop(values, mask, shift_mean, unbiased, eps):
    kept = [v for v, m in zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]
    mean = math.fsum(kept) / max(len(kept), 1)
    squares = math.fsum((v - mean) ** 2 for v in kept)
    variance = squares / max(len(kept) - 1, 1) if unbiased else squares / max(len(kept), 1)
    sigma = math.sqrt(variance + eps) if unbiased else math.sqrt(max(variance, eps))
    out = [
        ((v - mean) / sigma + (0 if shift_mean else mean)) if m else 0.0
        for v, m in zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True)
    ]
    return torch.tensor(out, dtype=torch.float64).view(values.shape)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("backend", DEVICES)
def test_formula(backend, shift_mean, unbiased):
    values = torch.randn(5, 7) * 3 + 2
    mask = torch.rand(5, 7) > 0.4
    dirty = values.masked_fill(~mask, float("nan"))
    got = fastrl.whiten(dirty.to(backend[1]), mask.to(backend[1]), shift_mean=shift_mean, unbiased=unbiased, eps=0.1)
    close(got, by_loop(values, mask, shift_mean, unbiased, 0.1), ulps=8)
    assert (got[~mask] == 0).all() and got.dtype == torch.float32


def test_a_large_mean_costs_no_digits():
    """The mean, near 1000, is rounded to half its last place; that over σ = 0.01 is the bar. A variance from
    E[x²] − E[x]² would have no digit left here."""
    values = torch.randn(4096) * 0.01 + 1000
    want = by_loop(values, torch.ones(4096), True, True, 1e-8)
    error = (fastrl.whiten(values).double() - want).abs().max()
    assert error <= torch.finfo(torch.float32).eps * 1000 / 0.01 / 2


def test_layouts_dtypes_and_a_mask_of_numbers():
    values = torch.randn(6, 4, dtype=torch.bfloat16).t()
    mask = torch.randint(0, 2, (4, 6))
    close(fastrl.whiten(values, mask), by_loop(values, mask, True, True, 1e-8), ulps=16)
    double = fastrl.whiten(values.double(), mask)
    assert double.dtype == torch.float64
    close(double, by_loop(values, mask, True, True, 1e-8), ulps=16, dtype=torch.float64)


@pytest.mark.parametrize("unbiased", [True, False])
def test_no_variance(unbiased):
    one = torch.zeros(2, 3).bool()
    assert (fastrl.whiten(torch.full((2, 3), float("nan")), one, unbiased=unbiased) == 0).all()
    one[1, 2] = True
    assert (fastrl.whiten(torch.full((2, 3), 5.0), one, unbiased=unbiased) == 0).all()
    kept = fastrl.whiten(torch.full((2, 3), 5.0), one, unbiased=unbiased, shift_mean=False)
    assert kept.tolist() == [[0, 0, 0], [0, 0, 5]]
    assert fastrl.whiten(torch.empty(0, 4), unbiased=unbiased).shape == (0, 4)


def test_unmasked_nan_propagates():
    assert fastrl.whiten(torch.tensor([1.0, float("nan"), 2.0])).isnan().all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fastrl.whiten([1.0]), TypeError, "values: expected a torch.Tensor"),
        (lambda: fastrl.whiten(torch.ones(2).long()), TypeError, "values: expected a floating dtype"),
        (lambda: fastrl.whiten(torch.ones(2), torch.ones(3)), ValueError, "mask: expected shape"),
        (lambda: fastrl.whiten(torch.ones(2), eps=0), ValueError, "eps: expected a finite number above 0"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call()
