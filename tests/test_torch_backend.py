"""The torch backend's way of keeping the exponentials, and how many rows it takes at once."""

from __future__ import annotations

import pytest
import torch

import fastrl
from fastrl import torch_backend
from fastrl.chunking import pieces, row_stride, rows_per_chunk
from fastrl.dtypes import wide
from fastrl.rows import RowScores, Scoring
from fastrl.token_inputs import token_inputs

B, T, V = 3, 5, 37


def _logits(dtype: torch.dtype) -> torch.Tensor:
    """Rows with −inf (one of them first, one at its target), a large offset and a confident token; NaN under the mask."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(B, T, V, dtype=dtype)
    logits[0, 0, :20] = -torch.inf
    logits[0, 1] += 1e4
    logits[1, 2, 4] += 60
    logits[2, 3] = torch.nan
    return logits


IDS = torch.full((B, T), 4)
MASK = torch.ones(B, T, dtype=torch.bool).index_put((torch.tensor([2]), torch.tensor([3])), torch.tensor(False))


@pytest.fixture(params=[2, 2**20], ids=["blocks", "one-block"])
def block_rows(request, monkeypatch):
    monkeypatch.setattr(torch_backend, "_block_rows", lambda logits: request.param)


def _steps(logits, inplace, temperature, dtype=torch.float32, softcap=0.0):
    """The gradient by A, B, C one by one and by `score_and_differentiate`, with everything in between."""
    temperature = torch.rand(B * T) + 0.5 if temperature == "per-token" else temperature
    scoring = Scoring.of(IDS.flatten(), MASK.flatten(), temperature, softcap=softcap)
    old = torch.full((B, T), -3.0)
    rollouts = fastrl.Rollouts(IDS, MASK, torch.tensor([1.0, -2.0, 0.5]), old_logps=old)
    spec = fastrl.GRPO
    inputs = token_inputs(rollouts.flat, None, spec, wide(dtype))

    def buffers():
        scores = torch.full((4, B * T), torch.nan, dtype=wide(dtype))
        return RowScores(*scores.unbind(0)), torch.full_like(scores[0], torch.nan)

    apart, dlogp = buffers()
    torch_backend.score(logits, scoring, apart)
    torch_backend.coefficients(apart, inputs, slice(None), spec, dlogp, None)
    want = torch.empty_like(logits)
    torch_backend.differentiate(logits, scoring, apart, dlogp, None, want)

    together, dlogp_2 = buffers()
    given = logits.clone()
    out = given if inplace else torch.full_like(logits, torch.nan)
    torch_backend.score_and_differentiate(given, scoring, inputs, spec, together, dlogp_2, None, out)
    if not inplace:
        assert torch.equal(given.nan_to_num(), logits.nan_to_num())
    return (want, *apart, dlogp), (out, *together, dlogp_2)


@pytest.mark.parametrize("temperature", [1.0, 0.7, "per-token"], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kept_exponentials_give_the_bits_of_the_single_steps(block_rows, dtype, inplace, temperature):
    one_by_one, together = _steps(_logits(dtype), inplace, temperature, dtype)
    for a, b in zip(one_by_one, together, strict=True):
        assert torch.equal(a, b) and not b.isnan().any()


def test_a_softcap_keeps_no_exponentials(block_rows):
    one_by_one, together = _steps(_logits(torch.float32), False, 1.0, softcap=4.0)
    for a, b in zip(one_by_one, together, strict=True):
        assert torch.equal(a, b) and not b.isnan().any()


def test_minus_infinity_and_nan_are_told_apart():
    """0·(−inf) = 0 in the entropy, found in the sums; a NaN logit of the same row stays NaN."""
    logits = _logits(torch.float64)
    scores = torch.empty(4, B * T, dtype=torch.float64)
    torch_backend.score(logits, Scoring.of(IDS.flatten(), None, 1.0), RowScores(*scores.unbind(0)))
    finite = logits[0, 0, 20:]
    logps = finite.log_softmax(-1)
    torch.testing.assert_close(scores[1, 0], -(logps.exp() * logps).sum())
    assert scores[0, 0] == -torch.inf  # the token itself
    broken = 2 * T + 3
    assert scores[:2, broken].isnan().all() and not scores[1, :broken].isnan().any()
    logits[0, 0, 30] = torch.nan
    torch_backend.score(logits, Scoring.of(IDS.flatten(), None, 1.0), RowScores(*scores.unbind(0)))
    assert scores[1, 0].isnan()


def test_rows_at_once():
    assert row_stride(32000) == 32000 and row_stride(50257) == 50272
    for vocab in (1024, 65536, 131072, 16384 - 3):
        assert row_stride(vocab) % 1024 and row_stride(vocab) % 16 == 0 and row_stride(vocab) >= vocab
    small, large = torch.empty(1000, 64), torch.empty(151936, 1)
    assert [rows_per_chunk(small, 0, n) for n in (1, 512, 2048, 10**6)] == [64, 64, 256, 512]
    assert [rows_per_chunk(torch.empty(10, width), 0, 512) for width in (8, 200, 256, 4096)] == [64, 96, 128, 128]
    assert 200 < rows_per_chunk(large, 0, 8192) < 221 and rows_per_chunk(large, 0, 8192) % 8 == 0
    assert rows_per_chunk(large, 0, 8192) * row_stride(151936) * 4 <= 128 * 2**20
    assert rows_per_chunk(small, 0, 2048, whole=300) == 300  # a sequence is not computed twice for want of a few rows
    assert rows_per_chunk(large, 0, 8192, whole=300) == rows_per_chunk(large, 0, 8192)
    assert rows_per_chunk(small, 7 * 1008 * 4, 2048, whole=300) == 7 and rows_per_chunk(large, 1, 8192) == 1


def test_the_last_rows_are_as_exact_as_the_others():
    """A CPU library sums a product of under 13 rows in one run over V, ten times less exactly: a remainder of few
    rows takes some of the piece before it (found by the bench's gate at V = 151,936)."""
    N, H, V = 34, 16, 151936
    hidden, weight = torch.randn(1, N, H), torch.randn(V, H) * 0.25
    ids = torch.randint(0, V, (1, N))
    old = fastrl.logprobs_from_hidden(hidden, fastrl.LMHead(weight), ids).logps
    rollouts = fastrl.Rollouts(ids, advantages=torch.ones(1), old_logps=old)

    def gradient(dtype, **options):
        leaf = hidden.to(dtype).requires_grad_()
        head = fastrl.LMHead(weight.to(dtype))
        fastrl.policy_loss_from_hidden(leaf, head, rollouts, fastrl.DAPO, backend="torch", **options).loss.backward()
        return leaf.grad[0].double()

    truth = gradient(torch.float64)
    rows = (gradient(torch.float32, buffer_bytes=32 * 4 * (V + 64)) - truth).abs().amax(-1)
    assert rows[-2:].max() <= 2 * rows[:-2].max()


@pytest.mark.parametrize("limit", [32, 40, 216])
def test_no_piece_of_few_rows(limit):
    for count in range(1, 4 * limit):
        found = [*pieces(torch.arange(count), limit)]
        assert torch.equal(torch.cat(found), torch.arange(count))
        assert all(min(16, count) <= len(piece) <= limit for piece in found)
