"""Returns and advantages against the recursions written as loops over T, in fp64."""

from __future__ import annotations

import re

import pytest
import torch
from common import BACKENDS, close
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrl

NAN = float("nan")


def gae_by_loop(r, v, m, gamma, lam, bootstrap, carry_masked=True):
    """The two carries as verl keeps them; without carrying, a masked step has reward 0 and value 0."""
    r, v, bootstrap = r.double().cpu(), v.double().cpu(), bootstrap.double().cpu()
    lam = torch.as_tensor(lam, dtype=torch.float64).cpu().expand(r.shape[0])
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    for i in range(r.shape[0]):
        next_value, advantage = bootstrap[i].item(), 0.0
        for t in reversed(range(r.shape[1])):
            if m[i, t]:
                advantage = r[i, t].item() + gamma * (next_value + lam[i].item() * advantage) - v[i, t].item()
                next_value = v[i, t].item()
                advantages[i, t], returns[i, t] = advantage, advantage + next_value
            elif not carry_masked:
                next_value, advantage = 0.0, gamma * (next_value + lam[i].item() * advantage)
    return advantages, returns


def n_step_by_loop(r, v, m, n, gamma, bootstrap):
    out = torch.zeros_like(r, dtype=torch.float64)
    for i in range(r.shape[0]):
        steps = [t for t in range(r.shape[1]) if m[i, t]]
        for at, t in enumerate(steps):
            taken = steps[at : at + n]
            out[i, t] = sum(gamma**k * r[i, s].item() for k, s in enumerate(taken))
            after = v[i, steps[at + n]].item() if at + n < len(steps) else bootstrap[i].item()
            out[i, t] += gamma ** len(taken) * after
    return out


