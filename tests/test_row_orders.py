"""On a GPU: a real vocabulary, whose rows many threads and programs add up, gives the same bits whoever adds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import fastrl

V, PADDED = 151936 - 8 * 17 - 3, 151936
SPEC = fastrl.GRPO.replace(kl_coef=0.04)


def _rollouts(rows: int) -> fastrl.Rollouts:
    ids = torch.randint(0, V, (1, rows), generator=torch.Generator().manual_seed(rows)).cuda()
    old = torch.full((1, rows), -12.0, device="cuda")
    return fastrl.Rollouts(ids, advantages=torch.ones(1, device="cuda"), old_logps=old, ref_logps=old + 0.1)


def _logits(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(1, rows, PADDED, generator=torch.Generator().manual_seed(0))).to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", ["whole", "padded vocabulary", "odd vocabulary"])
def test_few_and_many_rows_scoring_and_training(case, temperature, dtype, monkeypatch):
    """8 rows take three launches, 200 one; a view of padded rows has a gradient that lies otherwise."""
    from fastrl_kernels import tune

    monkeypatch.setattr(tune, "_met_many", set())
    whole = _logits(200, dtype)
    logits = whole if case == "whole" else whole[..., :V]
    logits = logits.contiguous() if case == "odd vocabulary" else logits
    results = []
    for rows in (8, 200):
        leaf = logits[:, :rows].detach().requires_grad_()
        batch = _rollouts(200)
        part = fastrl.Rollouts(
            batch.token_ids[:, :rows], advantages=batch.advantages, old_logps=batch.old_logps[:, :rows],
            ref_logps=batch.ref_logps[:, :rows],
        )  # fmt: skip
        with torch.no_grad():
            scored = fastrl.logprobs_from_logits(leaf, part.token_ids, temperature=temperature, backend="triton")
        spec = SPEC.replace(aggregation="token-sum")  # a token weighs the same in both
        out = fastrl.policy_loss_from_logits(leaf, part, spec, temperature=temperature, backend="triton")
        out.loss.backward()
        assert torch.equal(out.logps, scored.logps) and torch.equal(out.entropy, scored.entropy)
        results.append((out.logps[:, :8], out.entropy[:, :8], leaf.grad[:, :8]))
    for few, many in zip(*results, strict=True):
        assert torch.equal(few, many)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 200])
def test_fp32_logits_of_half_precision_operands(rows):
    """The gradient is bf16 beside fp32 logits: scoring and training still meet."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, rows, 64, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    head = fastrl.LMHead((0.2 * torch.randn(PADDED, 64, generator=generator)).to("cuda", torch.bfloat16))
    batch = _rollouts(rows)
    options = {"out_dtype": torch.float32, "backend": "triton"}
    with torch.no_grad():
        scored = fastrl.logprobs_from_hidden(hidden, head, batch.token_ids, **options)
    out = fastrl.policy_loss_from_hidden(hidden, head, batch, SPEC, **options)
    assert torch.equal(out.logps, scored.logps)
