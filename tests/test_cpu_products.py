"""The products that a CPU's second library does faster: the same numbers, only where that is known."""

from __future__ import annotations

import pytest
import torch

import fastrl
from fastrl import cpu_products

needs_operator = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch built with oneDNN")
V, H = 4112, 64  # no multiple of the tiles, rows without padding, above the smallest head


@pytest.fixture
def taken(monkeypatch):
    """Has the products taken on any processor with the operator, and counts the calls."""
    calls = []
    monkeypatch.setattr(cpu_products, "_faster_here", lambda: True)
    monkeypatch.setattr(cpu_products, "_SMALLEST_HEAD", V * H - 64 * H)
    linear = cpu_products._linear
    monkeypatch.setattr(cpu_products, "_linear", lambda *args: calls.append(tuple(args[0].shape)) or linear(*args))
    return calls


@needs_operator
@pytest.mark.parametrize("padded", [0, 12])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [16, 64, 131])
def test_products_match_float64(rows, with_bias, padded, monkeypatch):
    monkeypatch.setattr(cpu_products, "_TILE_BYTES", 64 * 1000 * 4)
    torch.manual_seed(rows)
    hidden, weight, dlogits = torch.randn(rows, H), torch.randn(V, H), torch.randn(rows, V)
    bias = torch.randn(V) if with_bias else None
    buffer = torch.full((rows, V + padded), torch.nan)
    cpu_products.logits(hidden, weight, bias, buffer[:, :V])
    wanted = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(buffer[:, :V].double(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    assert buffer[:, V:].isnan().all()
    wanted = dlogits.double() @ weight.double()
    got = cpu_products.hidden_gradient(dlogits, weight).double()
    torch.testing.assert_close(got, wanted, rtol=0, atol=4e-6 * float(wanted.abs().max()))


def test_only_where_it_is_known_to_be_faster(taken, monkeypatch):
    x, weight = torch.randn(64, H), torch.randn(V, H)
    assert cpu_products.usable(x, weight) and cpu_products.usable(torch.randn(64, V), weight)
    assert not cpu_products.usable(x[:15], weight)
    assert not cpu_products.usable(x, weight[:64])
    assert not cpu_products.usable(x.double(), weight.double())
    assert not cpu_products.usable(x.bfloat16(), weight.bfloat16())
    assert not cpu_products.usable(x, weight.double())
    assert not cpu_products.usable(torch.randn(64, V + 4)[:, :V], weight)  # would be copied
    assert not cpu_products.usable(x, torch.randn(H, V).t())
    assert not cpu_products.usable(x.to("meta"), weight.to("meta"))
    torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags sets, without its warning about TF32
    try:
        assert not cpu_products.usable(x, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(cpu_products, "_faster_here", lambda: False)
    assert not cpu_products.usable(x, weight)


@pytest.mark.parametrize(
    "change",
    [
        {"_vendor": lambda: "GenuineIntel"},
        {"_vendor": lambda: ""},
        {"_SCHEMA": "mkldnn::_linear_pointwise(Tensor X) -> Tensor Y"},
    ],
)
def test_another_processor_or_another_operator(change, monkeypatch):
    monkeypatch.setattr(cpu_products, "_vendor", lambda: "AuthenticAMD")
    for name, value in change.items():
        monkeypatch.setattr(cpu_products, name, value)
    assert not cpu_products._faster_here.__wrapped__()


def test_the_operator_is_the_one_we_know(monkeypatch):
    """On an AMD processor with AVX-512 this torch offers the operator; one that changed it says so here."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        pytest.skip("needs a processor with AVX-512 and a torch built with oneDNN")
    monkeypatch.setattr(cpu_products, "_vendor", lambda: "AuthenticAMD")
    assert cpu_products._faster_here.__wrapped__()


@needs_operator
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("vocab", [V, 4096])
def test_the_hidden_level(vocab, with_bias, taken, monkeypatch):
    """Value and gradients as with the first library; scoring and training meet; padded rows (V = 4096) are not copied."""
    torch.manual_seed(vocab)
    B, T = 5, 40
    ids = torch.randint(0, vocab, (B, T))
    mask = torch.arange(T) < torch.tensor([40, 31, 40, 7, 40])[:, None]
    hidden, weight = torch.randn(B, T, H), 0.3 * torch.randn(vocab, H)
    bias = torch.randn(vocab) if with_bias else None

    def step(dtype=torch.float32):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, bias) if x is not None]
        head = fastrl.LMHead(*leaves[1:])
        with torch.no_grad():
            old = fastrl.logprobs_from_hidden(leaves[0], head, ids, mask=mask, backend="torch").logps
        rollouts = fastrl.Rollouts(ids, mask, torch.tensor([1.0, -0.5, 0.0, 2.0, 0.3]), old_logps=old)
        out = fastrl.policy_loss_from_hidden(leaves[0], head, rollouts, fastrl.GRPO, backend="torch")
        out.loss.backward()
        return out, old, [leaf.grad.double() for leaf in leaves]

    out, old, gradients = step()
    assert torch.equal(out.logps, old)
    assert {shape[1] for shape in taken} == ({H, vocab} if vocab == V else {H})
    count = len(taken)
    monkeypatch.setattr(cpu_products, "_faster_here", lambda: False)
    other, _, others = step()
    assert len(taken) == count
    truth, _, exact = step(torch.float64)
    assert abs(out.loss - truth.loss) < 1e-6 and abs(other.loss - truth.loss) < 1e-6
    for got, alternative, want in zip(gradients, others, exact, strict=True):
        allowed = 3 * (alternative - want).abs().max() + 1e-7 * want.abs().max()
        assert (got - want).abs().max() <= allowed
