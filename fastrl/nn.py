"""`PolicyLoss`: a module that holds a spec and forwards to the functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastrl import functional
from fastrl.functional import LossOutput
from fastrl.head import LMHead
from fastrl.presets import GRPO
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec


class PolicyLoss(nn.Module):
    """A policy loss with its spec fixed: call it on log-probs, or use `from_logits` / `from_hidden`.

    Keyword arguments are those of `policy_loss`, `policy_loss_from_logits` and `policy_loss_from_hidden`.
    """

    def __init__(self, spec: LossSpec = GRPO) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, logps: Tensor, rollouts: Rollouts, **options: Any) -> LossOutput:
        return functional.policy_loss(logps, rollouts, self.spec, **options)

    def from_logits(self, logits: Tensor, rollouts: Rollouts, **options: Any) -> LossOutput:
        return functional.policy_loss_from_logits(logits, rollouts, self.spec, **options)

    def from_hidden(self, hidden: Tensor, head: LMHead, rollouts: Rollouts, **options: Any) -> LossOutput:
        return functional.policy_loss_from_hidden(hidden, head, rollouts, self.spec, **options)

    def extra_repr(self) -> str:
        return repr(self.spec)
