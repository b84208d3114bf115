"""Promises 1 and 2: every preset and option, at every level, on every backend, against the fp64 reference: the value
and every gradient; in low precision no worse than twice plain torch in the same dtype."""

from __future__ import annotations

import pytest
import torch
from common import (
    BACKENDS,
    EVERY_OPTION,
    KINDS,
    PRESETS,
    clean_logits,
    close,
    make_batch,
    no_worse_than_torch,
    transform,
    truth_from_hidden,
    truth_from_logits,
    wide_flat,
)

import fastrl
from fastrl import reference
from fastrl.metrics import STATISTICS, Metrics

SPECS = [pytest.param(spec, id=name) for name, spec in EVERY_OPTION.items()]


PLAIN = [
    "ppo",
    "dr_grpo",
    "gspo",
    "cispo",
    "gmpo",
    "vespo",
    "rloo",
]  # presets whose error in half precision is compared


def same_metrics(got: Metrics, truth: torch.Tensor, rollouts: fastrl.Rollouts, spec: fastrl.LossSpec) -> None:
    want = Metrics(truth, wide_flat(rollouts, spec).counts.cpu(), tuple(got))
    for name in want:
        torch.testing.assert_close(got[name].cpu(), want[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_1_logits(backend, spec):
    name, device = backend
    batch = make_batch(device=device)
    logits = clean_logits(batch, fill=float("nan")).float().requires_grad_()
    truth = truth_from_logits(logits, batch.rollouts, spec, 0.7)
    out = fastrl.policy_loss_from_logits(logits, batch.rollouts, spec, temperature=0.7, backend=name)
    out.loss.backward()
    close(out.loss, truth.loss, ulps=200, what="loss")
    close(out.logps, truth.logps, what="logps")
    close(out.entropy, truth.entropy, what="entropy")
    close(logits.grad, truth.gradients[0], ulps=200, what="dlogits")
    same_metrics(out.metrics, truth.statistics, batch.rollouts, spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_1_logprobs(backend, spec):
    name, device = backend
    batch = make_batch(device=device)
    logits = clean_logits(batch).float().requires_grad_()
    truth = truth_from_logits(logits, batch.rollouts, spec, 0.7)
    ids, mask = batch.rollouts.token_ids, batch.rollouts.mask
    logps, entropy = fastrl.logprobs_from_logits(logits, ids, temperature=0.7, mask=mask, backend=name)
    out = fastrl.policy_loss(logps, batch.rollouts, spec, entropy=entropy, backend=name)
    out.loss.backward()
    close(out.loss, truth.loss, ulps=200, what="loss")
    close(logits.grad, truth.gradients[0], ulps=200, what="dlogits")
    same_metrics(out.metrics, truth.statistics, batch.rollouts, spec)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [pytest.param(spec, 7, id=name) for name, spec in EVERY_OPTION.items()]
    + [pytest.param(spec, rows, id=f"{name}-rows{rows}") for rows in (1, 64) for name, spec in KINDS.items()],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_1_hidden(backend, spec, rows):
    """Chunks of one row, of a few, and everything in one; a sequence that does not fit its chunk included."""
    name, device = backend
    batch = make_batch(device=device)
    truth = truth_from_hidden(batch, spec)
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    out = fastrl.policy_loss_from_hidden(
        leaves[0],
        batch.head(*leaves[1:]),
        batch.rollouts,
        spec,
        temperature=0.7,
        buffer_bytes=rows * 48 * 4,
        backend=name,
    )
    out.loss.backward()
    close(out.loss, truth.loss, ulps=200, what="loss")
    close(out.logps, truth.logps, what="logps")
    close(out.entropy, truth.entropy, what="entropy")
    for leaf, want, what in zip(leaves, truth.gradients, ("dhidden", "dweight", "dbias"), strict=True):
        close(leaf.grad, want, ulps=400, what=what)
    same_metrics(out.metrics, truth.statistics, batch.rollouts, spec)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_1_hidden_scores_then_loss(backend, preset):
    """`policy_loss_from_hidden` equals `policy_loss(*logprobs_from_hidden(...))`, with a softcap and a logit scale."""
    name, device = backend
    batch = make_batch(device=device, softcap=4.0, logit_scale=0.8)
    truth = truth_from_hidden(batch, preset)
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    logps, entropy = fastrl.logprobs_from_hidden(
        leaves[0],
        batch.head(*leaves[1:]),
        batch.rollouts.token_ids,
        temperature=0.7,
        mask=batch.rollouts.mask,
        buffer_bytes=5 * 48 * 4,
        backend=name,
    )
    out = fastrl.policy_loss(logps, batch.rollouts, preset, entropy=entropy, backend=name)
    out.loss.backward()
    close(out.loss, truth.loss, ulps=200, what="loss")
    for leaf, want, what in zip(leaves, truth.gradients, ("dhidden", "dweight", "dbias"), strict=True):
        close(leaf.grad, want, ulps=400, what=what)


@pytest.mark.parametrize("temperature", [1.0, 0.6, "per-token"], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logit_transforms(backend, softcap, temperature):
    name, device = backend
    batch = make_batch(device=device, softcap=softcap, logit_scale=1.3, scale=3.0)
    if temperature == "per-token":
        batch.temperature = torch.rand(4, 6, device=device) + 0.5
    else:
        batch.temperature = temperature
    spec = fastrl.GRPO.replace(kl_coef=0.1, entropy_coef=0.05)
    truth = truth_from_hidden(batch, spec)
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    head = batch.head(*leaves[1:])
    out = fastrl.policy_loss_from_hidden(
        leaves[0], head, batch.rollouts, spec, temperature=batch.temperature, backend=name
    )
    out.loss.backward()
    close(out.logps, truth.logps, what="logps")
    close(out.entropy, truth.entropy, what="entropy")
    for leaf, want, what in zip(leaves, truth.gradients, ("dhidden", "dweight", "dbias"), strict=True):
        close(leaf.grad, want, ulps=400, what=what)


@pytest.mark.parametrize("preset", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_2_logits(backend, dtype, preset):
    """Against fp64 on the same rounded logits, beside plain torch in the same dtype."""
    name, device = backend
    spec = PRESETS[preset].replace(kl_coef=0.1, entropy_coef=0.02)
    batch = make_batch(V=61, device=device, scale=2.0, garbage=False)
    logits = clean_logits(batch).to(dtype)
    truth = truth_from_logits(logits, batch.rollouts, spec, 0.7)

    plain = logits.clone().requires_grad_()
    scaled = plain / 0.7
    chosen, entropy = reference.log_softmax_and_entropy(scaled.flatten(0, 1), batch.rollouts.token_ids.reshape(-1))
    plain_loss, _ = reference.token_loss(chosen, entropy, batch.rollouts.flat, None, spec)
    plain_loss.backward()

    ours = logits.clone().requires_grad_()
    out = fastrl.policy_loss_from_logits(ours, batch.rollouts, spec, temperature=0.7, backend=name)
    out.loss.backward()
    assert out.loss.dtype == out.logps.dtype == out.entropy.dtype == torch.float32
    largest = truth.logps.abs().max().item()
    no_worse_than_torch(out.loss, plain_loss, truth.loss, torch.float32, "loss", scale=largest)
    valid = batch.rollouts.mask.reshape(-1)
    no_worse_than_torch(
        out.logps.reshape(-1)[valid], chosen[valid], truth.logps.reshape(-1)[valid.cpu()], dtype, "logps"
    )
    # The interpreter truncates bf16 stores where a GPU rounds to nearest: an error of up to one ulp instead of half.
    # A product of a whole sequence's ratios inherits the rounding of all their log-probs.
    product = truth.logps.abs().sum(-1).max().item() if spec.ratio_level == "sequence_sum" else 0.0
    scale = product * truth.gradients[0].abs().max().item()
    no_worse_than_torch(ours.grad, plain.grad, truth.gradients[0], dtype, "dlogits", scale=scale)


@pytest.mark.parametrize("preset", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_2_hidden(backend, dtype, preset):
    """The same from hidden states: the logits are rounded to the dtype by the GEMM, here as in plain torch."""
    name, device = backend
    spec = PRESETS[preset].replace(kl_coef=0.1, entropy_coef=0.02)
    batch = make_batch(B=4, T=12, V=61, H=16, device=device, dtype=dtype, garbage=False)
    truth = truth_from_hidden(batch, spec)

    plain = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    scaled = transform(*plain, batch) / 0.7
    chosen, entropy = reference.log_softmax_and_entropy(scaled.flatten(0, 1), batch.rollouts.token_ids.reshape(-1))
    plain_loss, _ = reference.token_loss(chosen, entropy, batch.rollouts.flat, None, spec)
    plain_loss.backward()

    ours = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    out = fastrl.policy_loss_from_hidden(
        ours[0],
        batch.head(*ours[1:]),
        batch.rollouts,
        spec,
        temperature=0.7,
        buffer_bytes=9 * 64 * batch.weight.element_size(),
        backend=name,
    )
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    largest = truth.logps.abs().max().item()
    no_worse_than_torch(out.loss, plain_loss, truth.loss, dtype, "loss", scale=largest)
    names = ("dhidden", "dweight", "dbias")
    for leaf, theirs, want, what in zip(ours, plain, truth.gradients, names, strict=True):
        assert leaf.grad.dtype == dtype
        no_worse_than_torch(leaf.grad, theirs.grad, want, dtype, what)


@pytest.mark.parametrize("spec", [fastrl.DAPO, fastrl.GSPO.replace(kl_coef=0.1)], ids=["token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend, spec):
    """The same tokens, packed without their padding, with ragged groups given by ids."""
    name, device = backend
    batch = make_batch(device=device)
    padded = fastrl.policy_loss_from_hidden(batch.hidden, batch.head(), batch.rollouts, spec, backend=name)
    packed, rows = batch.rollouts.pack()
    assert packed.cu_seqlens is not None and packed.shape == rows.shape
    hidden = batch.hidden.flatten(0, 1)[rows].requires_grad_()
    out = fastrl.policy_loss_from_hidden(hidden, batch.head(), packed, spec, backend=name)
    out.loss.backward()
    close(out.loss, padded.loss, ulps=16, what="loss")
    for metric in out.metrics:
        torch.testing.assert_close(out.metrics[metric], padded.metrics[metric], rtol=1e-5, atol=1e-6)
    logits = clean_logits(batch).float().flatten(0, 1)[rows]
    from_logits = fastrl.policy_loss_from_logits(logits, packed, spec, backend=name)
    close(from_logits.loss, padded.loss, ulps=64, what="loss from logits")


def test_statistics_table_has_no_unknown_column():
    """Every column of the statistics feeds a metric; the two tables cannot drift apart."""
    spec = fastrl.PPO.replace(dual_clip=2.0)
    names = fastrl.metrics.metric_names(spec, entropy=True, ref=True, rollout=True, weights=True)
    values = Metrics(torch.arange(1.0, len(STATISTICS) + 1), torch.tensor([7.0, 2.0, 0.0]), names)
    seen = {round(float(values[name] * 7), 3) for name in values} | {
        float(values["ratio_min"]),
        float(values["ratio_max"]),
    }
    for column, value in zip(STATISTICS, range(1, len(STATISTICS) + 1), strict=True):
        assert column.endswith("square") or float(value) in seen, column
