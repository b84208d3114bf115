"""The contract's invariants, each named: 3 invariants, 4 masked means never read, 5 overflow, 9 determinism and batch
invariance, 10 partition invariance, 11 no recompilation."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS, KINDS, OPTIONS, PARTITIONED, clean_logits, close, make_batch, truth_from_logits

import fastrl

LEVELS = ["logprobs", "logits", "hidden"]


def run(level, batch, spec, backend, *, logits=None, **options):
    """Loss output and the gradient of the level's input."""
    if level == "hidden":
        leaf = batch.hidden.clone().requires_grad_()
        out = fastrl.policy_loss_from_hidden(leaf, batch.head(), batch.rollouts, spec, backend=backend, **options)
    else:
        leaf = (clean_logits(batch, fill=float("nan")).float() if logits is None else logits).clone().requires_grad_()
        if level == "logits":
            out = fastrl.policy_loss_from_logits(leaf, batch.rollouts, spec, backend=backend, **options)
        else:
            r = batch.rollouts
            logps, entropy = fastrl.logprobs_from_logits(leaf, r.token_ids, mask=r.mask, backend=backend)
            out = fastrl.policy_loss(logps, r, spec, entropy=entropy, backend=backend, **options)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out, gradient


@pytest.mark.parametrize("preset", [fastrl.PPO, fastrl.GSPO, fastrl.GSPO_TOKEN, fastrl.CISPO, fastrl.RLOO])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_3_on_policy_ratio_is_one_to_the_bit(backend, preset):
    """Scoring without gradient and training forward give the same bits, so old == new and the ratio is exactly 1."""
    name, device = backend
    batch = make_batch(V=4100, scale=3.0, device=device)
    logits = clean_logits(batch).float()
    ids, mask = batch.rollouts.token_ids, batch.rollouts.mask
    with torch.no_grad():
        old = fastrl.logprobs_from_logits(logits, ids, temperature=0.9, mask=mask, backend=name).logps
    rollouts = fastrl.Rollouts(ids, mask, torch.randn(4, device=device), old_logps=old, ref_logps=old)
    leaf = logits.requires_grad_()
    out = fastrl.policy_loss_from_logits(leaf, rollouts, preset.replace(kl_coef=0.1), temperature=0.9, backend=name)
    for metric in ("ratio_mean", "ratio_min", "ratio_max"):
        assert out.metrics[metric].item() == 1.0, metric
    for metric in ("approx_kl", "approx_kl_k3", "ref_kl", "clip_fraction"):
        assert out.metrics[metric].item() == 0.0, metric
    assert torch.equal(out.logps, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_3_without_old_logps_the_gradient_is_alive(backend):
    """old = None: the ratio is 1 and the gradient −w·A."""
    name, device = backend
    ids = torch.zeros(2, 3, dtype=torch.long, device=device)
    logps = torch.randn(2, 3, device=device).clamp_max(-0.1).requires_grad_()
    advantages = torch.tensor([2.0, -1.0], device=device)
    for spec in (fastrl.PPO, fastrl.GSPO.replace(aggregation="token-mean")):
        out = fastrl.policy_loss(logps, fastrl.Rollouts(ids, advantages=advantages), spec, backend=name)
        (gradient,) = torch.autograd.grad(out.loss, logps)
        close(gradient, -advantages[:, None].expand(2, 3) / 6, ulps=4)
        assert out.metrics["ratio_mean"] == 1 and out.metrics["ratio_min"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_3_k3_is_never_negative(backend):
    name, device = backend
    gaps = torch.cat([torch.logspace(-12, 1, 500), -torch.logspace(-12, 1, 500), torch.zeros(1)]).to(device)
    ids = torch.zeros(1, len(gaps), dtype=torch.long, device=device)
    for gap in gaps[::25]:
        ref = torch.full((1, len(gaps)), -20.0, device=device)
        rollouts = fastrl.Rollouts(ids, advantages=torch.zeros(1, device=device), ref_logps=ref)
        out = fastrl.policy_loss(ref + gap, rollouts, fastrl.PPO.replace(kl_coef=1.0), backend=name)
        assert out.loss >= 0 and out.metrics["ref_kl"] >= 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_4_masked_means_never_read(backend, level, name):
    """Other garbage under the mask changes no bit of loss, gradient or metric; gradient and outputs there are 0."""
    engine, device = backend
    spec = KINDS[name]
    batch = make_batch(device=device)
    out, gradient = run(level, batch, spec, engine)
    dead = ~batch.rollouts.mask
    assert (gradient[dead] == 0).all() and (out.logps[dead] == 0).all() and (out.entropy[dead] == 0).all()
    assert out.loss.isfinite() and gradient.isfinite().all()

    other = make_batch(device=device)
    r = other.rollouts
    values = {"old_logps": -1e30, "ref_logps": float("nan"), "rollout_logps": float("inf")}
    changed = {field: getattr(r, field).masked_fill(dead, value) for field, value in values.items()}
    ids = r.token_ids.masked_fill(dead, 2**40)
    other.rollouts = fastrl.Rollouts(ids, r.mask, rewards=r.rewards, group_size=2, **changed)
    other.hidden = batch.hidden.masked_fill(dead[..., None], float("-inf"))
    logits = None if level == "hidden" else clean_logits(batch, fill=float("inf")).float()
    out_2, gradient_2 = run(level, other, spec, engine, logits=logits)
    assert torch.equal(out.loss, out_2.loss) and torch.equal(gradient, gradient_2)
    for metric in out.metrics:
        assert torch.equal(out.metrics[metric], out_2.metrics[metric]), metric


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_4_everything_masked(backend, level, name):
    """unsloth-zoo#1286: an all-masked batch gives loss 0 and zero gradients, never 0/0."""
    engine, device = backend
    batch = make_batch(device=device)
    r = batch.rollouts
    nothing = torch.zeros_like(r.mask)
    batch.rollouts = fastrl.Rollouts(
        r.token_ids,
        nothing,
        rewards=r.rewards,
        group_size=2,
        old_logps=r.old_logps,
        ref_logps=r.ref_logps,
        rollout_logps=r.rollout_logps,
    )
    out, gradient = run(level, batch, KINDS[name], engine)
    assert out.loss == 0 and (gradient == 0).all()
    assert all(value == 0 for value in out.metrics.to_floats().values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_4_nan_at_a_valid_token_propagates(backend, level):
    name, device = backend
    for spec in (fastrl.GRPO.replace(kl_coef=0.1), fastrl.GSPO):
        batch = make_batch(device=device)
        at = tuple(batch.rollouts.mask.nonzero()[0].tolist())
        batch.hidden[at] = float("nan")
        logits = clean_logits(batch).float()
        logits[at] = float("nan")
        out, gradient = run(level, batch, spec, name, logits=logits)
        assert out.loss.isnan() and gradient[at].isnan().any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ppo", "unbounded", "k3", "gspo", "dual-clip", "custom"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_5_overflow(backend, name, sign):
    """trl#3015, OpenRLHF#1335: log-ratios of ±200 stay finite, with zero gradient there, and are counted."""
    engine, device = backend
    spec = OPTIONS[name]
    logps = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]], device=device, requires_grad=True)
    old = (logps.detach() - sign * torch.tensor([[200.0, 200.0], [0.1, -0.1]], device=device)).detach()
    ids = torch.zeros(2, 2, dtype=torch.long, device=device)
    rollouts = fastrl.Rollouts(ids, advantages=torch.tensor([1.0, -1.0], device=device), old_logps=old, ref_logps=old)
    entropy = torch.ones(2, 2, device=device)
    out = fastrl.policy_loss(logps, rollouts, spec.replace(kl_coef=0.0), entropy=entropy, backend=engine)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert out.loss.isfinite() and gradient.isfinite().all() and (gradient[0] == 0).all()
    assert out.metrics["clamped_fraction"] == 0.5
    with_kl = fastrl.policy_loss(logps, rollouts, fastrl.PPO.replace(kl_coef=1.0), backend=engine)
    assert with_kl.loss.isfinite() and with_kl.metrics["clamped_fraction"] == 0.5


