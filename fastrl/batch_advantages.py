"""Advantages per sequence that end with a statistic of the whole batch of them: GDPO and GPG.

Each is one launch on the Triton backend (`kernels/fastrl_kernels/batch_groups.py`), whose last program takes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import _checks
from fastrl import backend as backends
from fastrl.advantages import Groups, group_advantages, normalise

_WHITEN = ("batch", "tokens", "none")
_TOKEN_EPS = 1e-8  # of verl's masked_whiten, under the root


def gdpo_advantages(
    rewards: Tensor,
    *,
    weights: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    whiten: str = "batch",
    lengths: Tensor | None = None,
    eps: float = 1e-4,
    backend: str = "auto",
) -> Tensor:
    """Several rewards, each normalised within its group before they are added: xᵢ = Σₖ wₖ·(rᵢₖ − μₖ)/(σₖ + eps).

    Then x is standardised over the batch. whiten: "batch" (x − mean)/(std + eps), unbiased (TRL's normalize_then_sum);
    "tokens" (x − μ)/√(var + 1e-8) with every sequence counted `lengths` times, var unbiased (verl's whitening of the
    tokens); or "none".

    Args:
        rewards: (S, K) floats, K rewards of each sequence.
        weights: (K,) floats; None = 1 each.
        group_size, group_ids, eps, backend: as for `group_advantages`.
        lengths: (S,) tokens of each sequence, for "tokens" only.

    Returns:
        (S,) float32 (float64 for float64 rewards). Exactly 0 where no reward varies in the group, also after the
        standardisation, which in verl moves such a group off 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or name, or not exactly one of group_size and group_ids.

    Source: arXiv:2601.05242 (GDPO). TRL leaves out NaN rewards; here they stay visible.
    """
    if whiten not in _WHITEN:
        _checks.refuse("whiten", f"one of {', '.join(map(repr, _WHITEN))}", repr(whiten))
    if (lengths is not None) != (whiten == "tokens"):
        came = f"{'None' if lengths is None else 'a tensor'} with {whiten!r}"
        _checks.refuse("lengths", "the tokens of each sequence with, and only with, whiten 'tokens'", came)
    given = Groups.of(rewards, group_size, group_ids, lengths, eps, ndim=2)
    if weights is not None:
        _checks.floating("weights", weights)
        _checks.shape("weights", weights, (rewards.shape[1],), "one per reward")
        _checks.same_device("weights", weights, rewards.device, "rewards")
        weights = weights.detach().contiguous()
    if backends.of(rewards, backend) == "triton":
        finish_eps = _TOKEN_EPS if whiten == "tokens" else given.eps
        return _launch(given, weights, scale="group", finish=whiten, finish_eps=finish_eps)
    S, K = given.rewards.shape
    r, groups = given.rewards.double(), given.grouping
    x = normalise(r.T.reshape(-1), groups.repeated(K), "mean", "group", given.eps).view(K, S)
    x = (x if weights is None else x * weights.double()[:, None]).sum(0)
    return given.cast(torch.where(groups.varies(r).any(1), _standardised(x, whiten, given), 0))


def _standardised(x: Tensor, whiten: str, given: Groups) -> Tensor:
    if whiten == "none":
        return x
    weight = torch.ones_like(x) if given.lengths is None else given.lengths.double()
    n = weight.sum()
    x = x - torch.where(weight > 0, weight * x, 0).sum() / n.clamp_min(1)
    variance = torch.where(weight > 0, weight * x * x, 0).sum() / (n - 1).clamp_min(1)
    return x * (variance + _TOKEN_EPS).rsqrt() if whiten == "tokens" else x / (variance.sqrt() + given.eps)


def gpg_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    f_norm: float = 1.0,
    alpha: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A = α·(r − group mean)/f_norm, α making up for the groups that carry no signal.

    Args:
        f_norm: a positive number.
        alpha: None = S / #(samples whose group varies), as in the paper; or a number or 0-d tensor. verl counts rewards
            that are not zero instead: pass `len(rewards) / rewards.count_nonzero().clamp(min=1)`.
        rewards, group_size, group_ids, backend: as for `group_advantages`.

    Returns:
        (S,) float32 (float64 for float64 rewards); exactly 0 where a group does not vary (verl gives α·r/f_norm to a
        group of one).

    Source: arXiv:2504.02546 (GPG).
    """
    _checks.number("f_norm", f_norm)
    if alpha is not None:
        if isinstance(alpha, Tensor):
            _checks.shape("alpha", alpha, (), "0-d")
        else:
            _checks.number("alpha", alpha)
        centred = group_advantages(rewards, group_size=group_size, group_ids=group_ids, scale="none", backend=backend)
        return centred * (alpha / f_norm)
    given = Groups.of(rewards, group_size, group_ids, None, 0.0)
    if backends.of(rewards, backend) == "triton":
        given = given._replace(rewards=given.rewards[:, None])
        return _launch(given, None, scale="none", finish="signal", factor=1 / f_norm)
    r, groups = given.rewards.double(), given.grouping
    count = groups.varies(r).sum().clamp_min(1)
    return given.cast(normalise(r, groups, "mean", "none", 0.0) * (r.shape[0] / count / f_norm))


def _launch(
    given: Groups, weights: Tensor | None, *, scale: str, finish: str, finish_eps: float = 0.0, factor: float = 1.0
) -> Tensor:
    import fastrl_kernels as kernels

    return kernels.batch_advantages(
        given.rewards, weights, given.group_ids, given.group_size, given.lengths,
        eps=given.eps, finish_eps=finish_eps, factor=factor, scale=scale, finish=finish,
    )  # fmt: skip
