"""Promises 8 and 12: who gets a gradient, retain_graph, double backward, GradScaler, autocast, checkpointing,
in-place."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import BACKENDS, clean_logits, close, make_batch, truth_from_hidden, truth_from_logits
from torch.utils.checkpoint import checkpoint

import fastrl

SPEC = fastrl.GRPO.replace(kl_coef=0.1, entropy_coef=0.02)


def hidden_loss(leaves, batch, backend, spec=SPEC, **options):
    head = batch.head(*leaves[1:])
    return fastrl.policy_loss_from_hidden(
        leaves[0], head, batch.rollouts, spec, temperature=0.7, backend=backend, buffer_bytes=900, **options
    ).loss


@pytest.mark.parametrize("wants", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("through", ["loss", "logprobs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_8_needs_input_grad(backend, through, wants):
    """Every subset of hidden, weight and bias; a frozen head gets and allocates no gradient."""
    name, device = backend
    batch = make_batch(device=device)
    leaves = [
        x.clone().requires_grad_(want) for x, want in zip((batch.hidden, batch.weight, batch.bias), wants, strict=True)
    ]
    if through == "loss":
        loss = hidden_loss(leaves, batch, name)
    else:
        r = batch.rollouts
        logps, entropy = fastrl.logprobs_from_hidden(
            leaves[0],
            batch.head(*leaves[1:]),
            r.token_ids,
            temperature=0.7,
            mask=r.mask,
            backend=name,
            buffer_bytes=900,
        )
        loss = fastrl.policy_loss(logps, r, SPEC, entropy=entropy, backend=name).loss
    assert loss.requires_grad == any(wants)
    if any(wants):
        loss.backward()
    truth = truth_from_hidden(batch, SPEC)
    for leaf, want, gradient in zip(leaves, wants, truth.gradients, strict=True):
        if want:
            close(leaf.grad, gradient, ulps=400)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_8_nothing_for_gradients_under_no_grad(backend, monkeypatch):
    """No gradient step runs, and no gradient buffer exists, under no_grad, inference_mode, or without requires_grad."""
    from fastrl import backend as backends

    name, device = backend
    engine = backends.load(name)

    def forbidden(*_, **__):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(engine, "differentiate", forbidden)
    monkeypatch.setattr(engine, "score_and_differentiate", forbidden, raising=False)
    batch = make_batch(device=device)
    logits = clean_logits(batch).float()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = fastrl.policy_loss_from_logits(logits, batch.rollouts, SPEC, backend=name)
            hidden_loss([batch.hidden.requires_grad_(), batch.weight, batch.bias], batch, name)
            assert not out.loss.requires_grad
    batch.hidden.requires_grad_(False)
    assert not hidden_loss([batch.hidden, batch.weight, batch.bias], batch, name).requires_grad
    with pytest.raises(AssertionError, match="a gradient was computed"):
        hidden_loss([batch.hidden.requires_grad_(), batch.weight, batch.bias], batch, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_retain_graph(backend):
    """A second backward gives the same gradient again, at every level, though the first handed out its buffer."""
    name, device = backend
    batch = make_batch(device=device)
    logits = clean_logits(batch).float().requires_grad_()
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    cases = [
        (fastrl.policy_loss_from_logits(logits, batch.rollouts, SPEC, backend=name).loss, [logits]),
        (hidden_loss(leaves, batch, name), leaves),
    ]
    for loss, inputs in cases:
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        first = [g.clone() for g in first]
        second = torch.autograd.grad(loss, inputs, torch.tensor(2.0, device=device), retain_graph=True)
        third = torch.autograd.grad(loss, inputs)
        for a, b, c in zip(first, second, third, strict=True):
            close(b, 2 * a, ulps=8)
            close(c, a, ulps=8)


@pytest.mark.parametrize("level", ["logprobs", "loss", "logits", "hidden-logprobs", "hidden"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_double_backward_is_refused_clearly(backend, level):
    name, device = backend
    batch = make_batch(device=device, garbage=False)
    r = batch.rollouts
    logits = clean_logits(batch).float().requires_grad_()
    hidden = batch.hidden.requires_grad_()
    leaf, value = {
        "logprobs": lambda: (logits, fastrl.logprobs_from_logits(logits, r.token_ids, backend=name).logps.sum()),
        "loss": lambda: (logits, fastrl.policy_loss(logits[..., 0], r, fastrl.PPO, backend=name).loss),
        "logits": lambda: (logits, fastrl.policy_loss_from_logits(logits, r, SPEC, backend=name).loss),
        "hidden-logprobs": lambda: (
            hidden,
            fastrl.logprobs_from_hidden(hidden, batch.head(), r.token_ids, backend=name).logps.sum(),
        ),
        "hidden": lambda: (hidden, fastrl.policy_loss_from_hidden(hidden, batch.head(), r, SPEC, backend=name).loss),
    }[level]()
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


# The plan of a pick within the batch, with bounds that pick nothing: a rounded log-prob must not change the loss itself.
NO_PICK = fastrl.CLIP_COV.replace(clip_cov_low=50.0, clip_cov_high=51.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", [fastrl.GRPO, fastrl.GSPO, NO_PICK])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_loss_scaling(backend, preset, dtype):
    """GradScaler's 2¹⁶: float16 gradients of 1/N times a probability must not underflow before it arrives."""
    name, device = backend
    batch = make_batch(B=4, T=30, V=96, H=8, dtype=dtype, device=device, garbage=False, rewards=False)
    r = batch.rollouts
    normalizer = 2.0**20  # a token count as of a large global batch: weights below fp16's smallest number
    preset = preset.replace(entropy_coef=0.01)
    scale = 2.0**18
    truth = truth_from_hidden(batch, preset, normalizer=normalizer)
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    loss = hidden_loss(leaves, batch, name, preset, normalizer=normalizer)
    (loss * scale).backward()
    for leaf, want in zip(leaves, truth.gradients, strict=True):
        # a few roundings of the dtype, logits included, and fp16's subnormals
        error = (leaf.grad.cpu().double() / scale - want).abs().max()
        assert error <= 16 * torch.finfo(dtype).eps * want.abs().max(), error / want.abs().max()
    logits = clean_logits(batch).to(dtype)
    truth = truth_from_logits(logits, r, preset, 0.7, normalizer=normalizer)
    leaf = logits.requires_grad_()
    out = fastrl.policy_loss_from_logits(leaf, r, preset, temperature=0.7, normalizer=normalizer, backend=name)
    (out.loss * scale).backward()
    error = (leaf.grad.cpu().double() / scale - truth.gradients[0]).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * truth.gradients[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_autocast(backend, dtype):
    """fp32 parameters under autocast: the head's GEMM runs in the autocast dtype, the rest in fp32, and the gradients
    come back in fp32; logits and log-probs are never cast down."""
    name, device = backend
    batch = make_batch(device=device)
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    low = [x.to(dtype) for x in (batch.hidden, batch.weight, batch.bias)]
    with torch.autocast(torch.device(device).type, dtype=dtype):
        loss = hidden_loss(leaves, batch, name)
        logits = clean_logits(batch).float()
        inside = fastrl.policy_loss_from_logits(logits, batch.rollouts, SPEC, backend=name).loss
    outside = fastrl.policy_loss_from_logits(logits, batch.rollouts, SPEC, backend=name).loss
    assert torch.equal(inside, outside)
    assert torch.equal(loss, hidden_loss(low, batch, name))
    loss.backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_checkpointing(backend, reentrant):
    name, device = backend
    batch = make_batch(device=device)
    results = []
    for wrap in (False, True):
        leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]

        def step(*args):
            return hidden_loss(args, batch, name)

        loss = checkpoint(step, *leaves, use_reentrant=reentrant) if wrap else step(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("spec", [SPEC, fastrl.GSPO], ids=["token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace(backend, spec):
    """The gradient takes the logits' own memory; a stale use of them is refused, not silently wrong."""
    name, device = backend
    batch = make_batch(device=device)
    leaf = clean_logits(batch, fill=float("nan")).float().requires_grad_()
    want = fastrl.policy_loss_from_logits(leaf, batch.rollouts, spec, backend=name)
    (expected,) = torch.autograd.grad(want.loss, leaf)
    logits = leaf * 1.0
    out = fastrl.policy_loss_from_logits(logits, batch.rollouts, spec, inplace=True, backend=name)
    assert torch.equal(out.loss, want.loss) and torch.equal(logits.detach(), expected)
    (gradient,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="inplace=True"):
        torch.autograd.grad(out.loss, leaf)

    logits = leaf * 1.0
    squashed = logits.exp()  # saves its result; logits * logits saves the logits themselves
    product = (logits * logits).sum()
    fastrl.policy_loss_from_logits(logits, batch.rollouts, spec, inplace=True, backend=name)
    squashed.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.no_grad():
        kept = leaf.detach().clone()
        fastrl.policy_loss_from_logits(kept, batch.rollouts, spec, inplace=True, backend=name)
        assert torch.equal(kept.nan_to_num(), leaf.detach().nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_writes_through_strides(backend):
    name, device = backend
    batch = make_batch(device=device)
    leaf = clean_logits(batch).float().requires_grad_()
    want = torch.autograd.grad(fastrl.policy_loss_from_logits(leaf, batch.rollouts, SPEC, backend=name).loss * 3, leaf)
    wide = torch.nn.functional.pad(leaf, (0, 11, 1, 2))
    view = wide[:, 1:-2, : leaf.shape[-1]]
    out = fastrl.policy_loss_from_logits(view, batch.rollouts, SPEC, inplace=True, backend=name)
    (got,) = torch.autograd.grad(out.loss * 3, leaf)
    close(got, want[0], ulps=8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_besides_the_loss_are_detached(backend):
    name, device = backend
    batch = make_batch(device=device)
    logits = clean_logits(batch).float().requires_grad_()
    out = fastrl.policy_loss_from_logits(logits, batch.rollouts, SPEC, backend=name)
    assert not out.logps.requires_grad and not out.entropy.requires_grad
    assert not any(out.metrics[metric].requires_grad for metric in out.metrics)
    logps = out.logps.clone().requires_grad_()
    again = fastrl.policy_loss(logps, batch.rollouts, SPEC, entropy=out.entropy, backend=name)
    assert not again.logps.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_objective_with_state_and_branches(backend):
    """A callable may close over tensors and branch on values; only its derivative is used."""
    name, device = backend
    width = torch.tensor(0.3, device=device)

    def soft(log_ratio, advantages):
        if bool((advantages > 1e6).any()):
            raise AssertionError
        return -advantages * width * torch.tanh(log_ratio / width)

    batch = make_batch(device=device)
    spec = fastrl.LossSpec(objective=soft, kl_coef=0.1)
    truth = truth_from_hidden(
        batch, fastrl.LossSpec(objective=lambda d, a: -a * 0.3 * torch.tanh(d / 0.3), kl_coef=0.1)
    )
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    loss = hidden_loss(leaves, batch, name, spec)
    loss.backward()
    close(loss, truth.loss, ulps=200)
    for leaf, want in zip(leaves, truth.gradients, strict=True):
        close(leaf.grad, want, ulps=400)


def test_module_and_functions_agree():
    batch = make_batch()
    module = fastrl.PolicyLoss(fastrl.DAPO)
    logits = clean_logits(batch).float()
    want = fastrl.policy_loss_from_logits(logits, batch.rollouts, fastrl.DAPO).loss
    assert torch.equal(module.from_logits(logits, batch.rollouts).loss, want)
    assert "LossSpec" in repr(module)
    logps, entropy = fastrl.logprobs_from_logits(logits, batch.rollouts.token_ids, mask=batch.rollouts.mask)
    close(module(logps, batch.rollouts, entropy=entropy).loss, want, ulps=16)
    close(module.from_hidden(batch.hidden, batch.head(), batch.rollouts).loss, want, ulps=200)
