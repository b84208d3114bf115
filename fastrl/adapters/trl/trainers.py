"""Drop-in subclasses of TRL's trainers."""

from __future__ import annotations

from typing import Any

import trl
from torch import Tensor

from fastrl.adapters.trl.plugin import Plugin
from fastrl.adapters.trl.scoring import HIDDEN


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with fastrl's loss: same constructor, config and metrics.

    Args:
        level: "hidden" takes the loss from hidden states, without logits; "logits" from the model's own logits, for
            heads that `LMHead.from_model` refuses; "logprobs" from the log-probs of TRL's fused head.
        args, kwargs: as for TRL's trainer.

    Honoured: every loss_type, both importance sampling levels, and every other option of `GRPOConfig`, except what
    `docs/trl.md` lists as refused. `trainer.fastrl.restore()` returns to TRL's loss.

    Raises:
        ValueError: an option that is not honoured, named, before training starts.
    """

    def __init__(self, *args: Any, level: str = HIDDEN, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fastrl = Plugin(self, level)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self.fastrl.compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return self.fastrl.score(*args, **kwargs)


class RLOOTrainer(trl.RLOOTrainer):
    """TRL's `RLOOTrainer` with fastrl's loss: same constructor, config and metrics; `level` as for `GRPOTrainer`.

    Raises:
        ValueError: an option that is not honoured, named, before training starts.
    """

    def __init__(self, *args: Any, level: str = HIDDEN, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fastrl = Plugin(self, level)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self.fastrl.compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return self.fastrl.score(*args, **kwargs)
