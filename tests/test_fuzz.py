"""Hypothesis over shapes, layouts, masks, dtypes and options: every level and backend against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from common import ON_CPU, truth_from_logits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import maybe, specs

import fastrl
from fastrl import Rollouts

PICKING = ("clip_cov", "kl_cov")


@st.composite
def problems(draw):
    """(logits, rollouts, spec, temperature, normalizer), padded or packed, any mask, in a strange layout or not."""
    spec = draw(specs())
    ranks = (
        spec.top_entropy_quantile < 1 or spec.objective in PICKING
    )  # by numbers that must differ by more than rounding
    S, T = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    V = draw(st.sampled_from([7, 17, 31, 64, 129] if ranks else [1, 2, 3, 7, 17, 31, 64, 129]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    packed = draw(maybe)
    cu = None
    if packed:
        lengths = torch.randint(0, T + 1, (S,), generator=g)
        cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        shape = (int(cu[-1]),)
    else:
        shape = (S, T)
    logits = torch.randn(*shape, V, generator=g) * (1.0 if ranks else draw(st.sampled_from([0.1, 1.0, 8.0])))
    if draw(maybe) and V > 2 and not ranks:
        logits[..., 1 : V // 2] = -torch.inf
    ids = torch.where(logits[..., :1].isfinite().squeeze(-1), 0, 0)
    ids = torch.randint(0, V, shape, generator=g) if not logits.isinf().any() else ids
    mask = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    scored = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None]).squeeze(-1)

    def near(width):
        return (scored + width * torch.randn(shape, generator=g)).float().masked_fill(~mask, float("nan"))

    kinds = {
        "sequence": {"advantages": torch.randn(S, generator=g)},
        "token": {"advantages": torch.randn(shape, generator=g)},
        "groups": {"rewards": torch.randn(S, generator=g).round(), "group_size": S},
        "ragged": {"rewards": torch.randn(S, generator=g), "group_ids": torch.randint(0, 3, (S,), generator=g)},
    }
    kind = draw(st.sampled_from(list(kinds))) if spec.objective not in PICKING else "token"
    if packed and shape[0] == S:  # (S,) and (N,) would be one shape
        assume(spec.objective not in PICKING)
        kind = "groups"
    if spec.objective in PICKING:  # two tokens have one covariance
        assume(int(mask.sum()) != 2)
    by_batch = spec.rollout is not None and spec.rollout.by_batch
    assume(not (spec.objective in PICKING and by_batch and not spec.rollout.rejected_in_denominator))
    old = near(0.3) if by_batch or draw(maybe) else None
    sampler = weights = None
    if spec.rollout is not None or draw(maybe):
        sampler = near(0.1) if old is None else (old + 0.1 * torch.randn(shape, generator=g))
        sampler = sampler.masked_fill(torch.rand(shape, generator=g) < 0.1, float("nan"))
    elif draw(maybe):
        weights = torch.rand(shape, generator=g).round(decimals=1).masked_fill(~mask, float("nan"))
    rollouts = Rollouts(
        ids.masked_fill(~mask, -1),
        draw(st.sampled_from([mask, mask.int(), mask.float()])),
        **kinds[kind],
        old_logps=old,
        ref_logps=near(0.5),
        rollout_logps=sampler,
        rollout_weights=weights,
        cu_seqlens=cu,
    )
    logits = logits.masked_fill(~mask[..., None], draw(st.sampled_from([0.0, float("nan"), float("inf")])))
    layout = draw(st.sampled_from(["plain", "padded vocabulary", "vocabulary first"]))
    if layout == "padded vocabulary":
        logits = torch.nn.functional.pad(logits, (0, 5), value=1e4)[..., :V]
    elif layout == "vocabulary first":
        logits = logits.movedim(-1, 0).contiguous().movedim(0, -1)
    temperature = draw(st.sampled_from([1.0, 0.7, "per-token"]))
    if temperature == "per-token":
        temperature = torch.rand(shape, generator=g) + 0.5
    normalizer = draw(st.sampled_from([None, 13.0])) if spec.aggregation != "token-sum" else None
    return logits, rollouts, spec, temperature, normalizer


def check(backend, problem):
    logits, rollouts, spec, temperature, normalizer = problem
    keep = rollouts.flat.valid().view(rollouts.shape)[..., None]
    truth = truth_from_logits(torch.where(keep, logits, 0.0), rollouts, spec, temperature, normalizer)
    options = {"temperature": temperature, "normalizer": normalizer, "backend": backend}
    leaf = logits.detach().requires_grad_()
    out = fastrl.policy_loss_from_logits(leaf, rollouts, spec, **options)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    # Terms of a few units cancel in the loss; their rounding does not.
    scale = max(1.0, float(truth.logps.abs().max())) if truth.logps.numel() else 1.0
    assert abs(float(out.loss.detach()) - float(truth.loss)) <= 4e-5 * max(scale, abs(float(truth.loss)))
    assert not truth.logps.numel() or (out.logps - truth.logps).abs().max() <= 4e-6 * scale
    assert not truth.entropy.numel() or (out.entropy - truth.entropy).abs().max() <= 2e-5
    largest = max(float(truth.gradients[0].abs().max()), 1e-3) if gradient.numel() else 1.0
    assert not gradient.numel() or (gradient - truth.gradients[0]).abs().max() <= 1e-4 * largest

    leaf = logits.detach().requires_grad_()
    logps, entropy = fastrl.logprobs_from_logits(
        leaf, rollouts.token_ids, mask=rollouts.mask, temperature=temperature, backend=backend
    )
    again = fastrl.policy_loss(logps, rollouts, spec, entropy=entropy, normalizer=normalizer, backend=backend)
    (other,) = torch.autograd.grad(again.loss, leaf)
    assert abs(float(again.loss.detach()) - float(out.loss.detach())) <= 4e-5 * max(scale, abs(float(truth.loss)))
    assert not gradient.numel() or (gradient - other).abs().max() <= 1e-4 * largest


@settings(max_examples=130)
@given(problem=problems())
def test_torch(problem):
    check("torch", problem)


@pytest.mark.accelerator
@settings(max_examples=45)
@given(problem=problems())
def test_triton(problem):
    logits, rollouts, *rest = problem
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rest = [x.to(device) if isinstance(x, torch.Tensor) else x for x in rest]
    if device == "cpu":
        check("triton", (logits, rollouts, *rest))
    else:
        check("triton", (logits.to(device), rollouts.to(device), *rest))


@settings(max_examples=45)
@given(problem=problems(), rows=st.integers(1, 9), data=st.data())
def test_hidden(problem, rows, data):
    """From hidden states: identity head, so that the logits are the hidden states; any chunk size."""
    logits, rollouts, spec, temperature, normalizer = problem
    keep = rollouts.flat.valid().view(rollouts.shape)[..., None]
    logits = torch.where(keep, logits.nan_to_num(neginf=-30.0, posinf=0.0), float("nan"))
    truth = truth_from_logits(torch.where(keep, logits, 0.0), rollouts, spec, temperature, normalizer)
    V = logits.shape[-1]
    leaf = logits.clone().requires_grad_()
    weight = torch.eye(V, requires_grad=True)
    out = fastrl.policy_loss_from_hidden(
        leaf,
        fastrl.LMHead(weight),
        rollouts,
        spec,
        temperature=temperature,
        normalizer=normalizer,
        buffer_bytes=rows * 4 * (-(-V // 16) * 16),
        backend=data.draw(st.sampled_from(ON_CPU)),
    )
    dhidden, dweight = torch.autograd.grad(out.loss, (leaf, weight))
    scale = max(1.0, float(truth.logps.abs().max())) if truth.logps.numel() else 1.0
    assert abs(float(out.loss.detach()) - float(truth.loss)) <= 4e-5 * max(scale, abs(float(truth.loss)))
    if dhidden.numel():
        want = truth.gradients[0]
        largest = max(float(want.abs().max()), 1e-3)
        assert (dhidden - want).abs().max() <= 1e-4 * largest
        rows_of = torch.where(keep, logits, 0.0).reshape(-1, V).double()
        outer = want.reshape(-1, V).t() @ rows_of
        assert (dweight - outer).abs().max() <= 1e-4 * max(float(outer.abs().max()), 1e-3)
