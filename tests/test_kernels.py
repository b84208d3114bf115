"""The row kernels and the token kernel by themselves, on every backend: shapes one per regime, layouts, -inf, twins."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from common import ACCELERATOR, BACKENDS, OPTIONS, close, make_batch, truth_from_logits

import fastrl
from fastrl import reference
from fastrl.kl import KL_ESTIMATORS
from fastrl.objectives import OBJECTIVES
from fastrl.spec import KLEstimator, KLGradient
from fastrl.token_inputs import expand

# One vocabulary per regime of the kernels: a single token; less than a tile; a prime; exactly a tile of the short
# configuration; just under, at and over the 4096 columns of the long one; two tiles and an odd tail.
VOCABULARIES = [1, 2, 3, 16, 31, 127, 128, 129, 1024, 4095, 4096, 4097, 8195]


def scores(logits, ids, name, *, mask=None, temperature=1.0):
    return fastrl.logprobs_from_logits(logits, ids, mask=mask, temperature=temperature, backend=name)


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabularies(backend, V):
    """Values and gradients with random cotangents on both outputs; rows of dlogits sum to 0 (promises 3 and 8)."""
    name, device = backend
    logits = (torch.randn(3, V) * 3).to(device).requires_grad_()
    ids = torch.tensor([0, V - 1, V // 2], device=device)
    out = scores(logits, ids, name, temperature=0.8)
    c, e = torch.randn(3, device=device), torch.randn(3, device=device)
    (got,) = torch.autograd.grad((out.logps, out.entropy), logits, (c, e))
    leaf = logits.detach().cpu().double().requires_grad_()
    logps, entropy = reference.logprobs(leaf, ids.cpu(), None, 0.8)
    (want,) = torch.autograd.grad((logps, entropy), leaf, (c.cpu().double(), e.cpu().double()))
    close(out.logps, logps, ulps=16, what="logps")
    close(out.entropy, entropy, ulps=16, what="entropy")
    close(got, want, ulps=32, what="dlogits")
    assert (out.logps <= 0).all() and (out.entropy >= 0).all() and (out.entropy <= math.log(V)).all()
    # each row sums to 0 but for the rounding of its V entries
    assert got.double().sum(-1).abs().max() <= 8 * torch.finfo(torch.float32).eps * max(got.abs().sum(-1).max(), 1.0)


@pytest.mark.parametrize("unused", ["logps", "entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_8_one_cotangent(backend, unused):
    """An unused output costs nothing and changes nothing."""
    name, device = backend
    logits = torch.randn(4, 33, device=device, requires_grad=True)
    ids = torch.randint(0, 33, (4,), device=device)
    out = scores(logits, ids, name)
    used = out.entropy if unused == "logps" else out.logps
    weight = torch.randn(4, device=device)
    (got,) = torch.autograd.grad((used * weight).sum(), logits)
    leaf = logits.detach().cpu().double().requires_grad_()
    logps, entropy = reference.logprobs(leaf, ids.cpu())
    (want,) = torch.autograd.grad(((entropy if unused == "logps" else logps) * weight.cpu()).sum(), leaf)
    close(got, want, ulps=32)


def layouts(base: torch.Tensor):
    """(name, view) of the same (3, 4, V) values in memory layouts that users have."""
    B, T, V = base.shape
    wide = torch.zeros(B, T + 3, V + 5, device=base.device)
    wide[:, 2 : 2 + T, :V] = base
    yield "slice", wide[:, 2 : 2 + T, :V]
    yield "time-major", base.transpose(0, 1).contiguous().transpose(0, 1)
    yield "vocabulary-first", base.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield "every-second", base.repeat_interleave(2, 1)[:, ::2]
    yield "expanded", base[:1].expand(B, T, V)


@pytest.mark.parametrize("layout", ["slice", "time-major", "vocabulary-first", "every-second", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_7_layouts(backend, layout):
    name, device = backend
    view = dict(layouts(torch.randn(3, 4, 29, device=device)))[layout].requires_grad_()
    ids = torch.randint(0, 29, (4, 3), device=device).t()  # a transposed view
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1]] * 3, device=device)[:, ::2]
    advantages = torch.randn(3, 1, device=device).expand(3, 4)
    old = torch.full((1, 1), -3.3, device=device).expand(3, 4)
    rollouts = fastrl.Rollouts(ids, mask, advantages, old_logps=old)
    for spec in (fastrl.DAPO, fastrl.GSPO):
        truth = truth_from_logits(view, rollouts, spec, 1.0)
        out = fastrl.policy_loss_from_logits(view, rollouts, spec, backend=name)
        (got,) = torch.autograd.grad(out.loss, view)
        close(out.loss, truth.loss, ulps=200, what="loss")
        close(got, truth.gradients[0], ulps=200, what="dlogits")


@pytest.mark.parametrize("kind", ["sum", "scalar-expanded", "strided", "double"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_layout(backend, kind):
    """ROCm/TE#623: `loss.sum()` sends an expanded stride-0 gradient."""
    name, device = backend
    logits = torch.randn(2, 3, 17, device=device, requires_grad=True)
    ids = torch.randint(0, 17, (2, 3), device=device)
    logps = scores(logits, ids, name).logps
    gradient = {
        "sum": torch.ones(2, 3),
        "scalar-expanded": torch.tensor(2.0).expand(2, 3),
        "strided": torch.randn(3, 2).t(),
        "double": torch.randn(2, 3, dtype=torch.float64).float(),
    }[kind].to(device)
    (got,) = torch.autograd.grad(logps, logits, gradient)
    leaf = logits.detach().cpu().double().requires_grad_()
    (want,) = torch.autograd.grad(reference.logprobs(leaf, ids.cpu())[0], leaf, gradient.cpu().double())
    close(got, want, ulps=32)


