"""The plain-torch loss in float64 against the independent oracle: value, gradients and metrics, for every objective and
option, by finite differences that respect stop-gradients."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from common import ACCELERATOR, OPTIONS, ROLLOUT_OPTIONS, clean_logits, make_batch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import specs

import fastrl
from fastrl import Rollouts, reference

STEP = 1e-6
ON_EACH = [("torch", "cpu"), ("triton", ACCELERATOR)]
ALL = {**OPTIONS, **ROLLOUT_OPTIONS}


def in_double(rollouts: Rollouts) -> Rollouts:
    """The same rollouts in float64, in which the torch backend keeps everything."""
    names = ("advantages", "rewards", "old_logps", "ref_logps", "rollout_logps", "rollout_weights")
    given = {name: getattr(rollouts, name) for name in names}
    doubled = {name: value.double() for name, value in given.items() if value is not None}
    more = {name: getattr(rollouts, name) for name in ("group_size", "group_ids", "cu_seqlens")}
    return Rollouts(rollouts.token_ids, rollouts.mask, **doubled, **more)


def differentiate(logps, rollouts, spec, **given):
    leaf = logps.detach().requires_grad_()
    out = fastrl.policy_loss(leaf, rollouts, spec, backend="torch", **given)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def drawn(c, logps, rollouts, spec, entropy):
    """The tokens that clip_cov drew: those whose gradient it removes from ppo_clip."""
    penalties = {"kl_coef": 0.0, "kl_estimator": "k3", "kl_gradient": "plain", "kl_clamp": None, "entropy_coef": 0.0}
    penalties["entropy_aggregation"] = None
    plain = spec.replace(**penalties, log_ratio_clamp=None)  # beyond the clamp there is no gradient to remove
    numbers = {name: 2e-4 if name.endswith("fraction") else 1.0 for name in ("clip_cov_fraction", "clip_cov_low")}
    clipped = plain.replace(objective="ppo_clip", seed=None, clip_cov_high=5.0, **numbers)
    with_pick = differentiate(logps, rollouts, plain, entropy=entropy)[1].flatten()
    without = differentiate(logps, rollouts, clipped, entropy=entropy)[1].flatten()
    return {k for k, i in enumerate(c.places) if without[i] != 0 and with_pick[i] == 0}


def numeric(of, values):
    """Central differences of `of`, None where the two sides disagree (a kink), and their rounding."""
    centre, out = of(values), []
    noise = 1e-9 * (1 + abs(centre))
    for k in range(len(values)):
        above, below = (of([v + step * (j == k) for j, v in enumerate(values)]) for step in (STEP, -STEP))
        right, left = (above - centre) / STEP, (centre - below) / STEP
        smooth = abs(right - left) <= 1e-4 * max(abs(right), abs(left)) + noise
        out.append((above - below) / (2 * STEP) if smooth else None)
    return out, noise


def check(logps, entropy, rollouts, spec, normalizer=None):
    """Loss, gradients of log-probs and entropies, and metrics, all against the oracle."""
    c = oracle.case(rollouts)
    leaves = [logps.detach().requires_grad_(), entropy.detach().requires_grad_()]
    out = fastrl.policy_loss(leaves[0], rollouts, spec, entropy=leaves[1], normalizer=normalizer, backend="torch")
    picked = drawn(c, logps, rollouts, spec, entropy) if spec.objective == "clip_cov" else ()
    lp, h = ([x.flatten()[i].item() for i in c.places] for x in (logps, entropy))

    def loss(lp_alone, h_alone=h):
        return oracle.evaluate(c, spec, lp_alone, lp, h_alone, normalizer, picked).loss

    assert out.loss.item() == pytest.approx(loss(lp), rel=1e-10, abs=1e-12)
    measured = oracle.metrics(c, spec, oracle.evaluate(c, spec, lp, lp, h, normalizer, picked), h)
    for name, value in out.metrics.to_floats().items():
        assert value == pytest.approx(measured[name], rel=2e-6, abs=1e-6), name
    slopes = numeric(loss, lp), numeric(lambda h_alone: loss(lp, h_alone), h)
    got = torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
    for gradient, (slope, noise) in zip(got, slopes, strict=True):
        flat = gradient.flatten().tolist()
        largest = max((abs(s) for s in slope if s is not None), default=0.0)
        for k, i in enumerate(c.places):
            if slope[k] is not None:
                assert flat[i] == pytest.approx(slope[k], rel=1e-6, abs=1e-6 * largest + noise), f"token {k}"
        inside = set(c.places)
        assert all(g == 0 for i, g in enumerate(flat) if i not in inside)


def scored(batch):
    logps, entropy = reference.logprobs(clean_logits(batch), batch.rollouts.token_ids, batch.rollouts.mask, 0.7)
    return logps, entropy


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_options(name, seed):
    batch = make_batch(seed=seed, drift=0.6, rollout=True)
    check(*scored(batch), in_double(batch.rollouts), ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_logits_and_hidden(name):
    """The oracle's slopes, taken on through torch's log-softmax, are the gradients of every level."""
    spec, batch = ALL[name], make_batch(drift=0.6, rollout=True)
    rollouts = in_double(batch.rollouts)
    c = oracle.case(rollouts)
    hidden = torch.where(batch.rollouts.mask[..., None], batch.hidden.double(), 0.0)
    leaves = [x.requires_grad_() for x in (hidden, batch.weight.double(), batch.bias.double())]
    logits = torch.nn.functional.linear(*leaves)
    rows = torch.log_softmax((logits / 0.7).flatten(0, 1)[c.places], -1)
    logps = rows.gather(-1, rollouts.token_ids.flatten()[c.places, None]).squeeze(-1)
    entropy = torch.special.entr(rows.exp()).sum(-1)
    lp, h = logps.tolist(), entropy.tolist()
    full = logps.new_zeros(rollouts.token_ids.numel()).index_put((torch.tensor(c.places),), logps.detach())
    full_entropy = torch.zeros_like(full).index_put((torch.tensor(c.places),), entropy.detach())
    shape = rollouts.shape
    picked = (
        drawn(c, full.view(shape), rollouts, spec, full_entropy.view(shape)) if spec.objective == "clip_cov" else ()
    )

    def loss(lp_alone, h_alone=h):
        return oracle.evaluate(c, spec, lp_alone, lp, h_alone, None, picked).loss

    slopes = [torch.tensor(numeric(f, x)[0]).double() for f, x in ((loss, lp), (lambda x: loss(lp, x), h))]
    want = torch.autograd.grad((logps, entropy), (logits, *leaves), slopes)
    leaf = logits.detach().requires_grad_()
    out = fastrl.policy_loss_from_logits(leaf, rollouts, spec, temperature=0.7, backend="torch")
    head = fastrl.LMHead(leaves[1], leaves[2])
    more = fastrl.policy_loss_from_hidden(
        leaves[0], head, rollouts, spec, temperature=0.7, buffer_bytes=2000, backend="torch"
    )
    got = torch.autograd.grad(out.loss, leaf) + torch.autograd.grad(more.loss, leaves)
    assert [out.loss.item(), more.loss.item()] == pytest.approx([loss(lp)] * 2, rel=1e-10, abs=1e-12)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


@pytest.mark.accelerator
@pytest.mark.parametrize("fraction", [2e-4, 0.1, 0.25, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_clip_cov_draw(fraction, seed):
    """As many as documented, from the documented candidates, the same again, others for another seed."""
    g = torch.Generator().manual_seed(seed)
    logps, advantages = -torch.randn(8, 16, generator=g).abs() - 0.1, torch.randn(8, 16, generator=g)
    old, mask = logps + 0.3 * torch.randn(8, 16, generator=g), torch.rand(8, 16, generator=g) < 0.8
    rollouts = Rollouts(torch.zeros(8, 16, dtype=torch.long), mask, advantages, old_logps=old)
    spec = fastrl.CLIP_COV.replace(clip_cov_fraction=fraction, clip_cov_low=0.05, clip_cov_high=1.5, seed=seed)
    c = oracle.case(in_double(rollouts))
    values = logps.double()
    picked = drawn(c, values, in_double(rollouts), spec, None)
    lp = [values.flatten()[i].item() for i in c.places]
    cov = oracle.covariances(range(len(lp)), lp, c.advantages)
    views = oracle.evaluate(c, spec, lp, lp).views
    candidates = {k for k, v in cov.items() if 0.05 < v < 1.5 and not any(oracle.clipped(views[k], spec))}
    assert picked <= candidates
    assert len(picked) == min(oracle.number_picked(fraction, lp), len(candidates))
    assert picked == drawn(c, values, in_double(rollouts), spec, None)
    others = drawn(c, values, in_double(rollouts), spec.replace(seed=seed + 1), None)
    assert len(picked) in (1, len(candidates)) or picked != others
    for backend, device in ON_EACH:  # in float32 and by kernels: the same tokens
        logps_there = logps.to(device).requires_grad_()
        loss = fastrl.policy_loss(logps_there, rollouts.to(device), spec, backend=backend).loss
        (gradient,) = torch.autograd.grad(loss, logps_there)
        assert all(gradient.flatten()[c.places[k]] == 0 for k in picked)
        assert all(gradient.flatten()[c.places[k]] != 0 for k in candidates - picked)


def tied(rollouts, spec, logps):
    """Whether two tokens have one covariance, as any two tokens alone have."""
    c = oracle.case(rollouts)
    lp = [logps.flatten()[i].item() for i in c.places]
    kept = oracle.evaluate(c, spec.replace(entropy_coef=0.0, entropy_aggregation=None), lp, lp).kept
    ordered = sorted(oracle.covariances(kept, lp, oracle.advantages(c, spec)).values())
    return any(b - a < 1e-9 for a, b in itertools.pairwise(ordered))


@st.composite
def problems(draw):
    """(log-probs, entropies, rollouts, spec, normalizer) in float64, padded or packed, garbage under the mask."""
    spec = draw(specs(with_custom=True))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    S, T = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = torch.randint(0, T + 1, (S,), generator=g)
    packed = draw(st.booleans())
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]) if packed else None
    shape = (int(lengths.sum()),) if packed else (S, T)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def near(width):
        values = torch.minimum(logps + width * normal(shape), torch.tensor(-1e-3))
        return values.masked_fill(~mask, draw(st.sampled_from([0.0, math.nan, math.inf])))

    mask = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.4, 0.8, 1.0]))
    logps, entropy = -normal(shape).abs() * 2 - 0.5, normal(shape).abs()
    kinds = {
        "token": {"advantages": normal(shape)},
        "sequence": {"advantages": normal(S)},
        "groups": {"rewards": normal(S).round(), "group_size": S},
        "ragged": {"rewards": normal(S), "group_ids": torch.randint(0, 3, (S,), generator=g)},
    }
    kind = draw(st.sampled_from(list(kinds))) if spec.objective not in ("clip_cov", "kl_cov") else "token"
    assume(not (packed and shape[0] == S and kind == "token"))  # (S,) and (N,) would be one shape
    needs_old = spec.rollout is not None and spec.rollout.by_batch
    old = near(0.3) if needs_old or draw(st.integers(0, 3)) else None
    sampler = weights = None
    if spec.rollout is not None or draw(st.booleans()):
        sampler = (logps if old is None else old) + 0.1 * normal(shape)
        sampler = sampler.masked_fill(torch.rand(shape, generator=g) < 0.2, math.nan).masked_fill(~mask, 1e30)
    elif draw(st.booleans()):
        weights = normal(shape).exp() * (torch.rand(shape, generator=g) < 0.8)
        weights = weights.masked_fill(~mask, math.nan)
    rollouts = Rollouts(
        torch.zeros(shape, dtype=torch.long),
        mask,
        **kinds[kind],
        old_logps=old,
        ref_logps=near(0.5) if spec.kl_coef or draw(st.booleans()) else None,
        rollout_logps=sampler,
        rollout_weights=weights,
        cu_seqlens=cu,
    )
    if spec.objective == "kl_cov":
        assume(not tied(rollouts, spec, logps))
    normalizer = draw(st.sampled_from([None, 13.0])) if spec.aggregation != "token-sum" else None
    return logps, entropy, rollouts, spec, normalizer


@settings(max_examples=500)
@given(problem=problems())
def test_any_spec(problem):
    check(*problem)
