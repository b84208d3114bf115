"""TRL's metrics under TRL's names, counted as TRL counts them, and fastrl's own under `fastrl/`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import nanmax, nanmin

from fastrl.adapters.trl.batch import trainer_kind
from fastrl.functional import LossOutput
from fastrl.options import RatioLevel
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec
from fastrl.token_metrics import TokenMetrics

_CLIP_NAMES = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


class Sums:
    """Named means that add up over processes: a sum and a count each, reduced together."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._entries: dict[str, tuple[Tensor, Tensor]] = {}

    def tokens(self, name: str, values: Tensor) -> None:
        """The mean of (B, T) values over the tokens that count."""
        self.total(name, torch.where(self.mask, values.float(), 0.0).sum())

    def total(self, name: str, total: Tensor) -> None:
        """The mean over those tokens of values whose sum is given."""
        self._entries[name] = total.float(), self.mask.sum().float()

    def sequences(self, name: str, values: Tensor) -> None:
        """The mean of (B,) values over all sequences, empty ones too."""
        self._entries[name] = values.float().sum(), self.mask.new_full((), len(values), dtype=torch.float32)

    def means(self, accelerator: Any) -> dict[str, Tensor]:
        """The means over all processes, 0-d; a collective call."""
        local = torch.stack([torch.stack(entry) for entry in self._entries.values()])
        sums, counts = accelerator.reduce(local, reduction="sum").unbind(-1)
        return dict(zip(self._entries, sums / counts.clamp(min=1.0), strict=True))


def log(trainer: Any, out: LossOutput, rollouts: Rollouts, spec: LossSpec, tokens: TokenMetrics) -> None:
    """Append this micro-batch's metrics to those of the trainer, after one transfer from the device."""
    mask = rollouts.flat.valid().view(rollouts.shape)
    sums = Sums(mask)
    if spec.kl_coef:
        sums.total("kl", out.metrics["ref_kl"] * out.metrics["tokens"])
    sums.tokens("entropy", out.entropy)
    extremes = _count_clipped(trainer, sums, rollouts, spec, tokens)
    metrics = out.metrics.all_reduce() if trainer.accelerator.num_processes > 1 else out.metrics
    ours = {f"fastrl/{name}": value for name, value in metrics.items()}
    if trainer_kind(trainer) == "RLOO":  # the old log-probs of single tokens are not known
        del ours["fastrl/approx_kl_k3"]
    append(trainer, sums.means(trainer.accelerator) | extremes | ours)


def append(trainer: Any, values: dict[str, Tensor]) -> None:
    """Log 0-d tensors, in one transfer from the device."""
    store = trainer._metrics["train" if trainer.model.training else "eval"]
    floats = torch.stack([value.detach().float() for value in values.values()]).tolist()
    for name, value in zip(values, floats, strict=True):
        store[name].append(value)


def _count_clipped(
    trainer: Any, sums: Sums, rollouts: Rollouts, spec: LossSpec, tokens: TokenMetrics
) -> dict[str, Tensor]:
    """Count the clipped tokens, or sequences where they share ratio and advantage; the extremes over sequences."""
    whole = spec.ratio_level != RatioLevel.TOKEN and _one_per_sequence(rollouts)
    if spec.objective == "vespo":
        if _one_per_sequence(rollouts):
            sums.sequences("vespo/phi_seq_mean", tokens.sequence_weight[:, 0])
        else:
            sums.tokens("vespo/phi_seq_mean", tokens.sequence_weight)
        return {}
    if tokens.clip_low is None:
        return {}
    flags = tokens.clip_low, tokens.clip_high, tokens.clip_low | tokens.clip_high
    if spec.objective == "cispo":
        _add(sums, "cispo_clip_ratio", tokens.clip_high, whole)
        return {}
    for name, flag in zip(_CLIP_NAMES, flags, strict=True):
        _add(sums, name, flag, whole)
    low, high = (_by_sequence(flag, sums.mask, whole) for flag in flags[:2])
    gather = trainer.accelerator.gather
    return {"clip_ratio/low_min": nanmin(gather(low)), "clip_ratio/high_max": nanmax(gather(high))}


def _one_per_sequence(rollouts: Rollouts) -> bool:
    """Whether the advantages are (B,) or (B, 1)."""
    return rollouts.advantages.ndim == 1 or rollouts.advantages.shape[1] == 1


def _add(sums: Sums, name: str, flags: Tensor, whole: bool) -> None:
    if whole:
        sums.sequences(name, flags.any(-1))
    else:
        sums.tokens(name, flags)


def _by_sequence(flags: Tensor, mask: Tensor, whole: bool) -> Tensor:
    """(B,) the clipped share of each sequence; NaN for an empty one, whose ratio is 1 where it is one for the whole."""
    if whole:
        return flags.any(-1).float()
    return flags.float().sum(-1) / mask.sum(-1)