@pytest.mark.accelerator
@pytest.mark.parametrize("count", [1, 3, 100])
def test_any_number_of_programs_scales_a_gradient(count, monkeypatch):
    """Each element once, whoever takes it; and on a GPU no more programs than run at once."""
    pytest.importorskip("triton", reason="needs triton")
    scale = importlib.import_module("fastrl_kernels.scale")
    x = torch.randn(5 * scale._BLOCK + 17, device=ACCELERATOR)
    monkeypatch.setattr(scale, "programs", lambda *_: count)
    got = x.clone()
    scale.scale_(got, torch.tensor(2.5, device=ACCELERATOR))
    assert torch.equal(got, x * 2.5)
    scale.scale_(got, torch.tensor(1.0, device=ACCELERATOR))
    assert torch.equal(got, x * 2.5)
    monkeypatch.undo()
    assert scale.programs(2**31, "sm_90") == 8 * 132 and scale.programs(2**31, "interpreter") == 2**19
    assert scale.programs(4097, "sm_90") == 2


@pytest.mark.parametrize("where", ["first tile", "last tile", "scattered", "all but one"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_6_minus_infinity(backend, where):
    """Liger 0.8.5 and TRL 1.16's kernel give NaN when the whole first tile is -inf; 0·log 0 = 0 forward and backward."""
    name, device = backend
    V = 4096 + 40
    logits = torch.randn(2, V, device=device)
    ids = torch.tensor([V - 1, V - 3], device=device)
    if where == "first tile":
        logits[:, :4096] = -torch.inf
    elif where == "last tile":
        logits[:, 4096:-3] = -torch.inf
    elif where == "scattered":
        logits[:, 1:-4:3] = -torch.inf
    else:
        logits[0, :-1] = -torch.inf
    logits.requires_grad_()
    out = scores(logits, ids, name)
    c, e = torch.randn(2, device=device), torch.randn(2, device=device)
    (got,) = torch.autograd.grad((out.logps, out.entropy), logits, (c, e))
    assert got.isfinite().all() and (got[logits == -torch.inf] == 0).all()
    finite = torch.where(logits.detach().cpu() == -torch.inf, -1e4, logits.detach().cpu()).double().requires_grad_()
    logps, entropy = reference.logprobs(finite, ids.cpu())
    (want,) = torch.autograd.grad((logps, entropy), finite, (c.cpu().double(), e.cpu().double()))
    close(out.logps, logps, ulps=32)
    close(out.entropy, entropy, ulps=32)
    close(got, want, ulps=64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_minus_infinity_and_selected_minus_infinity(backend):
    """A row without any finite logit is NaN like log_softmax; a selected -inf logit has log-prob -inf."""
    name, device = backend
    logits = torch.randn(2, 21, device=device)
    logits[0], logits[1, 5] = -torch.inf, -torch.inf
    logps, entropy = scores(logits, torch.tensor([3, 5], device=device), name)
    assert logps[0].isnan() and entropy[0].isnan()
    assert logps[1] == -torch.inf and entropy[1].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_keep_their_differences(backend):
    """Statistics are relative to the row maximum: no cancellation at 1e4."""
    name, device = backend
    base = torch.randn(3, 19)
    ids = torch.randint(0, 19, (3,))
    logits = (base + 1e4).to(device)
    exact = logits.cpu().double()
    want_logps, want_entropy = reference.logprobs(exact, ids)
    logps, entropy = scores(logits, ids.to(device), name)
    close(logps, want_logps, ulps=16)
    close(entropy, want_entropy, ulps=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_tokens(backend, dtype):
    """Liger#1329: random logits never show the target's gradient as p -> 1; these do. Value, entropy and gradient keep
    their digits where 1 − p itself would round to 0: 17 nats in float32."""
    name, device = backend
    margins = torch.tensor([4.0, 8.0, 12.0, 16.0, 20.0, 40.0])
    logits = torch.randn(len(margins), 50)
    logits[:, 7] = 3 + margins
    ids = torch.full(margins.shape, 7)
    logits = logits.to(device, dtype).requires_grad_()
    logps, entropy = scores(logits, ids.to(device), name)
    (got,) = torch.autograd.grad(logps.sum(), logits)
    leaf = logits.detach().cpu().double().requires_grad_()
    rest = (leaf - leaf[:, 7:8]).exp().index_fill(1, torch.tensor([7]), 0).sum(-1)
    truth = -torch.log1p(rest)  # log_softmax keeps fewer digits than this even in float64
    (want,) = torch.autograd.grad(truth.sum(), leaf)
    relative = 64 * torch.finfo(torch.float32).eps
    assert ((logps.cpu().double() - truth).abs() <= relative * truth.abs()).all() and (logps < 0).all()
    logs = leaf - leaf[:, 7:8] + truth[:, None]
    want_entropy = -(logs.exp() * logs).sum(-1)
    assert ((entropy.cpu().double() - want_entropy).abs() <= relative * want_entropy).all()
    # one rounding to the dtype (truncation in the interpreter) on top of float32's
    bound = want.abs() * (2 * torch.finfo(dtype).eps + relative)
    if dtype == torch.float16:
        bound = bound + 2.0**-24
    assert ((got.cpu().double() - want).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_range_ids_poison_their_row(backend):
    """Where checking would wait for the device the row becomes NaN; here on the operators, below the CPU's check."""
    from fastrl import ops
    from fastrl.rows import Scoring

    name, device = backend
    logits = torch.randn(4, 11, device=device)
    ids = torch.tensor([3, 11, -1, 10**12], device=device)
    tensors, numbers = ops.pack_scoring(Scoring.of(ids, None, 1.0))
    logps, _, result = ops.score_logits(logits, tensors, numbers, name)
    assert logps[0].isfinite() and logps[1:].isnan().all()
    ones = torch.ones(4, device=device)
    gradient = ops.score_logits_grad(logits, tensors, numbers, result, ones, None, name)
    assert gradient[0].isfinite().all() and gradient[1:].isnan().all()


GRID = torch.cat([torch.linspace(-3, 3, 61), torch.tensor([-25.0, -20.0, 20.0, 25.0, math.log(1.2), math.log(0.8)])])


def twins():
    """Every objective at every level, with each option that it reads; every estimator with every gradient."""
    variants = {
        "plain": {},
        "unbounded": {"epsilon_low": None, "epsilon_high": None},
        "one-sided": {"epsilon_low": None},
        "dual": {"dual_clip": 1.5},
        "delta": {"delta": 1.7},
        # the clipped term has a gradient of its own where it has no bound on that side (found by test_fuzz)
        "delta-no-upper-bound": {"delta": 1.7, "epsilon_high": None},
        "unclamped": {"log_ratio_clamp": None},
    }
    for objective, definition in OBJECTIVES.items():
        for level, (name, fields) in itertools.product(definition.levels, variants.items()):
            if not set(fields) <= {*definition.reads, "log_ratio_clamp"}:
                continue
            seed = {"seed": 1} if objective == "clip_cov" else {}
            spec = fastrl.LossSpec(objective=objective, ratio_level=level, aggregation="token-sum", **fields, **seed)
            yield pytest.param(spec, id=f"{objective}-{level}-{name}")
    for estimator, gradient in itertools.product(KLEstimator, KLGradient):
        for clamp in (None, 0.7):
            spec = fastrl.LossSpec(
                kl_coef=1.0, kl_estimator=estimator, kl_gradient=gradient, kl_clamp=clamp, aggregation="token-sum"
            )
            yield pytest.param(spec, id=f"kl-{estimator}-{gradient}-{clamp}")


@pytest.mark.accelerator
@pytest.mark.parametrize("spec", list(twins()))
def test_device_twins_of_the_registry(spec):
    """The device function gives the specification's value and derivative, for A > 0, A < 0 and A = 0.

    One token per sequence, so that every level sees the whole grid of log-ratios.
    """
    points = GRID[::6] if spec.by_sequence else GRID
    grid, n = points.repeat(3), 3 * len(points)
    advantages = torch.tensor([1.0, -0.7, 0.0]).repeat_interleave(len(points))
    old = torch.where(grid > 0, -30.0, -0.75)[:, None]
    rollouts = fastrl.Rollouts(
        torch.zeros(n, 1, dtype=torch.long), advantages=advantages, old_logps=old, ref_logps=old - 0.3
    )
    leaf = (old + grid[:, None]).double().requires_grad_()
    rows, _, inputs = expand(leaf.reshape(-1), None, rollouts.flat, None, spec)
    losses = reference.per_token_loss(reference.measure(rows, inputs, spec), inputs, spec)
    (want,) = torch.autograd.grad(losses.sum(), leaf)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine = (old + grid[:, None]).to(device).requires_grad_()
    out = fastrl.policy_loss(mine, rollouts.to(device), spec, backend="triton")
    (got,) = torch.autograd.grad(out.loss, mine)
    # rtol for exp near the clamp, where the derivative is e^20
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)
    losses = losses.detach()
    assert abs(float(out.loss.detach()) - float(losses.sum())) <= 1e-5 * max(float(losses.abs().sum()), 1.0)


def test_every_objective_and_estimator_has_both_texts():
    """The kernel knows every registered name, and codegen compiles every one."""
    from fastrl_kernels.objective_fns import OBJECTIVES as DEVICE

    assert set(DEVICE) == set(OBJECTIVES)
    for name, definition in OBJECTIVES.items():
        assert DEVICE[name].folds == definition.weighs_sequences
        assert DEVICE[name].reads_selected == definition.reads_selected
        assert DEVICE[name].numbers <= len(definition.numbers)
    assert set(KL_ESTIMATORS) == set(KLEstimator)


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["grpo", "leave-one-out", "batch-scale", "raw-rewards", "gspo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_inside_the_kernel(backend, name, group_size):
    """The token kernel normalises rewards itself: as if the advantages had been given."""
    engine, device = backend
    batch = make_batch(B=6, device=device, group_size=group_size)
    spec = OPTIONS[name]
    advantages = fastrl.group_advantages(
        batch.rollouts.rewards, group_size=group_size, baseline=spec.advantage_baseline, scale=spec.advantage_scale
    )
    logps = torch.full(batch.rollouts.shape, -2.0, device=device)
    inside = fastrl.policy_loss(logps, batch.rollouts, spec, backend=engine)
    r = batch.rollouts
    given = fastrl.Rollouts(r.token_ids, r.mask, advantages, old_logps=r.old_logps)
    outside = fastrl.policy_loss(logps, given, spec, backend=engine)
    torch.testing.assert_close(inside.loss, outside.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_programs_than_one_reduction_step(backend, level):
    """Partial sums of many programs, over several steps of the last program; long and ragged packed sequences."""
    name, device = backend
    lengths = [700, 1, 0, 513, 2, 1030, *([3] * 70)]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    N = int(cu[-1])
    ids = torch.zeros(N, dtype=torch.long)
    mask = torch.rand(N) > 0.2
    old = torch.randn(N) * 0.1 - 2
    rollouts = fastrl.Rollouts(ids, mask, torch.randn(len(lengths)), old_logps=old, cu_seqlens=cu)
    spec = fastrl.GRPO.replace(ratio_level=level)
    logps = torch.randn(N) * 0.1 - 2
    leaf = logps.double().requires_grad_()
    want, statistics = reference.token_loss(leaf, None, rollouts.flat, None, spec)
    (gradient,) = torch.autograd.grad(want, leaf)
    mine = logps.to(device).requires_grad_()
    out = fastrl.policy_loss(mine, rollouts.to(device), spec, backend=name)
    out.loss.backward()
    close(out.loss, want, ulps=64, what="loss")
    close(mine.grad, gradient, ulps=64, what="dlogps")
    truth = fastrl.Metrics(statistics, rollouts.flat.counts, tuple(out.metrics))
    for metric in truth:
        torch.testing.assert_close(out.metrics[metric].cpu(), truth[metric], rtol=1e-4, atol=1e-5)


@pytest.mark.accelerator
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "none"])
@pytest.mark.parametrize("grouping", ["size", "ids"])
def test_group_advantage_kernel(grouping, baseline, scale):
    """One launch for ragged groups in any order; the fp64 definition is `advantages.normalise`."""
    import fastrl_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rewards = torch.randn(140)
    rewards[:4] = 0.1  # a group of equals
    ids = torch.randint(-3, 30, (140,)) if grouping == "ids" else None
    if ids is not None:
        ids[:4], ids[5] = 1000, 2000  # the equals, and a group of one
    given = {"group_ids": ids} if grouping == "ids" else {"group_size": 4}
    want = fastrl.group_advantages(rewards.double(), baseline=baseline, scale=scale, **given)
    on_device = None if ids is None else ids.to(device)
    got = fastrl_kernels.group_advantages(rewards.to(device), on_device, 4, eps=1e-4, baseline=baseline, scale=scale)
    close(got, want, ulps=64)
    assert torch.equal(got.cpu() == 0, want == 0)


def test_the_statistics_of_the_kernel_are_those_of_the_metrics():
    """The kernels know nothing of `fastrl`: both sides name the columns, in one order."""
    import fastrl_kernels

    from fastrl.metrics import STATISTICS

    assert fastrl_kernels.STATISTICS == STATISTICS
