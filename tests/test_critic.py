"""The value loss against a loop over its formula, its gradient, its metrics; TD losses."""

from __future__ import annotations

import math
import re

import pytest
import torch
from common import BACKENDS, close
from test_returns import n_step_by_loop

import fastrl

NAN = float("nan")
DEVICES = [param for param in BACKENDS if param.id != "triton"]  # plain torch on every device
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def half_square(x, delta):
    return x * x / 2 if delta is None or abs(x) <= delta else delta * (abs(x) - delta / 2)


def slope(x, delta):
    return x if delta is None or abs(x) <= delta else math.copysign(delta, x)


def by_loop(v, r, old, m, clip, delta, aggregation, max_length=None, normalizer=None):
    """Loss, gradient, and the fraction of tokens where the clipped loss is greater."""
    v, r, old = v.double(), r.double(), old.double()
    lengths = m.sum(-1)
    sequences = max(int((lengths > 0).sum()), 1)
    count = {"token-mean": max(int(m.sum()), 1), "token-sum": 1}.get(aggregation, sequences)
    loss, gradient, replaced = 0.0, torch.zeros_like(v), 0
    for i, t in m.nonzero().tolist():
        weight = 1 / (normalizer or count)
        if aggregation == "seq-mean-token-mean":
            weight /= int(lengths[i])
        if aggregation == "seq-mean-token-sum-norm":
            weight /= max_length
        x = (v[i, t] - r[i, t]).item()
        value, grad = half_square(x, delta), slope(x, delta)
        if clip is not None:
            low, high = (old[i, t] - clip).item(), (old[i, t] + clip).item()
            held = min(max(v[i, t].item(), low), high)
            other = half_square(held - r[i, t].item(), delta)
            if other > value:
                value, grad, replaced = other, slope(x, delta) if held == v[i, t] else 0.0, replaced + 1
        loss += weight * value
        gradient[i, t] = weight * grad
    return torch.tensor(loss), gradient, replaced / max(int(m.sum()), 1)


def make(B=5, T=11):
    m = torch.rand(B, T) > 0.3
    m[1] = False
    return torch.randn(B, T) * 2, torch.randn(B, T), torch.randn(B, T), m


def dirty(m, *tensors):
    return [x.masked_fill(~m, NAN) for x in tensors]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("delta", [None, 0.7])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("backend", DEVICES)
def test_value_loss(backend, clip, delta, aggregation):
    device = backend[1]
    v, r, old, m = make()
    v_, r_, old_ = (x.to(device) for x in dirty(m, v, r, old))
    v_.requires_grad_()
    length = 9 if aggregation == "seq-mean-token-sum-norm" else None
    loss = fastrl.value_loss(
        v_, r_, old_values=None if clip is None else old_, clip=clip, huber_delta=delta, mask=m.to(device),
        aggregation=aggregation, max_length=length,
    )  # fmt: skip
    (got,) = torch.autograd.grad(loss, v_)
    want, gradient, _ = by_loop(v, r, old, m, clip, delta, aggregation, length)
    close(loss, want, ulps=8)
    close(got, gradient, ulps=8)
    assert loss.shape == () and loss.dtype == torch.float32 and (got.cpu()[~m] == 0).all()


def test_micro_batches_add_up_with_a_normalizer():
    v, r, old, m = make(6)
    given = {"clip": 0.5, "aggregation": "token-mean", "normalizer": torch.tensor(40)}
    whole = fastrl.value_loss(v, r, old_values=old, mask=m, **given)
    parts = [fastrl.value_loss(v[p], r[p], old_values=old[p], mask=m[p], **given) for p in (slice(2), slice(2, 6))]
    close(sum(parts), whole, ulps=8)
    close(whole, by_loop(v, r, old, m, 0.5, None, "token-mean", normalizer=40)[0], ulps=8)


def test_a_tie_has_the_gradient_of_the_unclipped_loss():
    """R in the middle of V and the clip bound; and V on the bound itself."""
    v = torch.tensor([[1.0, 0.5]], requires_grad=True)
    loss = fastrl.value_loss(v, torch.tensor([[0.75, 0.0]]), old_values=torch.zeros(1, 2), clip=0.5)
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient.tolist() == [[0.125, 0.25]]


def test_dtypes_layouts_and_empty_batches():
    v, r, _, m = make(4, 6)
    close(fastrl.value_loss(v.t(), r.t(), mask=m.t()), fastrl.value_loss(v, r, mask=m), ulps=4)
    low = v.bfloat16().requires_grad_()
    loss = fastrl.value_loss(low, r, mask=m.int())
    loss.backward()
    assert loss.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    close(loss, by_loop(low.detach(), r, r, m, None, None, "token-mean")[0], ulps=8)
    assert fastrl.value_loss(v.double(), r).dtype == torch.float64
    for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        empty = torch.full((2, 3), NAN, requires_grad=True)
        loss = fastrl.value_loss(empty, empty.detach(), mask=torch.zeros(2, 3), aggregation=aggregation)
        assert loss == 0 and (torch.autograd.grad(loss, empty)[0] == 0).all()
    assert fastrl.value_loss(torch.empty(0, 3), torch.empty(0, 3)) == 0


