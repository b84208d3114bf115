"""`Rollouts.selected`: the tokens of `top_entropy_quantile`, picked by the caller over more than one call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from common import BACKENDS, close, make_batch

import fastrl
from fastrl.token_metrics import token_metrics

SPEC = fastrl.LossSpec(top_entropy_quantile=0.3, entropy_coef=0.1, kl_coef=0.05)


def run(rollouts, batch, spec, backend, level, **options):
    """Loss, gradient of the hidden states, output."""
    hidden = batch.hidden.clone().requires_grad_()
    rows, head = hidden[rollouts.token_slice], batch.head()
    if level == "hidden":
        out = fastrl.policy_loss_from_hidden(rows, head, rollouts, spec, backend=backend, **options)
    elif level == "logits":
        out = fastrl.policy_loss_from_logits(rows @ head.weight.t(), rollouts, spec, backend=backend, **options)
    else:
        scores = fastrl.logprobs_from_hidden(rows, head, rollouts.token_ids, mask=rollouts.mask, backend=backend)
        out = fastrl.policy_loss(scores.logps, rollouts, spec, entropy=scores.entropy, backend=backend, **options)
    out.loss.backward()
    return out, hidden.grad


@pytest.mark.parametrize("level", ["logprobs", "logits", "hidden"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_with_the_pick_of_the_whole_add_up(backend, level):
    name, device = backend
    batch = make_batch(V=64, scale=3.0, device=device)
    whole, gradient = run(batch.rollouts, batch, SPEC, name, level)
    kept = token_metrics(whole, batch.rollouts, SPEC).high_entropy
    chosen = dataclasses.replace(batch.rollouts, selected=kept)
    again, same = run(chosen, batch, SPEC, name, level)
    assert torch.equal(again.loss, whole.loss) and torch.equal(same, gradient)
    normalizer = batch.rollouts.normalizer(SPEC)
    parts = [run(part, batch, SPEC, name, level, normalizer=normalizer) for part in chosen.split(2)]
    close(sum(out.loss for out, _ in parts), whole.loss, ulps=64)
    close(sum(g for _, g in parts), gradient, ulps=512)
    alone = [run(part, batch, SPEC, name, level, normalizer=normalizer)[0] for part in batch.rollouts.split(2)]
    assert abs(sum(out.loss for out in alone) - whole.loss) > 1e-4 * abs(whole.loss)


def test_entropies_are_not_needed_for_a_given_pick():
    batch = make_batch(V=64)
    spec = fastrl.LossSpec(top_entropy_quantile=0.3)
    kept = torch.rand(batch.rollouts.shape) < 0.5
    rollouts = dataclasses.replace(batch.rollouts, selected=kept)
    logps = torch.full(rollouts.shape, -1.0)
    masked = dataclasses.replace(batch.rollouts, rollout_weights=kept.float())
    got = fastrl.policy_loss(logps, rollouts, spec).loss
    assert got == fastrl.policy_loss(logps, masked, fastrl.LossSpec()).loss
    packed, rows = rollouts.pack()
    assert torch.equal(packed.selected, kept.flatten()[rows])


def test_refused():
    batch = make_batch(V=64)
    ones = torch.ones(batch.rollouts.shape)
    with pytest.raises(ValueError, match="^selected: "):
        fastrl.policy_loss(-ones, dataclasses.replace(batch.rollouts, selected=ones.bool()))
    for wrong in (ones[:, :1], 0.5 * ones):
        with pytest.raises(ValueError, match="^selected: "):
            dataclasses.replace(batch.rollouts, selected=wrong)
