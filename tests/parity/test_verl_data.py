"""verl's `ppo_loss` on the batch that its workers hold: a TensorDict of nested tensors, log-probs of prompt and answer in
one row, which verl pads itself. Nothing stands in here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import peers
from parity.test_verl_adapter import MODES, NUMBERS
from parity.verl_cases import config
from torch import Tensor

import fastrl.adapters.verl as adapter

verl = peers.verl()
adapter.register()
tensordict = pytest.importorskip("tensordict", reason="needs tensordict (the extra `parity`)")

PROMPTS, ANSWERS = (2, 3, 1, 4), (5, 2, 4, 1)


def batch(dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    """(the model's output, the micro-batch), rows of unequal length, one token masked in the middle."""
    g = torch.Generator().manual_seed(1)

    def rows(make: Any, lengths: tuple[int, ...] = ANSWERS) -> Tensor:
        return torch.nested.as_nested_tensor([make(n) for n in lengths], layout=torch.jagged)

    def logps(n: int) -> Tensor:
        return -torch.rand(n, generator=g, dtype=dtype)

    data = tensordict.TensorDict(
        {
            "prompts": rows(lambda n: torch.ones(n, dtype=torch.long), PROMPTS),
            "responses": rows(lambda n: torch.ones(n, dtype=torch.long)),
            "response_mask": rows(lambda n: (torch.arange(n) != 1).long()),
            "old_log_probs": rows(logps),
            "ref_log_prob": rows(logps),
            "advantages": rows(lambda n: torch.randn(1, generator=g, dtype=dtype).expand(n).clone()),
            "rollout_is_weights": rows(lambda n: torch.rand(n, generator=g, dtype=dtype) + 0.5),
        },
        batch_size=[len(ANSWERS)],
    )
    peers.verl_data().assign_non_tensor(data, dp_size=2, batch_num_tokens=30, global_batch_size=8)
    total = sum(PROMPTS) + sum(ANSWERS)
    entropy = torch.rand(total, generator=g, dtype=dtype).requires_grad_()
    return {"log_probs": logps(total).requires_grad_(), "entropy": entropy}, data


@pytest.mark.parametrize("mode", MODES)
def test_nested_tensors(mode):
    results = []
    for name in (mode, f"fastrl_{mode}"):
        output, data = batch(torch.float64)
        actor = config(loss_mode=name, use_kl_loss=True, kl_loss_coef=0.2, entropy_coeff=0.1, **NUMBERS)
        loss, metrics = verl.losses.ppo_loss(actor, output, data)
        loss.backward()
        values = {k: float(m.aggregate()) if hasattr(m, "aggregate") else m for k, m in metrics.items()}
        results.append((loss.detach(), output["log_probs"].grad, output["entropy"].grad, values))
    (*theirs, metrics), (*ours, own) = results
    assert all(gradient.any() for gradient in theirs[1:])
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=3e-8, atol=3e-8)
    assert own == pytest.approx(metrics, rel=1e-5, abs=1e-6)
