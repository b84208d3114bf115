"""The cost model: bytes per logit and FLOP per N·H·V as counted, so that an added pass or GEMM fails here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if torch.cuda.is_available():
    pytest.skip("counts in Triton's interpreter: needs TRITON_INTERPRET=1 and no GPU", allow_module_level=True)

from bench import cost, sparse_cost

KEPT = 1 - 4096 / cost.VOCAB  # what is left to read again of a row whose last full tile is kept
ROW = 0.03  # bytes per logit that a row and its tiles cost beyond the logits, at the vocabulary of the cost model


@pytest.mark.parametrize(
    ("case", "read", "distinct", "written"),
    [
        # bf16: 2 bytes a logit and pass
        ("log-probs and entropies", 2, 2, 0),
        ("log-probs, forward and backward", 4, 2, 2),
        ("loss, one-pass kernel", 2 + 2 * KEPT, 2, 2),  # the last full tile stays in registers
        ("loss, sequence ratio", 4, 2, 2),
        ("loss, zero advantage", 2, 2, 2),  # scored, and written without a second read
        ("loss, masked", 0, 0, 2),
    ],
)
def test_bytes_per_logit(case, read, distinct, written, logits):
    found = logits[case]
    for figure, bytes_per_logit in (
        (found.read_issued, read),
        (found.read_distinct, distinct),
        (found.written_issued, written),
        (found.written_distinct, written),
    ):
        assert bytes_per_logit <= figure <= bytes_per_logit + ROW


@pytest.fixture(scope="module")
def logits():
    return {row.case: row for row in cost.logits_costs()}


def test_bytes_per_token():
    """At most what the docstrings of the kernels say."""
    found = {row.case: row for row in cost.token_costs()}
    policy = [row for case, row in found.items() if case.startswith("policy_loss")]
    assert all(row.read_distinct <= 33.5 and row.written_distinct <= 8.5 for row in policy)
    bare = found["policy_loss, token ratio, bare"]
    assert bare.read_distinct <= 8.5 and bare.written_distinct <= 4.5  # logp and old; dlogp
    sequence = found["policy_loss, sequence ratio, bare"]
    assert sequence.read_issued <= 3 * bare.read_distinct
    gae = found["gae"]
    assert 9 <= gae.read_distinct <= 9.1 and 8 <= gae.written_distinct <= 8.1


@pytest.mark.parametrize(
    ("case", "flop"),
    [
        ("trainable head", 6),
        ("frozen head", 4),
        ("half of the sequences with zero advantage", 2 + 4 / 2),
        ("half of the tokens masked", 3),
        ("sequence ratio", 6),
        ("sequence ratio, sequences beyond the buffer", 8),
        ("picks within the batch", 8),
    ],
)
def test_flop_of_the_hidden_level(case, flop, hidden):
    assert hidden[f"loss from hidden states, {case}"].flop == flop


@pytest.fixture(scope="module")
def hidden():
    return {row.case: row for row in cost.hidden_costs()}


@pytest.fixture(scope="module")
def sparse():
    name = "loss from hidden states, sparse gradient"
    return {row.case.removeprefix(name): row for row in sparse_cost.sparse_costs()}


def test_the_sparse_gradient(sparse):
    """Scored and listed: each logit read twice, nothing of [N, V] written; and the products of the logits alone."""
    frozen = sparse[", frozen head"]
    assert 4 <= frozen.read_issued <= 4 + 3 * ROW and 2 <= frozen.read_distinct <= 2 + 2 * ROW
    assert frozen.written_issued <= 2 * ROW
    head = sparse[", what a trainable head adds"]  # fp32, each element written once
    assert head.written_issued == head.written_distinct == 4
    assert 1 <= head.read_issued <= 1.5  # per column bounds of 8 bytes, at H = 8; per entry 12 + 2H
    assert sparse[""].flop == 2
    assert sparse[", every row without room"].flop == 2 + 6


def test_a_second_read_shows():
    """The count is of what the kernel does: reading a tensor twice counts twice."""
    import triton
    import triton.language as tl

    @triton.jit
    def twice(x_ptr, N: tl.constexpr):
        x = tl.load(x_ptr + tl.arange(0, N)) + tl.load(x_ptr + tl.arange(0, N))
        tl.store(x_ptr + tl.arange(0, N), x)

    with cost.counted() as traffic:
        twice[(1,)](torch.zeros(8), N=8)
    assert traffic.issued == {"read": 64, "written": 32} and traffic.distinct("read") == 32