@pytest.mark.parametrize("place", range(3))
def test_unmasked_nan_propagates(place):
    tensors = [torch.randn(2, 3) for _ in range(3)]
    tensors[place][0, 1] = NAN
    v, r, old = tensors
    loss = fastrl.value_loss(v.requires_grad_(), r, old_values=old, clip=0.1)
    assert loss.isnan() and torch.autograd.grad(loss, v)[0][0, 1].isnan()


class TestMetrics:
    def test_values(self):
        v, r, old, m = make()
        got = fastrl.value_metrics(*dirty(m, v, r), old_values=dirty(m, old)[0], clip=0.5, mask=m)
        loss, _, fraction = by_loop(v, r, old, m, 0.5, None, "token-mean")
        kept_v, kept_r = v[m].double(), r[m].double()
        want = {
            "value_loss": loss.item(),
            "value_clip_fraction": fraction,
            "explained_variance": (1 - ((kept_r - kept_v) ** 2).mean() / kept_r.var(correction=0)).item(),
            "value_mean": kept_v.mean().item(),
            "return_mean": kept_r.mean().item(),
            "tokens": int(m.sum()),
        }
        assert 0 < fraction < 1 and set(got) == set(want) and len(got) == 6
        assert got.to_floats() == pytest.approx(want, rel=1e-5)
        assert all(value.dtype == torch.float32 and value.shape == () for value in got.values())

    def test_returns_of_little_variance(self):
        """E[R²] − E[R]² in fp32 would have no digit left."""
        r = 100 + 0.01 * torch.randn(4, 500)
        v = r + 0.005 * torch.randn(4, 500)
        want = 1 - ((r.double() - v.double()) ** 2).mean() / r.double().var(correction=0)
        close(fastrl.value_metrics(v, r)["explained_variance"], want.float(), ulps=64)

    def test_merging_is_exact(self):
        v, r, old, m = make(6)
        whole = fastrl.value_metrics(v, r, old_values=old, clip=0.5, mask=m)
        parts = [
            fastrl.value_metrics(v[p], r[p], old_values=old[p], clip=0.5, mask=m[p]) for p in (slice(2), slice(2, 6))
        ]
        assert parts[0].merge(parts[1]).to_floats() == pytest.approx(whole.to_floats(), rel=1e-6)
        with pytest.raises(ValueError, match="the same metrics"):
            whole.merge(fastrl.value_metrics(v, r))

    def test_nothing_valid_and_no_variance(self):
        empty = fastrl.value_metrics(torch.full((1, 2), NAN), torch.zeros(1, 2), mask=torch.zeros(1, 2))
        assert set(empty.to_floats().values()) == {0.0} and "value_clip_fraction" not in empty
        assert fastrl.value_metrics(torch.zeros(1, 2), torch.ones(1, 2))["explained_variance"] == 0
        with pytest.raises(KeyError, match="this batch has value_loss"):
            empty["value_clip_fraction"]
        assert repr(empty).startswith("ValueMetrics(value_loss")


@pytest.mark.parametrize("n", [1, 4])
def test_td_loss_is_semi_gradient(n):
    r, v, _, m = make()
    bootstrap = torch.randn(5)
    v_, r_ = dirty(m, v, r)
    v_.requires_grad_()
    loss = fastrl.td_loss(v_, r_, n=n, gamma=0.9, mask=m, bootstrap=bootstrap, huber_delta=0.8)
    target = n_step_by_loop(r, v, m, n, 0.9, bootstrap)
    want, gradient, _ = by_loop(v, target, v, m, None, 0.8, "token-mean")
    close(loss, want, ulps=16)
    close(torch.autograd.grad(loss, v_)[0], gradient, ulps=16)


V = torch.zeros(2, 3)
MISUSES = [
    (lambda: fastrl.value_loss(V[0], V[0]), ValueError, "values: expected shape (B, T)"),
    (lambda: fastrl.value_loss(V, V[:, :2]), ValueError, "returns: expected shape (2, 3)"),
    (lambda: fastrl.value_loss(V, None), TypeError, "returns: expected a torch.Tensor"),
    (lambda: fastrl.value_loss(V, V.clone().requires_grad_()), ValueError, "returns: expected a tensor without"),
    (lambda: fastrl.value_loss(V, V, clip=0.2), ValueError, "clip: expected both clip and old_values"),
    (lambda: fastrl.value_loss(V, V, old_values=V), ValueError, "clip: expected both clip and old_values"),
    (lambda: fastrl.value_loss(V, V, old_values=V, clip=0), ValueError, "clip: expected a finite number above 0"),
    (lambda: fastrl.value_loss(V, V, huber_delta=-1), ValueError, "huber_delta: expected a finite number above 0"),
    (lambda: fastrl.value_loss(V, V, mask=V[0]), ValueError, "mask: expected shape (2, 3)"),
    (lambda: fastrl.value_loss(V, V, aggregation="mean"), ValueError, "aggregation: expected one of"),
    (lambda: fastrl.value_loss(V, V, aggregation="seq-mean-token-sum-norm"), ValueError, "max_length: "),
    (lambda: fastrl.value_loss(V, V, aggregation="token-sum", normalizer=2), ValueError, "normalizer: expected None"),
    (lambda: fastrl.value_metrics([0.0], V), TypeError, "values: expected a torch.Tensor"),
]


@pytest.mark.parametrize(("call", "error", "words"), MISUSES, ids=[row[2] for row in MISUSES])
def test_misuse(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()
