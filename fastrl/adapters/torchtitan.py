"""torchtitan 0.3 (`torchtitan.experiments.rl`): `DAPOLoss` and `GRPOLoss`, fused from the logits.

    from fastrl.adapters.torchtitan import DAPOLoss   # instead of torchtitan.experiments.rl.losses

Same `Config`, same call. ℓ = −min(r·A, clip(r)·A) per token, r = exp(logp − generator logp) with the log-ratio held to
±10; tokens without a finite generator log-prob are dropped; Σℓ / global_valid_tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastrl import _checks
from fastrl.adapters._batch import flat_offsets, part_of_mean
from fastrl.adapters._config import Options
from fastrl.adapters._versions import warn_outside
from fastrl.functional import policy_loss_from_logits
from fastrl.rollouts import Rollouts
from fastrl.spec import Aggregation, LossSpec

_WAY_OUT = "use torchtitan.experiments.rl.losses"
_DAPO = Options(
    framework="torchtitan 0.3",
    honoured={"ratio_clip_low": 0.2, "ratio_clip_high": 0.2},
    elsewhere={"global_vocab_size"},
    own_loss=_WAY_OUT,
)
_GRPO = dataclasses.replace(_DAPO, honoured={"clip_eps": 0.2})


def _spec(low: float, high: float) -> LossSpec:
    return LossSpec(epsilon_low=low, epsilon_high=high, log_ratio_clamp=10.0, aggregation=Aggregation.TOKEN_MEAN)


class DAPOLoss:
    """`torchtitan.experiments.rl.losses.DAPOLoss`; `loss(logits, labels, global_valid_tokens, ...) -> (loss, metrics)`.

    Metrics, as parts that sum over micro-batches and ranks: loss/mean, loss/ratio_mean, bit_wise/logprob_diff/mean,
    trainer/entropy/mean; fastrl's own under fastrl/.

    Raises:
        ValueError: a field of the config that is not known, named.
    """

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
        self.spec = self._spec_of(config)

    @staticmethod
    def _spec_of(config: Any) -> LossSpec:
        fields = _DAPO.read(config)
        return _spec(fields["ratio_clip_low"], fields["ratio_clip_high"])

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
        """Logits (B, L, V) or (T, V), labels shifted by the framework; everything else (B, L) or (T,)."""
        if type(logits).__name__ == "DTensor":
            _checks.refuse("logits", "a plain tensor with the whole vocabulary", "a DTensor", "gather its vocabulary")
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
            "fastrl/clip_fraction": part_of_mean(out.metrics, "clip_fraction", whole),
            "fastrl/clamped_fraction": part_of_mean(out.metrics, "clamped_fraction", whole),
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

    @staticmethod
    def _spec_of(config: Any) -> LossSpec:
        epsilon = _GRPO.read(config)["clip_eps"]
        return _spec(epsilon, epsilon)
