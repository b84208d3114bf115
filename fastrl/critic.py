"""The critic's loss, clipped or not, its temporal-difference form, and its metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks, inputs
from fastrl.dtypes import wide
from fastrl.reduction import padded_weights
from fastrl.returns import n_step_returns
from fastrl.spec import Aggregation, LossSpec


class _Terms(NamedTuple):
    """(B, T), finite under the mask."""

    values: Tensor
    returns: Tensor
    plain: Tensor  # h(V − R)
    clipped: Tensor | None  # h(clip(V) − R)
    loss: Tensor  # the greater of both
    keep: Tensor


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    huber_delta: float | None = None,
    mask: Tensor | None = None,
    aggregation: str = "token-mean",
    max_length: int | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """L = Σₜ wₜ·max( h(Vₜ − Rₜ), h(clip(Vₜ, oldₜ ± clip) − Rₜ) ),  h(x) = x²/2.

    Without `clip` the first term alone. With `huber_delta` δ, h(x) = δ·(|x| − δ/2) where |x| > δ. The factor 1/2 is
    inside (verl, TRL, OpenRLHF, NeMo-RL, AReaL; slime has none).

    Args:
        values: (B, T), differentiable.
        returns: (B, T), e.g. from `gae`; data.
        old_values: (B, T) values at sampling time, data; needed when and only when `clip` is given.
        clip: how far V may move from `old_values` before its gradient is dropped, > 0.
        mask: (B, T) bool or 0/1; None = all. Nothing is read where it is 0.
        aggregation, max_length: the weights wₜ, as in `LossSpec`.
        normalizer: the denominator of the aggregation, as for `policy_loss`.

    Returns:
        0-d float32 (float64 for float64 values). Where both terms are equal the unclipped one has the gradient.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and what to do.

    Source: arXiv:2005.12729 (PPO's value clipping).
    """
    terms = _terms(values, returns, old_values, clip, huber_delta, mask)
    spec = _aggregation(aggregation, max_length)
    weights = padded_weights(terms.keep, inputs.normalizer(normalizer, spec, values), spec, terms.loss.dtype)
    return (weights * terms.loss).sum()


def td_loss(
    values: Tensor,
    rewards: Tensor,
    *,
    n: int = 1,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The semi-gradient n-step TD loss: `value_loss` against `n_step_returns` of the same, detached values.

    n = 1: L = Σₜ wₜ·½·(Vₜ − (rₜ + γ·sg(Vₜ₊₁)))².

    Args:
        values: (B, T), differentiable; the targets are not differentiated.
        rewards, n, gamma, mask, bootstrap: as for `n_step_returns`.
        options: of `value_loss`: old_values, clip, huber_delta, aggregation, max_length, normalizer.
    """
    returns = n_step_returns(rewards, values, n=n, gamma=gamma, mask=mask, bootstrap=bootstrap)
    return value_loss(values, returns, mask=mask, **options)


def value_metrics(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    huber_delta: float | None = None,
    mask: Tensor | None = None,
) -> ValueMetrics:
    """What there is to know of a critic on a batch; arguments and errors as for `value_loss`."""
    values, returns = (x.detach() if isinstance(x, Tensor) else x for x in (values, returns))
    terms = _terms(values, returns, old_values, clip, huber_delta, mask)
    replaced = terms.loss * 0 if terms.clipped is None else terms.clipped > terms.plain
    keep, v, r = terms.keep, terms.values.double(), terms.returns.double()
    columns = (torch.ones_like(v), terms.loss, replaced, v, r, r * r, (r - v) ** 2)
    sums = torch.stack([torch.where(keep, x.double(), 0).sum() for x in columns])
    absent = () if clip is not None else ("value_clip_fraction",)
    return ValueMetrics(sums, tuple(name for name in _NAMES if name not in absent))


_NAMES = ("value_loss", "value_clip_fraction", "explained_variance", "value_mean", "return_mean", "tokens")


class ValueMetrics(Mapping[str, Tensor]):
    """Named metrics of a critic: a read-only mapping from name to a 0-d float32 tensor, held as fp64 sums.

    value_loss: mean over the unmasked tokens, whatever the loss's aggregation. value_clip_fraction: tokens whose
    clipped loss is the greater one (absent without clip). explained_variance: 1 − E[(R − V)²]/(E[R²] − E[R]²), 0 where
    the returns do not vary. value_mean, return_mean. tokens: a count. With no valid token every value is 0.
    Nothing waits for the device before a value is read.
    """

    def __init__(self, sums: Tensor, names: tuple[str, ...]) -> None:
        self._sums = sums  # (7,): tokens, loss, clipped, V, R, R², (R − V)²
        self._names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(f"{name!r}; this batch has {', '.join(self._names)}")
        tokens = self._sums[0]
        loss, clipped, value, target, square, error = self._sums[1:] / tokens.clamp_min(1)
        variance = square - target * target
        return {
            "value_loss": loss,
            "value_clip_fraction": clipped,
            "explained_variance": torch.where(variance == 0, 0, 1 - error / variance),
            "value_mean": value,
            "return_mean": target,
            "tokens": tokens,
        }[name].float()

    def __repr__(self) -> str:
        return f"ValueMetrics({', '.join(self._names)})"

    def merge(self, other: ValueMetrics) -> ValueMetrics:
        """The metrics of both batches together."""
        if self._names != other._names:
            _checks.refuse("other", "the same metrics", repr(other), "merge runs with and without clip apart")
        return ValueMetrics(self._sums + other._sums, self._names)

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> ValueMetrics:
        """The metrics of all ranks of `group` (None = the default group) together; a collective call."""
        sums = self._sums.clone()
        torch.distributed.all_reduce(sums, group=group)
        return ValueMetrics(sums, self._names)

    def to_floats(self) -> dict[str, float]:
        """All values as Python floats, in one transfer from the device."""
        return dict(zip(self._names, torch.stack([self[name] for name in self._names]).tolist(), strict=True))


# Specs of which only the aggregation matters, built ahead: torch.compile cannot trace the checks of a new one.
_SPECS: dict[tuple[str, int | None], LossSpec] = {
    (str(aggregation), None): LossSpec(aggregation=aggregation)
    for aggregation in Aggregation
    if aggregation != Aggregation.SEQ_MEAN_TOKEN_SUM_NORM
}


def _aggregation(aggregation: str, max_length: int | None) -> LossSpec:
    """The spec of an aggregation, which checks the name and its length."""
    key = (aggregation, max_length)
    if key not in _SPECS:
        _SPECS[key] = LossSpec(aggregation=aggregation, max_length=max_length)
    return _SPECS[key]


def _terms(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    clip: float | None,
    huber_delta: float | None,
    mask: Tensor | None,
) -> _Terms:
    keep = _check(values, returns, old_values, clip, huber_delta, mask)
    dtype = wide(values.dtype)

    def kept(x: Tensor) -> Tensor:
        return torch.where(keep, x.to(dtype), 0)

    v, r = kept(values), kept(returns.detach())
    plain = _half_square(v - r, huber_delta)
    if clip is None or old_values is None:
        return _Terms(v, r, plain, None, plain, keep)
    old = kept(old_values.detach())
    low, high = old - clip, old + clip
    # Not clamp(), whose gradient at NaN is 0; 0·old brings in a NaN that no comparison shows.
    held = torch.where(v > high, high, torch.where(v < low, low, v + 0 * old))
    clipped = _half_square(held - r, huber_delta)
    # Not maximum(), which splits the gradient where both are equal; and a NaN in either must not lose.
    return _Terms(v, r, plain, clipped, torch.where(clipped <= plain, plain, clipped), keep)


def _half_square(x: Tensor, huber_delta: float | None) -> Tensor:
    """x²/2, or Huber's loss, which is linear beyond `huber_delta`."""
    square = 0.5 * x * x
    if huber_delta is None:
        return square
    return torch.where(x.abs() > huber_delta, huber_delta * (x.abs() - 0.5 * huber_delta), square)


def _check(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    clip: float | None,
    huber_delta: float | None,
    mask: Tensor | None,
) -> Tensor:
    """The mask as bool, after the checks that loss and metrics share."""
    _checks.floating("values", values)
    if values.ndim != 2:
        _checks.refuse("values", "shape (B, T)", values, "packed tokens of one batch: values[None]")
    for name, x in (("returns", returns), ("old_values", old_values)):
        if x is not None or name == "returns":
            _checks.floating(name, x)
            _checks.shape(name, x, tuple(values.shape), "the shape of values")
            _checks.same_device(name, x, values.device, "values")
            _checks.no_grad_needed(name, x)
    if (clip is None) != (old_values is None):
        came = "no old_values" if old_values is None else "old_values and no clip"
        _checks.refuse("clip", "both clip and old_values, or neither", came)
    for name, number in (("clip", clip), ("huber_delta", huber_delta)):
        if number is not None:
            _checks.number(name, number)
    keep = _checks.keep(mask, values, "values")
    return torch.ones_like(values, dtype=torch.bool) if keep is None else keep
