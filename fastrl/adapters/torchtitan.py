"""torchtitan 0.3 (`torchtitan.experiments.rl`): `DAPOLoss` and `GRPOLoss`, fused from the logits.

    from fastrl.adapters.torchtitan import DAPOLoss   # instead of torchtitan.experiments.rl.losses

Same `Config`, same call. ℓ = −min(r·A, clip(r)·A) per token, r = exp(logp − generator logp) with the log-ratio held to
±10; tokens without a finite generator log-prob are dropped; Σℓ / global_valid_tokens. A vocabulary that tensor
parallelism has split is gathered first, as torchtitan's own losses do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastrl.adapters._batch import flat_offsets, part_of_mean
from fastrl.adapters._config import Options
from fastrl.adapters._torchtitan_batch import LOG_RATIO_LIMIT, comparison, whole_vocabulary
from fastrl.adapters._versions import warn_outside
from fastrl.functional import policy_loss_from_logits
from fastrl.rollouts import Rollouts
from fastrl.spec import Aggregation, LossSpec

_WAY_OUT = "use torchtitan.experiments.rl.losses"
_DAPO = Options(
    framework="torchtitan 0.3",
    honoured={"ratio_clip_low": 0.2, "ratio_clip_high": 0.2, "global_vocab_size": None},
    own_loss=_WAY_OUT,
)
_GRPO = dataclasses.replace(_DAPO, honoured={"clip_eps": 0.2, "global_vocab_size": None})


class DAPOLoss:
    """`torchtitan.experiments.rl.losses.DAPOLoss`; `loss(logits, labels, global_valid_tokens, ...) -> (loss, metrics)`.

    Metrics, all that torchtitan's own have, as parts that add up over chunks, micro-batches and ranks (of "/max" the
    largest counts), and fastrl/clip_frac (by the sign of A), fastrl/clamped_frac. torchtitan combines by the end of a
    name: it must be one that it knows.

    Raises:
        ValueError: a field of the config that is not known, named.
    """

    options = _DAPO

    @dataclass(kw_only=True)
    class Config:
        """Field names and defaults of torchtitan's; `build()` as torchtitan's configs have it."""

        ratio_clip_low: float = 0.2
        ratio_clip_high: float = 0.2
        global_vocab_size: int | None = None

        def build(self, **kwargs: Any) -> DAPOLoss:
            return DAPOLoss(self, **kwargs)

    def __init__(self, config: Any = None, *, compile_config: Any = None) -> None:
        del compile_config  # the kernels are compiled as they are; the torch backend works under torch.compile as it is
        warn_outside("torchtitan", "0.3", "0.4")
        fields = self.options.read(config)
        self.global_vocab_size: int | None = fields["global_vocab_size"]
        self.low, self.high = self._bounds(fields)
        self.spec = LossSpec(
            epsilon_low=self.low,
            epsilon_high=self.high,
            log_ratio_clamp=LOG_RATIO_LIMIT,
            aggregation=Aggregation.TOKEN_MEAN,
        )

    @staticmethod
    def _bounds(fields: dict[str, Any]) -> tuple[float, float]:
        return fields["ratio_clip_low"], fields["ratio_clip_high"]

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        global_valid_tokens: float | Tensor | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, L, V) or (T, V), labels shifted by the framework; everything else (B, L) or (T,).

        Raises:
            ValueError: logits that are not of the whole vocabulary and cannot be gathered.
        """
        logits = whole_vocabulary(logits, self.global_vocab_size)
        keep = loss_mask.bool() & generator_logprobs.isfinite()
        rollouts = Rollouts(labels, keep, advantages, old_logps=generator_logprobs, cu_seqlens=flat_offsets(labels))
        count: float | Tensor | None = None
        spec = self.spec
        if global_valid_tokens is None:
            spec = self.spec.replace(aggregation=Aggregation.TOKEN_SUM)
        elif isinstance(global_valid_tokens, Tensor):
            count = global_valid_tokens.detach().clamp(min=1)
        else:
            count = max(float(global_valid_tokens), 1.0)
        out = policy_loss_from_logits(logits, rollouts, spec, normalizer=count)
        whole = 1.0 if count is None else count
        metrics = {
            "loss/mean": out.loss.detach(),
            "loss/ratio_mean": part_of_mean(out.metrics, "ratio_mean", whole),
            "bit_wise/logprob_diff/mean": -part_of_mean(out.metrics, "approx_kl", whole),
            "trainer/entropy/mean": part_of_mean(out.metrics, "entropy", whole),
            "fastrl/clip_frac": part_of_mean(out.metrics, "clip_fraction", whole),
            "fastrl/clamped_frac": part_of_mean(out.metrics, "clamped_fraction", whole),
            **comparison(out.logps, generator_logprobs, keep, (1 - self.low, 1 + self.high), whole),
        }
        return out.loss, metrics


class GRPOLoss(DAPOLoss):
    """`torchtitan.experiments.rl.losses.GRPOLoss`: equal bounds, `clip_eps`."""

    @dataclass(kw_only=True)
    class Config:
        """Field names and defaults of torchtitan's."""

        clip_eps: float = 0.2
        global_vocab_size: int | None = None

        def build(self, **kwargs: Any) -> GRPOLoss:
            return GRPOLoss(self, **kwargs)

    options = _GRPO

    @staticmethod
    def _bounds(fields: dict[str, Any]) -> tuple[float, float]:
        return fields["clip_eps"], fields["clip_eps"]