@pytest.mark.parametrize("name", ["ppo", "k3", "gspo", "dual-clip", "delta"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_5_inside_the_bound_nothing_changes(backend, name):
    """Bitwise that of the unclamped formula."""
    engine, device = backend
    batch = make_batch(device=device)
    spec = OPTIONS[name]
    held, gradient = run("logits", batch, spec, engine)
    free, free_gradient = run("logits", batch, spec.replace(log_ratio_clamp=None), engine)
    assert torch.equal(held.loss, free.loss) and torch.equal(gradient, free_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [37, 600, 4133])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_9_batch_invariance(backend, V, dtype):
    """verl#6280: the same row gives the same bits alone, in a batch, and in any position; forward and backward. Torch's
    own sums on CUDA choose their blocks by the number of rows: plain torch is equal there within rounding."""
    name, device = backend
    N = 7
    logits = (torch.randn(N, V) * 3).to(device, dtype)
    ids = torch.randint(0, V, (N,), device=device)
    c, e = torch.randn(N, device=device), torch.randn(N, device=device)

    def score(rows):
        leaf = logits[rows].clone().requires_grad_()
        out = fastrl.logprobs_from_logits(leaf, ids[rows], backend=name)
        (gradient,) = torch.autograd.grad(out, leaf, (c[rows], e[rows]))
        return out.logps, out.entropy, gradient

    whole = score(torch.arange(N, device=device))
    for rows in ([3], [0], [6, 3], [5, 4, 3, 2, 1, 0]):
        rows = torch.tensor(rows, device=device)
        for part, full in zip(score(rows), whole, strict=True):
            if backend == ("torch", "cuda"):
                close(part, full[rows], ulps=16, dtype=part.dtype)
            else:
                assert torch.equal(part, full[rows])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_9_the_same_bits_on_every_run(backend, level):
    name, device = backend
    batch = make_batch(B=6, T=9, device=device)
    for spec in (fastrl.DAPO.replace(kl_coef=0.1, entropy_coef=0.1), fastrl.GSPO):
        out, gradient = run(level, batch, spec, name)
        for _ in range(5):
            again, gradient_again = run(level, batch, spec, name)
            assert torch.equal(out.loss, again.loss) and torch.equal(gradient, gradient_again)


@pytest.mark.parametrize("name", PARTITIONED)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_10_partition_invariance(backend, level, name):
    """With an explicit normaliser, micro-batches sum to the whole: losses, gradients and metrics, for any split; groups
    of rewards may be torn apart."""
    engine, device = backend
    spec = KINDS[name]
    batch = make_batch(B=6, device=device, group_size=3)
    whole, gradient = run(level, batch, spec, engine)
    normalizer = batch.rollouts.normalizer(spec)
    total, parts, metrics = 0.0, [], None
    for part in batch.rollouts.split(4):
        rows = part.token_slice
        small = type(batch)(batch.hidden[rows], batch.weight, batch.bias, part)
        logits = None if level == "hidden" else clean_logits(batch, fill=float("nan")).float()[rows]
        out, piece = run(level, small, spec, engine, logits=logits, normalizer=normalizer)
        total, metrics = total + out.loss.detach(), out.metrics if metrics is None else metrics.merge(out.metrics)
        parts.append(piece)
    close(total, whole.loss, ulps=200, what="loss")
    close(torch.cat(parts), gradient, ulps=64, what="gradient")
    for metric in whole.metrics:
        torch.testing.assert_close(metrics[metric], whole.metrics[metric], rtol=1e-5, atol=1e-6, msg=metric)


@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_10_order_and_padding(backend):
    """Sequences in another order, and with more padding, give the same loss."""
    name, device = backend
    batch = make_batch(device=device, rewards=False)
    logits = clean_logits(batch, fill=float("nan")).float()
    r = batch.rollouts
    for spec in (fastrl.GRPO.replace(kl_coef=0.1), fastrl.GSPO):
        want = fastrl.policy_loss_from_logits(logits, r, spec, backend=name).loss
        order = torch.tensor([3, 1, 0, 2], device=device)

        def wide(x, order=order):
            return torch.nn.functional.pad(x[order], (2, 3))

        more = fastrl.Rollouts(
            wide(r.token_ids),
            wide(r.mask),
            r.advantages[order],
            old_logps=wide(r.old_logps),
            ref_logps=wide(r.ref_logps),
        )
        padded = torch.nn.functional.pad(logits[order], (0, 0, 2, 3), value=float("nan"))
        close(fastrl.policy_loss_from_logits(padded, more, spec, backend=name).loss, want, ulps=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_7_long_sequences(backend):
    """T >= 65,536 on grid x (Liger#1294 dies on grid y); log-prob level, where a token costs nothing."""
    name, device = backend
    T = 65_537 + 4
    logps = torch.full((1, T), -1.0, device=device).requires_grad_()
    ids = torch.zeros(1, T, dtype=torch.long, device=device)
    rollouts = fastrl.Rollouts(ids, advantages=torch.tensor([2.0], device=device))
    for spec in (fastrl.GRPO, fastrl.GSPO):
        out = fastrl.policy_loss(logps, rollouts, spec, backend=name)
        (gradient,) = torch.autograd.grad(out.loss, logps)
        close(out.loss, torch.tensor(-2.0), ulps=200)
        close(gradient, torch.full((1, T), -2.0 / T), ulps=200)


@pytest.mark.gpu
def test_promise_7_rows_on_grid_x_and_int64_offsets():
    """N·V > 2³¹: the last row is scored right (a 32-bit offset would wrap)."""
    V, N = 32768, 2**31 // 32768 + 8
    logits = torch.zeros(N, V, device="cuda", dtype=torch.bfloat16)
    logits[-1, 5] = 4.0
    out = fastrl.logprobs_from_logits(logits, torch.full((N,), 5, device="cuda"), backend="triton")
    want = torch.log_softmax(logits[-1].double(), -1)[5]
    close(out.logps[-1], want, ulps=32)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_7_empty_and_single(backend, level, shape):
    name, device = backend
    B, T = shape
    ids = torch.zeros(B, T, dtype=torch.long, device=device)
    rollouts = fastrl.Rollouts(ids, advantages=torch.ones(B, device=device), old_logps=torch.zeros(B, T, device=device))
    head = fastrl.LMHead(torch.randn(7, 3, device=device))
    for spec in (fastrl.GRPO, fastrl.GSPO, fastrl.DAPO.replace(entropy_coef=0.1)):
        if level == "hidden":
            leaf = torch.randn(B, T, 3, device=device, requires_grad=True)
            out = fastrl.policy_loss_from_hidden(leaf, head, rollouts, spec, backend=name)
        elif level == "logits":
            leaf = torch.randn(B, T, 7, device=device, requires_grad=True)
            out = fastrl.policy_loss_from_logits(leaf, rollouts, spec, backend=name)
        else:
            leaf = -torch.rand(B, T, device=device).requires_grad_()
            out = fastrl.policy_loss(leaf, rollouts, spec, entropy=torch.zeros_like(leaf), backend=name)
        out.loss.backward() if leaf.is_leaf else torch.autograd.grad(out.loss, leaf)
        assert out.loss.isfinite() and out.metrics["tokens"] == B * T
        if B * T == 0:
            assert out.loss == 0


@pytest.mark.gpu
def test_promise_11_no_recompilation(monkeypatch):
    """None for a new N, T, epsilon, temperature or coefficient, after the first two shapes."""
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *_, **kw: compiled.append(kw.get("repr")))
    counts = []
    for i, (B, T) in enumerate([(4, 6), (6, 16), (8, 17), (2, 33), (4, 64)]):
        batch = make_batch(B=B, T=T, V=48, device="cuda")
        spec = fastrl.GRPO.replace(epsilon_low=0.1 + 0.01 * i, kl_coef=0.1 + 0.1 * i)
        run("logits", batch, spec, "triton", temperature=0.5 + 0.1 * i)
        run("logprobs", batch, spec, "triton")
        counts.append(len(compiled))
    assert counts[0] > 0 and len(set(counts[1:])) == 1, (counts, compiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_advantage_rows_are_scored_and_not_differentiated(backend):
    """Promise 11: exact, with and without the caller's counts; wrong counts turn the loss into NaN."""
    name, device = backend
    batch = make_batch(device=device, rewards=False)
    r = batch.rollouts
    advantages = torch.tensor([0.0, 1.0, 2.0, 0.0], device=device)
    valid, live = int(r.mask.sum()), int(r.mask[1].sum() + r.mask[2].sum())

    spec = fastrl.GRPO.replace(epsilon_low=None, epsilon_high=None)

    def loss(row_counts=None):
        rollouts = fastrl.Rollouts(r.token_ids, r.mask, advantages, old_logps=r.old_logps, row_counts=row_counts)
        batch.rollouts = rollouts
        leaf = batch.hidden.clone().requires_grad_()
        out = fastrl.policy_loss_from_hidden(leaf, batch.head(), rollouts, spec, backend=name, buffer_bytes=600)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return out, gradient

    out, gradient = loss()
    truth = truth_from_logits(clean_logits(batch), batch.rollouts, spec, 1.0)
    close(out.loss, truth.loss, ulps=200)
    close(out.logps, truth.logps)
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()
    given, same = loss((valid, live))
    assert torch.equal(given.loss, out.loss) and torch.equal(same, gradient)
    for wrong in ((valid, live - 1), (valid - 1, live)):
        out, gradient = loss(wrong)
        assert out.loss.isnan() and gradient.isnan().any()  # an optimiser step must not pass unseen either
