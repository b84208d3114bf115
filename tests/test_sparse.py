"""The sparse gradient of the hidden level: the columns it keeps, what the rest costs, and the rows without room."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from common import BACKENDS, close, make_batch, on_cpu, wide_flat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastrl
from fastrl import reference

TOKEN = fastrl.GRPO.replace(kl_coef=0.1, entropy_coef=0.02)
# One for each plan: any rows, whole sequences, the whole batch.
PLANS = {"token": TOKEN, "sequence": fastrl.GSPO.replace(entropy_coef=0.05), "batch": fastrl.KL_COV}
SPECS = [pytest.param(spec, id=name) for name, spec in PLANS.items()]
EPS = 0.02


class Truth(NamedTuple):
    gradients: list[Tensor]
    dropped: float
    over: int  # rows without room
    rows: int  # rows with a gradient
    exact: list[Tensor]
    bound: list[float]  # on the largest entry of exact − gradients


def truth(batch, spec, eps, capacity=10**9, clear=True) -> Truth:
    """fp64: autograd to the logits, columns dropped there, autograd from there on; and the documented bound."""
    rollouts = on_cpu(batch.rollouts)
    flat = wide_flat(rollouts, spec)
    valid = flat.valid()
    leaves = [x.detach().cpu().double() for x in (batch.hidden, batch.weight, batch.bias)]
    leaves[0] = torch.where(valid.view(rollouts.shape)[..., None], leaves[0], 0.0)
    leaves = [x.requires_grad_() for x in leaves]
    raw = torch.nn.functional.linear(*leaves)
    z = raw * batch.logit_scale
    z = z if batch.softcap is None else batch.softcap * torch.tanh(z / batch.softcap)
    temperature = batch.temperature.cpu().double() if isinstance(batch.temperature, Tensor) else batch.temperature
    logps, entropy = reference.logprobs(z, rollouts.token_ids, valid.view(rollouts.shape), temperature)
    loss, _ = reference.token_loss(logps.reshape(-1), entropy.reshape(-1), flat, None, spec)
    coefficients = torch.autograd.grad(
        loss, (logps, entropy), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    c, e = (x.detach().reshape(-1) for x in coefficients)
    (dense,) = torch.autograd.grad(loss, raw, retain_graph=True)
    T = temperature if not isinstance(temperature, Tensor) else temperature[..., None]
    p = (z.detach() / T).softmax(-1).flatten(0, -2)
    assert not clear or not eps or ((p / eps).log().abs() > 1e-5).all(), "a probability is too close to eps to call"
    ids = rollouts.token_ids.reshape(-1).clamp_min(0)
    keep = (p > eps).scatter(1, ids[:, None], True)
    over = keep.sum(1) > capacity
    keep |= over[:, None]
    has = valid & ((c != 0) | (e != 0))
    delta = (p * ~keep).sum(1)
    kept = torch.autograd.grad(raw, leaves, dense * keep.view_as(dense), retain_graph=True)
    exact = torch.autograd.grad(raw, leaves, dense)
    f = (batch.logit_scale / T).reshape(-1) if isinstance(T, Tensor) else torch.full_like(c, batch.logit_scale / T)
    tail = torch.where(delta > 0, (p.shape[1] / delta).log(), 0.0) + entropy.detach().reshape(-1)
    off = f * (c.abs() + e.abs() * tail) * delta  # per row, over all its columns together
    hidden = leaves[0].detach().abs().flatten(0, -2).amax(1)
    bound = [(off * leaves[1].detach().abs().max()).max(), (off * hidden).sum(), off.sum()]
    mean = float(delta[has].sum() / max(int(has.sum()), 1))
    return Truth(
        [g.detach() for g in kept],
        mean,
        int((over & has).sum()),
        int(has.sum()),
        list(exact),
        [float(b) for b in bound],
    )


def run(batch, spec, backend, needs=(True, True, True), **options):
    leaves = [x.clone().requires_grad_(n) for x, n in zip((batch.hidden, batch.weight, batch.bias), needs, strict=True)]
    out = fastrl.policy_loss_from_hidden(
        leaves[0],
        batch.head(*leaves[1:]),
        batch.rollouts,
        spec,
        temperature=batch.temperature,
        backend=backend,
        **options,
    )
    if any(needs):
        out.loss.backward()
    return out, [leaf.grad for leaf in leaves]


def buffer(rows, capacity, vocab=48):
    """Bytes for some rows of fp32 logits with their lists."""
    return rows * (vocab * 4 + 32 * capacity)


NAMES = ("dhidden", "dweight", "dbias")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_every_column_kept_it_is_the_exact_gradient(backend, spec):
    name, device = backend
    batch = make_batch(device=device, scale=3.0)
    want = truth(batch, spec, 0.0)
    out, gradients = run(batch, spec, name, sparse_eps=0.0, sparse_capacity=64, buffer_bytes=buffer(7, 64))
    for got, exact, what in zip(gradients, want.exact, NAMES, strict=True):
        close(got, exact, ulps=400, what=what)
    assert out.metrics["dropped_mass"].item() == 0.0


@pytest.mark.parametrize("transform", ["plain", "softcap", "temperature"])
@pytest.mark.parametrize("capacity", [16, 4])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_columns(backend, spec, capacity, transform):
    """The gradient is that of the kept columns; rows with more of them than places have the exact one."""
    name, device = backend
    batch = make_batch(device=device, scale=3.0, softcap=12.0 if transform == "softcap" else None, logit_scale=1.2)
    if transform == "temperature":
        batch.temperature = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)).to(device) + 0.5
    want = truth(batch, spec, EPS, capacity)
    assert (0 < want.over < want.rows) == (capacity == 4)
    out, gradients = run(
        batch, spec, name, sparse_eps=EPS, sparse_capacity=capacity, buffer_bytes=buffer(7, capacity)
    )  # fmt: skip
    for got, kept, exact, bound, what in zip(gradients, want.gradients, want.exact, want.bound, NAMES, strict=True):
        close(got, kept, ulps=400, what=what)
        assert 0 < (kept - exact).abs().max() <= bound, what
    torch.testing.assert_close(out.metrics["dropped_mass"].item(), want.dropped, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, spec, dtype):
    """Operands whose logits have no rounding, so that the same columns are kept: then only the results are rounded."""
    name, device = backend
    batch = make_batch(device=device, rollout=False)
    eighths = [
        (x.nan_to_num() * 8 * s).round() / 8 for x, s in ((batch.hidden, 0.3), (batch.weight, 4.0), (batch.bias, 1.0))
    ]
    batch.hidden, batch.weight, batch.bias = (x.clamp(-2, 2).to(dtype) for x in eighths)
    batch.hidden = batch.hidden.sign()
    want = truth(batch, spec, EPS, 4)
    assert 0 < want.over < want.rows
    _, gradients = run(batch, spec, name, sparse_eps=EPS, sparse_capacity=4, buffer_bytes=buffer(7, 4))
    for got, kept, what in zip(gradients, want.gradients, NAMES, strict=True):
        assert got.dtype == dtype
        close(got, kept, ulps=4, dtype=dtype, what=what)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(1e-4, 0.3),
    scale=st.floats(0.1, 8.0),
    softcap=st.sampled_from([None, 3.0]),
    entropy=st.sampled_from([0.0, 0.1]),
)
def test_the_error_is_bounded_by_the_dropped_mass(seed, eps, scale, softcap, entropy):
    """|error of dlogits|₁ ≤ f·(|c| + |e|·(log(V/δ) + H))·δ for every row, through the head."""
    batch = make_batch(seed=seed, scale=scale, softcap=softcap, dtype=torch.float64)
    spec = fastrl.GRPO.replace(entropy_coef=entropy)
    want = truth(batch, spec, eps, clear=False)
    _, gradients = run(batch, spec, "torch", sparse_eps=eps)
    for got, exact, most in zip(gradients, want.exact, want.bound, strict=True):
        assert (got - exact).abs().max() <= most * (1 + 1e-6) + 1e-14


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_input_alone(backend, needs):
    name, device = backend
    batch = make_batch(device=device, scale=3.0)
    want = truth(batch, TOKEN, EPS, 4)
    _, gradients = run(batch, TOKEN, name, needs, sparse_eps=EPS, sparse_capacity=4, buffer_bytes=buffer(7, 4))
    for got, kept, need, what in zip(gradients, want.gradients, needs, NAMES, strict=True):
        assert (got is not None) == need
        if need:
            close(got, kept, ulps=400, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_is_exact_and_the_bits_are_the_same_again(backend):
    name, device = backend
    batch = make_batch(device=device, scale=3.0)
    dense, _ = run(batch, TOKEN, name)
    options = {"sparse_eps": EPS, "sparse_capacity": 4}
    first, second = run(batch, TOKEN, name, **options), run(batch, TOKEN, name, **options)
    close(first[0].loss, dense.loss, ulps=8)
    assert torch.equal(first[0].logps, dense.logps)
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_nan_goes_the_exact_way(backend):
    """NaN at a token that counts reaches the gradients that the exact way gives it, no others."""
    name, device = backend
    batch = make_batch(device=device, garbage=False)
    batch.hidden[0, batch.rollouts.mask[0].nonzero()[0, 0], 3] = float("nan")
    _, exact = run(batch, TOKEN, name)
    _, gradients = run(batch, TOKEN, name, sparse_eps=EPS)
    for a, b in zip(gradients, exact, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and a.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_mass_merges(backend):
    """Over micro-batches as over the whole; absent unless the gradient is sparse; 0 where no gradient is wanted."""
    name, device = backend
    batch = make_batch(device=device, scale=3.0, rewards=False)
    spec = fastrl.DAPO
    options = {"sparse_eps": EPS, "normalizer": 13.0}
    whole, _ = run(batch, spec, name, **options)
    parts = []
    for start in (0, 2):
        here = slice(start, start + 2)
        r = batch.rollouts
        rollouts = fastrl.Rollouts(r.token_ids[here], r.mask[here], r.advantages[here], old_logps=r.old_logps[here])
        hidden = batch.hidden[here].clone().requires_grad_()
        parts.append(
            fastrl.policy_loss_from_hidden(
                hidden, batch.head(), rollouts, spec, temperature=0.7, backend=name, **options
            ).metrics
        )
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(merged["dropped_mass"], whole.metrics["dropped_mass"], rtol=1e-6, atol=0)
    assert whole.metrics["dropped_mass"] > 0
    plain, _ = run(batch, spec, name, normalizer=13.0)
    assert "dropped_mass" not in plain.metrics
    unwanted, _ = run(batch, spec, name, (False, False, False), **options)
    assert unwanted.metrics["dropped_mass"].item() == 0.0


def test_lists_without_waiting_for_the_device():
    """What the torch backend does off a CPU equals what it does on one."""
    from fastrl import torch_sparse

    keep = torch.rand(9, 40) > 0.8
    keep[3] = False
    room = int(keep.sum(1).max()) - 1  # too few for one row
    results = []
    for write in (torch_sparse.list_by_search, torch_sparse.list_by_position):
        p, columns = torch.ones(9, 40), torch.empty((9, room), dtype=torch.int32)
        results.append((write(keep, p, columns), p, columns))
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)
    counts, p, columns = results[0]
    assert torch.equal(p == 0, keep) and torch.equal(counts, keep.sum(1, dtype=torch.int32))
    assert all(row[row < 40].tolist() == k.nonzero()[:room, 0].tolist() for row, k in zip(columns, keep, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward(backend):
    name, device = backend
    batch = make_batch(device=device, scale=3.0)
    hidden = batch.hidden.clone().requires_grad_()
    out = fastrl.policy_loss_from_hidden(hidden, batch.head(), batch.rollouts, TOKEN, sparse_eps=EPS, backend=name)
    (first,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(2 * out.loss, hidden)
    close(second, 2 * first, ulps=8)
