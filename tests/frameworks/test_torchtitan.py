"""torchtitan's DAPO and GRPO losses against a transcription of their formula, from logits, on its own batch format."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from frameworks.batches import assert_same, masked_sum, ppo

from fastrl.adapters.torchtitan import DAPOLoss, GRPOLoss


def microbatch(layout="padded", seed=0):
    """Logits, labels already shifted with -100 where nothing counts, one token that the generator did not score."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 6, 11, generator=g, dtype=torch.float64)
    labels = torch.randint(11, (3, 6), generator=g)
    mask = torch.rand(3, 6, generator=g) < 0.7
    mask[2] = seed == 0
    logps = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    generator = logps + 0.6 * torch.randn(3, 6, generator=g, dtype=torch.float64)
    generator[0, 0], mask[0, 0] = float("nan"), True
    generator[1, 1], mask[1, 1] = logps[1, 1] + 12, True  # beyond ±10
    advantages = torch.randn(3, 6, generator=g, dtype=torch.float64) * mask
    labels[~mask] = -100
    batch = SimpleNamespace(
        logits=logits, labels=labels, generator_logprobs=generator, advantages=advantages, loss_mask=mask
    )
    if layout == "packed":
        batch = SimpleNamespace(**{name: value.flatten(0, 1) for name, value in vars(batch).items()})
    return batch


def call(loss, batch, logits, count):
    rest = {name: getattr(batch, name) for name in ("generator_logprobs", "advantages", "loss_mask")}
    return loss(logits, batch.labels, count, **rest)


def transcribed(batch, logits, low, high, count):
    """Σ −min(r·A, clip(r)·A) over loss tokens with a finite generator log-prob, r = exp(clamp(d, ±10)), / count."""
    keep = batch.loss_mask & batch.generator_logprobs.isfinite()
    logps = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1)
    d = torch.where(keep, logps - batch.generator_logprobs, 0.0).clamp(-10, 10)
    return masked_sum(ppo(d, torch.zeros_like(d), batch.advantages, low, high), keep) / count


CASES = {
    "dapo": (DAPOLoss.Config(), 0.2, 0.2),
    "clip-higher": (DAPOLoss.Config(ratio_clip_low=0.1, ratio_clip_high=0.5), 0.1, 0.5),
    "grpo": (GRPOLoss.Config(clip_eps=0.05, global_vocab_size=11), 0.05, 0.05),
}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("count", [17, torch.tensor(23), None, 0])
@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient(name, count, layout):
    config, low, high = CASES[name]
    loss, batch = config.build(), microbatch(layout)
    divisor = 1.0 if count is None else max(float(count), 1.0)
    assert_same(
        lambda x: call(loss, batch, x, count)[0], lambda x: transcribed(batch, x, low, high, divisor), batch.logits
    )


def test_micro_batches_and_metrics_add_up():
    """Two unequal micro-batches with the global count: losses, gradients and metrics are those of all tokens at once."""
    loss, parts = DAPOLoss(None), [microbatch(seed=0), microbatch(seed=1)]
    counts = [int((b.loss_mask & b.generator_logprobs.isfinite()).sum()) for b in parts]
    assert counts[0] != counts[1]
    results = [call(loss, b, b.logits, sum(counts)) for b in parts]
    want = sum(transcribed(b, b.logits, 0.2, 0.2, sum(counts)) for b in parts)
    torch.testing.assert_close(sum(r[0] for r in results), want, rtol=1e-9, atol=0)
    metrics = {name: float(sum(r[1][name] for r in results)) for name in results[0][1]}
    d, ratio, entropy = [], [], []
    for b in parts:
        keep = b.loss_mask & b.generator_logprobs.isfinite()
        logps = b.logits.log_softmax(-1)
        chosen = logps.gather(-1, b.labels.clamp(min=0)[..., None]).squeeze(-1)
        d.append((chosen - b.generator_logprobs)[keep])
        ratio.append(d[-1].clamp(-10, 10).exp())
        entropy.append(-(logps.exp() * logps).sum(-1)[keep])
    expected = {
        "loss/mean": float(want),
        "loss/ratio_mean": float(torch.cat(ratio).mean()),
        "bit_wise/logprob_diff/mean": float(torch.cat(d).mean()),
        "trainer/entropy/mean": float(torch.cat(entropy).mean()),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert metrics["fastrl/clamped_fraction"] > 0


def test_refuses():
    with pytest.raises(ValueError, match="^kl_coef: expected a field of torchtitan 0.3, got an unknown one"):
        DAPOLoss({"kl_coef": 0.1})
    with pytest.raises(ValueError, match="^ratio_clip_low: "):
        GRPOLoss(DAPOLoss.Config())

    class DTensor(torch.Tensor):
        pass

    batch = microbatch()
    with pytest.raises(ValueError, match="^logits: expected a plain tensor with the whole vocabulary, got a DTensor"):
        call(DAPOLoss(None), batch, batch.logits.as_subclass(DTensor), 3)
