"""Reward-model losses against loops over their pairs, in fp64, values and gradients."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from common import BACKENDS, close
from torch.utils._python_dispatch import TorchDispatchMode

import fastrl
from fastrl import reward_model

NAN, INF = float("nan"), float("inf")


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 0.5 * (1 + math.tanh(x / 2))


def ranked_by_loop(s, m):
    s, rows = s.double(), 0
    loss, gradient = 0.0, torch.zeros_like(s)
    for b in range(s.shape[0]):
        places = [i for i in range(s.shape[1]) if m[b, i]]
        if len(places) < 2:
            continue
        rows += 1
        for i, j in itertools.combinations(places, 2):
            gap, share = (s[b, i] - s[b, j]).item(), 1 / math.comb(len(places), 2)
            loss += share * softplus(-gap)
            gradient[b, i] -= share * sigmoid(-gap)
            gradient[b, j] += share * sigmoid(-gap)
    return torch.tensor(loss / max(rows, 1)), gradient / max(rows, 1)


# One K per regime: no pair, one pair, a few, and around one and two tiles of the kernel.
@pytest.mark.parametrize("K", [1, 2, 5, 31, 32, 33, 70])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranked(backend, ragged, K):
    name, device = backend
    s = torch.randn(5, K) * 3
    m = torch.rand(5, K) > 0.4 if ragged else torch.ones(5, K).bool()
    if ragged:
        m[1] = False
        m[2] = torch.arange(K) == K // 2
    leaf = s.masked_fill(~m, NAN).to(device).requires_grad_()
    loss = fastrl.ranked_reward_loss(leaf, mask=m.to(device) if ragged else None, backend=name)
    factor = -1.7
    (got,) = torch.autograd.grad(loss * factor, leaf)
    want, gradient = ranked_by_loop(s, m)
    close(loss, want, ulps=16)
    close(got, gradient * factor, ulps=16)
    assert (got.cpu()[~m] == 0).all() and loss.shape == () and loss.dtype == torch.float32


def test_torch_in_chunks(monkeypatch):
    monkeypatch.setattr(reward_model, "_PAIRS", 70)  # 3 places at a time
    s = torch.randn(2, 11).requires_grad_()
    loss = fastrl.ranked_reward_loss(s, backend="torch")
    want, gradient = ranked_by_loop(s.detach(), torch.ones(2, 11))
    close(loss, want, ulps=8)
    close(torch.autograd.grad(loss, s)[0], gradient, ulps=8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_answers_are_the_pairwise_loss(backend):
    name, device = backend
    s = (torch.randn(9, 2, device=device) * 4).requires_grad_()
    ranked = fastrl.ranked_reward_loss(s, backend=name)
    pairwise = fastrl.reward_model_loss(s[:, 0], s[:, 1])
    close(ranked, pairwise, ulps=8)
    close(torch.autograd.grad(ranked, s)[0], torch.autograd.grad(pairwise, s)[0], ulps=8)


@pytest.mark.parametrize("gap", [0.0, 12.0, -12.0, 80.0, 1e4, -1e4, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_and_tiny_losses(backend, gap):
    """Relative, not absolute: a confident pair keeps its digits."""
    name, device = backend
    s = torch.tensor([[gap, 0.0]], device=device, requires_grad=True)
    want = softplus(-gap)
    for loss in (fastrl.ranked_reward_loss(s, backend=name), fastrl.reward_model_loss(s[:, 0], s[:, 1])):
        (got,) = torch.autograd.grad(loss, s)
        assert loss.item() == pytest.approx(want, rel=2e-6, abs=1e-37)
        assert got[0, 0].item() == pytest.approx(-sigmoid(-gap) if gap < 15 else -math.exp(-gap), rel=2e-6, abs=1e-37)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_dtypes_and_empty(backend):
    name, device = backend
    s = torch.randn(4, 6, device=device)
    want = fastrl.ranked_reward_loss(s, backend=name)
    assert torch.equal(fastrl.ranked_reward_loss(s.t().contiguous().t(), backend=name), want)
    low = s.bfloat16().requires_grad_()
    loss = fastrl.ranked_reward_loss(low, mask=torch.ones(4, 6, dtype=torch.int64, device=device), backend=name)
    loss.backward()
    assert low.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    close(loss, ranked_by_loop(low.detach().cpu(), torch.ones(4, 6))[0], ulps=16)
    for shape in ((0, 4), (3, 0), (0, 0), (3, 1)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        loss = fastrl.ranked_reward_loss(x, backend=name)
        assert loss == 0 and torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))
    masked = torch.full((2, 3), NAN, device=device, requires_grad=True)
    loss = fastrl.ranked_reward_loss(masked, mask=torch.zeros(2, 3, device=device), backend=name)
    assert loss == 0 and (torch.autograd.grad(loss, masked)[0] == 0).all()
    assert fastrl.ranked_reward_loss(s.cpu().double(), backend="torch").dtype == torch.float64


class Summed(TorchDispatchMode):
    """Whether each tensor that is added up along dimensions is contiguous."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.sum.dim_IntList:
            self.contiguous.append(args[0].is_contiguous())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", ["scores", "mask", "both", "scores without a mask"])
