"""torchtitan's DAPO and GRPO losses against a transcription of their formula, from logits, on its own batch format."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from frameworks.batches import assert_same, masked_sum, ppo

from fastrl.adapters.torchtitan import DAPOLoss, GRPOLoss


def microbatch(layout="padded", seed=0, columns=11):
    """Logits, labels already shifted with -100 where nothing counts, one token that the generator did not score."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 6, columns, generator=g, dtype=torch.float64)
    labels = torch.randint(columns, (3, 6), generator=g)
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
        "loss/ratio_clipped_frac": float(((torch.cat(ratio) - 1).abs() > 0.2).double().mean()),
        "bit_wise/ratio_tokens_different/mean": float((torch.cat(d).abs() > 1e-6).double().mean()),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert 0 < expected["loss/ratio_clipped_frac"] < 1
    assert 0 < metrics["fastrl/clip_frac"] < expected["loss/ratio_clipped_frac"], "ours goes by the sign of A"
    assert metrics["fastrl/clamped_frac"] > 0
    largest = max(float(r[1]["bit_wise/logprob_diff/max"]) for r in results)
    assert largest == pytest.approx(float(torch.cat(d).abs().max()), rel=1e-5)


def test_refuses():
    with pytest.raises(ValueError, match="^kl_coef: expected a field of torchtitan 0.3, got an unknown one"):
        DAPOLoss({"kl_coef": 0.1})
    with pytest.raises(ValueError, match="^ratio_clip_low: "):
        GRPOLoss(DAPOLoss.Config())


def test_a_part_of_the_vocabulary_is_refused():
    """Ids inside of a shard would have got a log-prob, over a part of the vocabulary."""
    batch = microbatch()
    batch.labels = batch.labels.clamp(max=4)
    loss = GRPOLoss.Config(global_vocab_size=11).build()
    call(loss, batch, batch.logits, 3)
    message = r"^logits: expected 11 columns \(global_vocab_size\), got a float64 tensor of shape \(3, 6, 5\)"
    with pytest.raises(ValueError, match=message):
        call(loss, batch, batch.logits[..., :5], 3)


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_over_two_processes(tmp_path):
    """Tensor parallelism in both of torchtitan's forms, DTensors and the plain shards of its default backend: loss,
    metrics and each rank's gradient are torchtitan's, and those of the whole vocabulary."""
    from frameworks import real, torchtitan_ranks

    real.torchtitan()  # skips here, not in the processes
    torch.multiprocessing.spawn(torchtitan_ranks.run, args=(str(tmp_path / "rendezvous"),), nprocs=2)
