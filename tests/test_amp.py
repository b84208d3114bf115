"""A GradScaler's step under autocast: the same parameters as without scaling, and none after an overflow."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS
from torch import nn

import fastrl

SPEC = fastrl.GRPO.replace(kl_coef=0.1)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.lm_head = nn.Embedding(17, 8), nn.Linear(8, 8), nn.Linear(8, 17)

    def loss(self, level: str, backend: str, factor: float = 1.0) -> torch.Tensor:
        g = torch.Generator().manual_seed(1)
        device = self.lm_head.weight.device
        ids, targets = (torch.randint(0, 17, (2, 5), generator=g).to(device) for _ in range(2))
        old = (-3 + 0.1 * torch.randn(2, 5, generator=g)).to(device)
        advantages = torch.tensor([1.0, -0.5], device=device)
        rollouts = fastrl.Rollouts(targets, advantages=advantages, old_logps=old, ref_logps=old)
        hidden = torch.tanh(self.body(self.embed(ids))) * factor
        if level == "hidden":
            head = fastrl.LMHead(self.lm_head.weight, self.lm_head.bias)
            return fastrl.policy_loss_from_hidden(hidden, head, rollouts, SPEC, normalizer=1e5, backend=backend).loss
        logits = self.lm_head(hidden)
        return fastrl.policy_loss_from_logits(logits, rollouts, SPEC, normalizer=1e5, backend=backend).loss


def step(level: str, backend: tuple[str, str], dtype: torch.dtype, scale: float | None, factor: float = 1.0):
    """Parameters before and after one step of SGD, and the scale after it."""
    name, device = backend
    policy = Policy().to(device)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e4)
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, init_scale=scale or 1.0, enabled=scale is not None)
    with torch.autocast(kind, dtype=dtype):
        loss = policy.loss(level, name, factor)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(policy.parameters(), 1e3)
    scaler.step(optimizer)
    scaler.update()
    return before, [parameter.detach() for parameter in policy.parameters()], scaler.get_scale()


@pytest.mark.parametrize("level", ["hidden", "logits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_grad_scaler_step(backend, level):
    """float16 with weights of 1e-5, whose gradients only a scale lifts above float16's smallest numbers."""
    before, exact, _ = step(level, backend, torch.bfloat16, None)
    _, scaled, scale = step(level, backend, torch.float16, 2.0**16)
    assert scale == 2.0**16
    for old, a, b in zip(before, exact, scaled, strict=True):
        moved = (a - old).norm()
        assert moved > 0 and (a - b).norm() <= 0.03 * moved


@pytest.mark.parametrize("level", ["hidden", "logits"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_grad_scaler_skips_an_overflow(backend, level):
    """A gradient beyond float16 is inf, not a large number: the step is skipped and the scale halved."""
    before, after, scale = step(level, backend, torch.float16, 2.0**40)
    assert scale == 2.0**39
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
