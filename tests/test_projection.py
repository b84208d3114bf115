"""What the hidden level asks of torch's library where only a GPU would answer, with an answer in its place."""

from __future__ import annotations

import pytest
import torch

import fastrl
from fastrl import projection


@pytest.fixture(params=[True, False], ids=["adds", "only-multiplies"])
def calls(request, monkeypatch):
    """A library that multiplies half precision into fp32, and adds to fp32 only from torch 2.11 on."""
    made = []
    mm = torch.mm

    def wide_mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        made.append("mm")
        product = mm(a.to(out_dtype), b.to(out_dtype))
        return product if out is None else out.copy_(product)

    def wide_addmm(total, a, b, *, beta, out_dtype, out):
        assert request.param and beta == 1
        made.append("addmm")
        return out.copy_(total + mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(projection, "_library_widens", lambda x: True)
    monkeypatch.setattr(projection, "_library_adds_wide", lambda: request.param)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    return made, ["mm", "addmm" if request.param else "mm"]


def test_a_half_precision_head_adds_up_in_fp32(calls):
    """The first product is written, later ones are added; torch before 2.11 needs a product apart for that
    (pytorch#154086)."""
    made, expected = calls
    torch.manual_seed(0)
    total = torch.full((9, 4), torch.nan)
    chunks = [(torch.randn(5, 9).half(), torch.randn(5, 4).half()) for _ in range(2)]
    for beta, (dlogits, hidden) in enumerate(chunks):
        projection._add_outer(total, dlogits, hidden, beta)
    assert made == expected
    torch.testing.assert_close(total, sum(g.float().t() @ h.float() for g, h in chunks))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks torch's own CPU library")
def test_torch_takes_the_arguments():
    """The CPU refuses the products themselves, not the way they are asked for."""
    half, wide = torch.zeros(2, 2).half(), torch.zeros(2, 2)
    with pytest.raises(NotImplementedError):
        torch.mm(half, half, out_dtype=torch.float32, out=wide)
    with pytest.raises(NotImplementedError):
        torch.addmm(wide, half, half, beta=1, out_dtype=torch.float32, out=wide)


def test_an_error_leaves_nothing_running_beside(monkeypatch):
    """Buffers go back to the allocator when an error ends the call: the second stream must have been joined before."""
    order = []

    class Beside(projection._Beside):
        def join(self):
            order.append("join")

        def start(self, work, chunk):
            order.append("start")
            if order.count("start") == 2:
                raise RuntimeError("a failing launch")
            work(chunk)

    monkeypatch.setattr(projection._Beside, "of", lambda device: Beside(None))
    hidden = torch.randn(1, 6, 4, requires_grad=True)
    rollouts = fastrl.Rollouts(torch.zeros(1, 6).long(), advantages=torch.ones(1))
    with pytest.raises(RuntimeError, match="a failing launch"):
        fastrl.policy_loss_from_hidden(
            hidden, fastrl.LMHead(torch.randn(16, 4)), rollouts, buffer_bytes=2 * 2 * 16 * 4, overlap=True,
            backend="torch",
        )  # fmt: skip
    assert order[-2:] == ["start", "join"]
