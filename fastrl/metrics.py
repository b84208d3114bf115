"""Metrics as sums and counts, so that micro-batches and ranks merge exactly; the one table of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastrl.spec import LossSpec

# Columns of the statistics vector that step B returns, in the order its kernel writes them. All are sums over valid
# tokens, except the last two.
STATISTICS = (
    "clip_low",  # tokens clipped at the lower bound, with A < 0: for a ratio r < 1 − ε₋
    "clip_high",  # tokens clipped at the upper bound, with A > 0: for a ratio r > 1 + ε₊
    "dual_clip",  # tokens whose loss the dual clip replaced
    "clamped",  # tokens whose log-ratio, or k3 exponent, was held at ±log_ratio_clamp
    "ratio",
    "ratio_square",
    "approx_kl",  # old − logp
    "approx_kl_k3",  # k3 of logp − old
    "ref_kl",  # the spec's estimator against the reference
    "entropy",
    "rollout_weight",  # the rollout weight as applied, or exp(old − rollout); 1 where the sampler reported NaN
    "rollout_weight_square",
    "rollout_ratio_square",  # exp(old − rollout)² of the token
    "rejected",  # tokens whose policy term the rollout correction or the off-policy mask dropped
    "ratio_min",
    "ratio_max",
)
SPARSE_STATISTICS = (  # columns more when the gradient is sparse
    "dropped_mass",  # Σ p of the columns without a gradient
    "differentiated",  # rows that have a gradient
)
TOKENS, SEQUENCES = "tokens", "sequences"
_MEANS = {  # metric: the column that it is the mean over tokens of
    "clip_fraction_low": "clip_low",
    "clip_fraction_high": "clip_high",
    "dual_clip_fraction": "dual_clip",
    "clamped_fraction": "clamped",
    "ratio_mean": "ratio",
    "approx_kl": "approx_kl",
    "approx_kl_k3": "approx_kl_k3",
    "ref_kl": "ref_kl",
    "entropy": "entropy",
    "rollout_weight_mean": "rollout_weight",
}
_SAMPLE_SIZES = {  # metric: the columns of Σ and Σ of squares
    "effective_sample_size": ("ratio", "ratio_square"),
    "rollout_effective_sample_size": ("rollout_weight", "rollout_weight_square"),
}
_EXTREMES = {"ratio_min": torch.minimum, "ratio_max": torch.maximum}


class Metrics(Mapping[str, Tensor]):
    """Named metrics of a batch: a read-only mapping from name to a 0-d float32 tensor.

    clip_fraction (and _low: r < 1−ε₋ with A < 0; _high: r > 1+ε₊ with A > 0; gmpo by the token's log-ratio, dppo by its
    own bounds), dual_clip_fraction, clamped_fraction: fractions of valid tokens. ratio_mean, ratio_min, ratio_max,
    effective_sample_size = (Σr)²/Σr² in tokens. approx_kl = mean(old − logp), approx_kl_k3: nats, old policy against
    new. ref_kl (the KL as the loss adds it), entropy: nats per token. rollout_weight_mean: mean of the rollout
    weights as applied, of exp(old − rollout) without a correction; rollout_effective_sample_size = (Σv)²/Σv² of them,
    in tokens; rollout_chi2 = mean(exp(old − rollout)²) − 1, per token; rollout_rejected_fraction: tokens that the
    correction or the off-policy mask dropped. tokens, sequences: counts. A sequence-level ratio counts once per
    token; gmpo's is the clipped geometric mean. clamped_fraction counts exponents of the ratio, and of k3 when it is in
    the loss. dropped_mass: the probability that a sparse gradient leaves out, mean over the rows that have a gradient.
    With no valid token every value is 0.

    Names without an input are absent: ref_kl without ref_logps, entropy without entropies, dual_clip_fraction without
    dual_clip, the rollout ones without rollout_logps or rollout_weights, clip fractions with an objective that does not
    clip, dropped_mass without sparse_eps.
    Nothing is computed, and nothing waits for the device, before a value is read.
    """

    def __init__(self, statistics: Tensor, counts: Tensor, names: tuple[str, ...]) -> None:
        self._statistics = statistics  # (len(STATISTICS),), with a sparse gradient SPARSE_STATISTICS after them
        self._counts = counts  # (3,): tokens, sequences, tokens excluded by a rollout correction
        self._names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(f"{name!r}; this batch has {', '.join(self._names)}")
        return self._value(name).float()

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self._names)})"

    def _column(self, column: str) -> Tensor:
        return self._statistics[(*STATISTICS, *SPARSE_STATISTICS).index(column)]

    def _value(self, name: str) -> Tensor:
        tokens, sequences, excluded = self._counts
        if name in (TOKENS, SEQUENCES):
            return tokens if name == TOKENS else sequences
        if name in _EXTREMES:
            return torch.where(tokens > 0, self._column(name), 0.0)
        if name == "clip_fraction":
            return (self._column("clip_low") + self._column("clip_high")) / tokens.clamp_min(1)
        if name == "dropped_mass":
            return self._column(name) / self._column("differentiated").clamp_min(1)
        if name in _SAMPLE_SIZES:
            total, square = (self._column(column) for column in _SAMPLE_SIZES[name])
            return torch.where(square == 0, 0.0, total**2 / square)
        if name == "rollout_chi2":
            return torch.where(tokens > 0, self._column("rollout_ratio_square") / tokens.clamp_min(1) - 1, 0.0)
        if name == "rollout_rejected_fraction":
            return (self._column("rejected") + excluded) / (tokens + excluded).clamp_min(1)
        return self._column(_MEANS[name]) / tokens.clamp_min(1)

    def merge(self, other: Metrics) -> Metrics:
        """The metrics of both batches together."""
        if self._names != other._names:
            odd = sorted(set(self._names) ^ set(other._names))
            raise ValueError(f"other: expected the same metrics, got a difference in {odd}; merge runs of one spec")
        statistics = self._statistics.double() + other._statistics.double()
        for name, pick in _EXTREMES.items():
            place = STATISTICS.index(name)
            statistics[place] = pick(self._statistics[place].double(), other._statistics[place].double())
        return Metrics(statistics, self._counts.double() + other._counts.double(), self._names)

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Metrics:
        """The metrics of all ranks of `group` (None = the default group) together; a collective call."""
        import torch.distributed as dist

        sums = torch.cat([self._statistics, self._counts]).double()
        bounds = torch.stack([-self._column("ratio_min"), self._column("ratio_max")]).double()
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group)
        statistics, counts = sums.split([len(self._statistics), len(self._counts)])
        statistics[STATISTICS.index("ratio_min")] = -bounds[0]
        statistics[STATISTICS.index("ratio_max")] = bounds[1]
        return Metrics(statistics, counts, self._names)

    def to_floats(self) -> dict[str, float]:
        """All values as Python floats: one transfer from the device, the arithmetic on the host."""
        sums = torch.cat([self._statistics, self._counts]).cpu()
        at = len(self._statistics)
        host = Metrics(sums[:at], sums[at:], self._names)
        values = torch.stack([host[name] for name in self._names]).tolist()
        return dict(zip(self._names, values, strict=True))


def metric_names(
    spec: LossSpec, *, entropy: bool, ref: bool, rollout: bool, weights: bool = False, sparse: bool = False
) -> tuple[str, ...]:
    """The metrics that a call with this spec and these inputs reports."""
    absent = set() if sparse else {"dropped_mass"}
    if spec.definition is None or spec.definition.flags is None:
        absent |= {"clip_fraction", "clip_fraction_low", "clip_fraction_high"}
    if spec.dual_clip is None:
        absent.add("dual_clip_fraction")
    if not ref:
        absent.add("ref_kl")
    if not entropy:
        absent.add("entropy")
    if not rollout:
        absent.add("rollout_chi2")
    if not rollout and not weights:
        absent |= {"rollout_weight_mean", "rollout_effective_sample_size"}
    if spec.rollout is None and spec.off_policy_threshold is None and not weights:
        absent.add("rollout_rejected_fraction")
    means = ("clip_fraction", *_MEANS, *_EXTREMES, *_SAMPLE_SIZES)
    every = (*means, "rollout_chi2", "rollout_rejected_fraction", "dropped_mass", TOKENS, SEQUENCES)
    return tuple(name for name in every if name not in absent)