def make(B, T, *, holes=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    r, v = torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    m = torch.rand(B, T, generator=g) > (0.3 if holes else -1)
    if holes and B > 2:
        m[1] = False
        m[2, T // 2 :] = False
    return r, v, m, torch.randn(B, generator=g)


def dirty(m, *tensors):
    return [x.masked_fill(~m, NAN) for x in tensors]


# One T per regime: a single step; a few; around the torch blocks of √T; around one and several blocks of the kernel.
LENGTHS = [1, 2, 7, 63, 64, 65, 130, 2047, 2048, 2049, 6001]


@pytest.mark.parametrize("carry_masked", [True, False])
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gae(backend, T, carry_masked):
    name, device = backend
    r, v, m, bootstrap = make(4, T)
    args = [x.to(device) for x in dirty(m, r, v)]
    got = fastrl.gae(
        *args, mask=m.to(device), gamma=0.99, lam=0.9, bootstrap=bootstrap.to(device), carry_masked=carry_masked,
        backend=name,
    )  # fmt: skip
    for x, want, what in zip(got, gae_by_loop(r, v, m, 0.99, 0.9, bootstrap, carry_masked), "AR", strict=True):
        close(x, want, ulps=16, what=what)
        assert x.dtype == torch.float32 and (x.cpu()[~m] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_of_its_own_for_returns_and_per_sequence(backend):
    """VAPO: λ = 1 for the critic, 1 − 1/(α·length) for the policy."""
    name, device = backend
    r, v, m, bootstrap = make(4, 70)
    lam = fastrl.length_adaptive_lambda(m.sum(-1), 0.05)
    assert lam[1] == 0 and (lam >= 0).all() and torch.allclose(lam[0], 1 - 1 / (0.05 * m[0].sum()))
    given = {"mask": m.to(device), "bootstrap": bootstrap.to(device), "backend": name}
    r_, v_ = r.to(device), v.to(device)
    advantages, returns = fastrl.gae(r_, v_, lam=lam.to(device), lam_returns=1.0, **given)
    close(advantages, gae_by_loop(r, v, m, 1.0, lam, bootstrap)[0], ulps=16)
    close(returns, gae_by_loop(r, v, m, 1.0, 1.0, bootstrap)[1], ulps=16)
    swapped = fastrl.gae(r_, v_, lam=1.0, lam_returns=lam.to(device), **given)
    close(swapped[0], gae_by_loop(r, v, m, 1.0, 1.0, bootstrap)[0], ulps=16)
    close(swapped[1], gae_by_loop(r, v, m, 1.0, lam, bootstrap)[1], ulps=16)


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_of_any_mask(backend, data):
    name, device = backend
    B, T = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40))
    r, v, _, bootstrap = make(B, T, seed=data.draw(st.integers(0, 99)))
    m = torch.tensor(data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).view(B, T)
    gamma, lam = (data.draw(st.sampled_from([0.0, 0.3, 0.95, 1.0])) for _ in range(2))
    carry = data.draw(st.booleans())
    *tensors, mask, last = (x.to(device) for x in (*dirty(m, r, v), m, bootstrap))
    got = fastrl.gae(*tensors, mask=mask, gamma=gamma, lam=lam, bootstrap=last, carry_masked=carry, backend=name)
    for x, want in zip(got, gae_by_loop(r, v, m, gamma, lam, bootstrap, carry), strict=True):
        close(x, want, ulps=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_step_is_no_step(backend):
    """Carried: the result is that of the unmasked steps alone, in any place."""
    name, device = backend
    r, v, m, bootstrap = (x.to(device) for x in make(1, 50))
    sparse = fastrl.gae(r, v, mask=m, gamma=0.9, lam=0.8, bootstrap=bootstrap, backend=name)
    dense = fastrl.gae(r[m][None], v[m][None], gamma=0.9, lam=0.8, bootstrap=bootstrap, backend=name)
    for x, y in zip(sparse, dense, strict=True):
        close(x[m], y[0], ulps=8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_recursion_reads_masked_steps_as_zeros(backend):
    name, device = backend
    r, v, m, bootstrap = (x.to(device) for x in make(4, 50))
    plain = fastrl.gae(r, v, mask=m, gamma=0.9, lam=0.8, bootstrap=bootstrap, carry_masked=False, backend=name)
    zeroed = fastrl.gae(r * m, v * m, gamma=0.9, lam=0.8, bootstrap=bootstrap, backend=name)
    for x, y in zip(plain, zeroed, strict=True):
        close(x, y * m, ulps=8)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_over_8192_steps(backend, gamma, lam):
    """No worse than twice the fp32 loop over T, and a few units in the last place."""
    name, device = backend
    r, v, m, bootstrap = make(2, 8192)
    truth = gae_by_loop(r, v, m, gamma, lam, bootstrap)[0]
    advantage, next_value, loop = torch.zeros(2), bootstrap.clone(), torch.zeros_like(r)
    for t in reversed(range(8192)):
        new = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * advantage
        next_value = torch.where(m[:, t], v[:, t], next_value)
        advantage = torch.where(m[:, t], new, advantage)
        loop[:, t] = torch.where(m[:, t], new, 0)
    args = (r.to(device), v.to(device))
    kwargs = {"mask": m.to(device), "bootstrap": bootstrap.to(device), "backend": name}
    got = fastrl.gae(*args, gamma=gamma, lam=lam, **kwargs)[0].cpu().double()
    bar = 2 * (loop.double() - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (got - truth).abs().max() <= bar


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_very_long_row(backend):
    name, device = backend
    r, v, m, bootstrap = make(1, 32_768 if backend == ("triton", "cpu") else 131_072)  # the interpreter is slow
    advantages, returns = fastrl.gae(
        r.to(device), v.to(device), mask=m.to(device), gamma=0.999, lam=0.97, bootstrap=bootstrap.to(device),
        backend=name,
    )  # fmt: skip
    truth = gae_by_loop(r, v, m, 0.999, 0.97, bootstrap)
    close(advantages, truth[0], ulps=16)
    close(returns, truth[1], ulps=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_independent_and_bitwise_so(backend):
    name, device = backend
    r, v, m, _ = (x.to(device) for x in make(5, 300))
    every = fastrl.gae(r, v, mask=m, lam=0.9, backend=name)[0]
    alone = fastrl.gae(r[3:4], v[3:4], mask=m[3:4], lam=0.9, backend=name)[0]
    assert torch.equal(every[3:4], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_dtypes(backend):
    name, device = backend
    r, v, m, _ = (x.to(device) for x in make(2, 33))
    want = fastrl.gae(r, v, mask=m, gamma=0.9, lam=0.8, backend=name)[0]
    strided = fastrl.gae(
        r.t().contiguous().t(), v.repeat(1, 2)[:, :33], mask=m.int(), gamma=0.9, lam=0.8, backend=name
    )[0]
    assert torch.equal(strided, want)
    low = v.bfloat16()
    close(
        fastrl.gae(r, low, mask=m, gamma=0.9, lam=0.8, backend=name)[0],
        gae_by_loop(r, low, m, 0.9, 0.8, torch.zeros(2))[0],
        ulps=16,
    )
    double = fastrl.gae(r.double(), v, mask=m, gamma=0.9, lam=0.8, backend="torch")[0]
    assert double.dtype == torch.float64
    close(double, gae_by_loop(r, v, m, 0.9, 0.8, torch.zeros(2))[0], ulps=16, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, shape):
    name, device = backend
    x = torch.empty(shape, device=device)
    for out in (*fastrl.gae(x, x, whiten=True, backend=name), fastrl.discounted_returns(x, backend=name)):
        assert out.shape == shape
    assert fastrl.n_step_returns(x, x, n=3).shape == shape and fastrl.td_errors(x, x, mask=x).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_earlier_steps_of_its_row_only(backend):
    name, device = backend
    r, v, *_ = make(3, 100, holes=False)
    r[1, 60] = NAN
    advantages, returns = fastrl.gae(r.to(device), v.to(device), gamma=0.9, lam=0.8, backend=name)
    want = torch.zeros(3, 100, dtype=torch.bool)
    want[1, :61] = True
    assert torch.equal(advantages.isnan().cpu(), want) and torch.equal(returns.isnan().cpu(), want)
    errors = fastrl.td_errors(r, v, gamma=0.9)
    assert errors.isnan().nonzero().tolist() == [[1, 60]]
    near = fastrl.n_step_returns(r, v, n=5, gamma=0.9)
    assert near.isnan().nonzero()[:, 1].tolist() == [56, 57, 58, 59, 60]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whitening_comes_after_the_returns(backend):
    name, device = backend
    r, v, m, _ = (x.to(device) for x in make(4, 20))
    advantages, returns = fastrl.gae(r, v, mask=m, lam=0.9, backend=name)
    white, same = fastrl.gae(r, v, mask=m, lam=0.9, whiten=True, backend=name)
    assert torch.equal(same, returns) and torch.equal(white, fastrl.whiten(advantages, m))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_data(backend):
    name, device = backend
    r, v, m, _ = (x.to(device) for x in make(2, 9))
    out = fastrl.gae(r, v.requires_grad_(), mask=m, backend=name)
    assert not any(x.requires_grad for x in out)


@pytest.mark.parametrize("T", [1, 6, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_discounted_returns(backend, T):
    name, device = backend
    r, _, m, bootstrap = make(3, T)
    (clean,) = dirty(m, r)
    got = fastrl.discounted_returns(
        clean.to(device), gamma=0.97, mask=m.to(device), bootstrap=bootstrap.to(device), backend=name
    )
    close(got, n_step_by_loop(r, r, m, T, 0.97, bootstrap), ulps=16)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 19, 20, 21, 64])
def test_n_step_returns(n):
    r, v, m, bootstrap = make(4, 20)
    got = fastrl.n_step_returns(*dirty(m, r, v), n=n, gamma=0.9, mask=m, bootstrap=bootstrap)
    close(got, n_step_by_loop(r, v, m, n, 0.9, bootstrap), ulps=16)
    full = torch.ones_like(m)
    plain = fastrl.n_step_returns(r, v, n=n, gamma=0.9)
    close(plain, n_step_by_loop(r, v, full, n, 0.9, torch.zeros(4)), ulps=16)


def test_td_errors_are_gae_with_lambda_0():
    r, v, m, bootstrap = make(4, 20)
    got = fastrl.td_errors(*dirty(m, r, v), gamma=0.9, mask=m, bootstrap=bootstrap)
    close(got, gae_by_loop(r, v, m, 0.9, 0.0, bootstrap)[0], ulps=16)


R = torch.zeros(2, 3)
MISUSES = [
    (lambda: fastrl.gae([1.0], R), TypeError, "rewards: expected a torch.Tensor"),
    (lambda: fastrl.gae(R, R.long()), TypeError, "values: expected a floating dtype"),
    (lambda: fastrl.gae(R[0], R[0]), ValueError, "rewards: expected shape (B, T)"),
    (lambda: fastrl.gae(R, R[:, :2]), ValueError, "values: expected shape (2, 3)"),
    (lambda: fastrl.gae(R, R, mask=R[0]), ValueError, "mask: expected shape (2, 3)"),
    (lambda: fastrl.gae(R, R, gamma=1.5), ValueError, "gamma: expected a number from 0 to 1"),
    (lambda: fastrl.gae(R, R, gamma="1"), TypeError, "gamma: expected a number"),
    (lambda: fastrl.gae(R, R, lam=NAN), ValueError, "lam: expected a number from 0 to 1"),
    (lambda: fastrl.gae(R, R, lam=R), ValueError, "lam: expected shape (2,)"),
    (lambda: fastrl.gae(R, R, lam_returns=R[0]), ValueError, "lam_returns: expected shape (2,)"),
    (lambda: fastrl.gae(R, R, bootstrap=R), ValueError, "bootstrap: expected shape (2,)"),
    (lambda: fastrl.gae(R, R, backend="cuda"), ValueError, "backend: expected one of"),
    (lambda: fastrl.gae(R.double(), R, backend="triton"), ValueError, "backend: expected inputs that Triton can take"),
    (lambda: fastrl.n_step_returns(R, R, n=0), ValueError, "n: expected a positive int"),
    (lambda: fastrl.discounted_returns(R, gamma=-0.1), ValueError, "gamma: expected a number from 0 to 1"),
    (lambda: fastrl.length_adaptive_lambda(R[0], 0), ValueError, "alpha: expected a finite number above 0"),
]


@pytest.mark.parametrize(("call", "error", "words"), MISUSES, ids=[row[2] for row in MISUSES])
def test_misuse(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()