def test_sums_do_not_depend_on_the_layout(transposed):
    """A GPU chooses the order of a sum by its strides, so that the bits of a layout would be its own."""
    s, m = torch.randn(4, 6), torch.rand(4, 6) > 0.3
    s = s.t().contiguous().t() if transposed != "mask" else s
    m = m.t().contiguous().t() if transposed in ("mask", "both") else m
    m = None if "without" in transposed else m
    with Summed() as sums:
        fastrl.ranked_reward_loss(s.requires_grad_(), mask=m, backend="torch")
    assert len(sums.contiguous) >= 4 and all(sums.contiguous)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unmasked_nan_propagates_to_its_row(backend):
    name, device = backend
    s = torch.randn(3, 5)
    s[1, 2] = NAN
    s = s.to(device).requires_grad_()
    loss = fastrl.ranked_reward_loss(s, backend=name)
    (gradient,) = torch.autograd.grad(loss, s)
    assert loss.isnan() and gradient.isnan().any(-1).tolist() == [False, True, False]
    assert gradient[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_are_added_up_by_the_last_program(backend):
    name, device = backend
    s = torch.randn(600, 3)
    m = torch.rand(600, 3) > 0.3
    got = fastrl.ranked_reward_loss(s.to(device), mask=m.to(device), backend=name)
    close(got, ranked_by_loop(s, m)[0], ulps=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_manners(backend):
    name, device = backend
    s = torch.randn(2, 4, device=device, requires_grad=True)
    loss = fastrl.ranked_reward_loss(s, backend=name)
    first, second = (torch.autograd.grad(loss, s, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()
    with torch.no_grad():
        assert not fastrl.ranked_reward_loss(s, backend=name).requires_grad


class TestPairwise:
    @pytest.mark.parametrize("margin", [None, 0.5, torch.linspace(-1, 1, 7)])
    @pytest.mark.parametrize("center", [0.0, 0.01])
    def test_formula(self, margin, center):
        c, r = torch.randn(7).requires_grad_(), torch.randn(7).requires_grad_()
        loss = fastrl.reward_model_loss(c, r, margin=margin, center_coef=center)
        margins = [0.0 if margin is None else float(margin)] * 7 if not isinstance(margin, torch.Tensor) else margin
        want, dc, dr = 0.0, torch.zeros(7), torch.zeros(7)
        for i in range(7):
            gap, total = (c[i] - r[i]).item() - float(margins[i]), (c[i] + r[i]).item()
            want += (softplus(-gap) + center * total**2) / 7
            dc[i] = (-sigmoid(-gap) + 2 * center * total) / 7
            dr[i] = (sigmoid(-gap) + 2 * center * total) / 7
        close(loss, torch.tensor(want), ulps=8)
        for got, grad in zip(torch.autograd.grad(loss, (c, r)), (dc, dr), strict=True):
            close(got, grad, ulps=8)

    def test_dtypes_and_empty(self):
        x = torch.randn(5).bfloat16()
        assert fastrl.reward_model_loss(x, x).dtype == torch.float32
        assert fastrl.reward_model_loss(x.double(), x).dtype == torch.float64
        assert fastrl.reward_model_loss(x[:0], x[:0], center_coef=0.1) == 0
        assert fastrl.reward_model_loss(torch.tensor([NAN]), torch.tensor([1.0])).isnan()


C, S = torch.zeros(3), torch.zeros(2, 3)
MISUSES = [
    (lambda: fastrl.reward_model_loss(1.0, C), TypeError, "chosen: expected a torch.Tensor"),
    (lambda: fastrl.reward_model_loss(S, S), ValueError, "chosen: expected shape (B,)"),
    (lambda: fastrl.reward_model_loss(C, C[:2]), ValueError, "rejected: expected shape (3,)"),
    (lambda: fastrl.reward_model_loss(C, C, margin=C[:1]), ValueError, "margin: expected shape (3,)"),
    (lambda: fastrl.reward_model_loss(C, C, margin=INF), ValueError, "margin: expected a finite number"),
    (lambda: fastrl.reward_model_loss(C, C, margin="1"), TypeError, "margin: expected a number"),
    (lambda: fastrl.reward_model_loss(C, C, center_coef=-1), ValueError, "center_coef: expected a number ≥ 0"),
    (lambda: fastrl.ranked_reward_loss(C), ValueError, "scores: expected shape (B, K)"),
    (lambda: fastrl.ranked_reward_loss(S.long()), TypeError, "scores: expected a floating dtype"),
    (lambda: fastrl.ranked_reward_loss(S, mask=C), ValueError, "mask: expected shape (2, 3)"),
    (lambda: fastrl.ranked_reward_loss(S, backend="cpu"), ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("call", "error", "words"), MISUSES, ids=[row[2] for row in MISUSES])
def test_misuse(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()
