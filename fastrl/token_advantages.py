"""Advantages per token: REINFORCE++ and its form with a group baseline, ReMax, the optimal token baseline.

Scans run on the backend of `discounted_returns`; the rest is vectorised torch on any device, without a loop over
groups or tokens and without a host synchronisation. Rewards are data: nothing here has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.advantages import group_advantages
from fastrl.dtypes import wide
from fastrl.grouping import Grouping, check_groups
from fastrl.returns import discounted_returns
from fastrl.whitening import whiten

_ALIGN = ("position", "token")


def reinforce_plus_plus_advantages(
    rewards: Tensor, *, mask: Tensor | None = None, gamma: float = 1.0, unbiased: bool = True, backend: str = "auto"
) -> Tensor:
    """REINFORCE++: discounted returns, whitened over the valid tokens of the batch: A = (R − μ)/σ.

    Args:
        rewards: (B, T) floats, usually `kl_shaped_rewards(...).rewards`. NeMo-RL first takes the group mean off the
            scores: shape `group_advantages(..., scale="none")`.
        mask: (B, T) bool or 0/1; a masked step is no step (verl). None = all.
        gamma: discount within [0, 1].
        unbiased: True as verl's, False as OpenRLHF's and NeMo-RL's variance; see `whiten`.
        backend: as for `discounted_returns`.

    Returns:
        (B, T) float32 (float64 for float64 rewards), 0 under the mask.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or number.

    Source: arXiv:2501.03262 (REINFORCE++).
    """
    return whiten(discounted_returns(rewards, gamma=gamma, mask=mask, backend=backend), mask, unbiased=unbiased)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor,
    *,
    mask: Tensor,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    unbiased: bool = True,
    backend: str = "auto",
) -> Tensor:
    """REINFORCE++ with a group baseline: A = (r − group mean), at every valid token, then whitened over those.

    Args:
        rewards: (B,) floats, one per sequence.
        mask: (B, T) bool or 0/1: every token of a sequence counts in the whitening.
        group_size, group_ids, backend: as for `group_advantages`; unbiased: as for `whiten`.

    Returns:
        (B, T) float32 (float64 for float64 rewards), 0 under the mask. Exactly 0 where the group does not vary, which
        verl's whitening moves off 0, and where verl gives a group of one its whitened reward.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or number.

    Source: arXiv:2501.03262.
    """
    centred = group_advantages(rewards, group_size=group_size, group_ids=group_ids, scale="none", backend=backend)
    _checks.tensor("mask", mask)
    if mask.ndim != 2 or mask.shape[0] != rewards.shape[0]:
        _checks.refuse("mask", f"shape ({rewards.shape[0]}, T), a row per reward", mask)
    per_token = centred[:, None].expand(mask.shape)
    informed = Grouping.of(group_size, group_ids).varies(rewards.detach())
    return torch.where(informed[:, None], whiten(per_token, mask, unbiased=unbiased), 0)


def remax_advantages(
    rewards: Tensor, greedy_rewards: Tensor, *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """ReMax: the return of the sampled answer less the reward of the greedy one: Aₜ = Σ_{s≥t} rₛ − r_greedy.

    Args:
        rewards: (B,) floats, one per sequence, or (B, T), one per token.
        greedy_rewards: (B,) floats, of the greedy answer to the same prompt.
        mask: (B, T) bool or 0/1, with token rewards only; None = all.
        backend: as for `discounted_returns`.

    Returns:
        The shape of rewards, float32 (float64 for float64 rewards), 0 under the mask.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.

    Source: arXiv:2310.10505 (ReMax).
    """
    _checks.floating("rewards", rewards)
    _checks.floating("greedy_rewards", greedy_rewards)
    _checks.shape("greedy_rewards", greedy_rewards, tuple(rewards.shape[:1]), "one per sequence")
    _checks.same_device("greedy_rewards", greedy_rewards, rewards.device, "rewards")
    greedy = greedy_rewards.detach().to(wide(rewards.dtype))
    if rewards.ndim == 1:
        if mask is not None:
            _checks.refuse("mask", "None with one reward per sequence", mask, "pass token rewards of shape (B, T)")
        return rewards.detach().to(greedy.dtype) - greedy
    advantages = discounted_returns(rewards, mask=mask, backend=backend) - greedy[:, None]
    return advantages if mask is None else torch.where(mask != 0, advantages, 0)


def optimal_token_baseline_advantages(
    rewards: Tensor,
    logps: Tensor,
    sum_pi_squared: Tensor,
    *,
    mask: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    align: str = "position",
    keep_tail: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Aₜ = Gₜ − Bₜ,  Bₜ = Σ G·W / (Σ W + eps) over the group's samples with a token at t: the least-variance baseline.

    Gₜ = Σ_{s≥t} rₛ, and W grows with the squared score of the path so far: Wₜ = Σ_{s≤t} ρₛ²·(1 − 2πₛ + Σ_v π(v)²).

    Args:
        rewards: (B, T) floats, one per token.
        logps: (B, T) log πₜ of the sampled tokens under the policy that is trained (old_logps).
        sum_pi_squared: (B, T) Σ_v π(v)² of each token's distribution.
        mask: (B, T) bool or 0/1, any pattern; None = all. Nothing is read where it is 0.
        group_size, group_ids: as for `group_advantages`, of the B sequences.
        rollout_weights: (B, T) ρ, the importance weights of a rollout correction; None = 1.
        align: which tokens of a group are compared: those at one "position" of the row (verl's OTB), or the n-th valid
            "token" of each (its form for tool calls, whose masks have holes).
        keep_tail: where only one sample of a group of several has a token, its baseline is 0 and A = G (verl's
            handle_zero_tail); False: its own return, and A = 0.

    Returns:
        (B, T) float32 (float64 for float64 rewards), 0 under the mask. Exactly 0 in a group of one (verl: A = G), and
        in a group whose returns are equal wherever two samples can be compared, its tail included (verl: A = G there).

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, name or number.

    Source: verl's optimal_token_baseline and tir_optimal_token_baseline.
    """
    keep = _checks.keep(mask, rewards, "rewards")
    returns = discounted_returns(rewards, mask=mask).double()
    for name, value in (("logps", logps), ("sum_pi_squared", sum_pi_squared), ("rollout_weights", rollout_weights)):
        if value is not None:
            _checks.floating(name, value)
            _checks.shape(name, value, tuple(rewards.shape), "the shape of rewards")
            _checks.same_device(name, value, rewards.device, "rewards")
    check_groups(rewards, group_size, group_ids)
    _checks.number_from_zero("eps", eps)
    if align not in _ALIGN:
        _checks.refuse("align", f"one of {', '.join(map(repr, _ALIGN))}", repr(align))
    if keep is None:
        keep = torch.ones_like(rewards, dtype=torch.bool)
    # ‖∇ log π‖² is at least (1 − π)²; rounding must not make it negative.
    energy = (1 - 2 * logps.detach().double().exp() + sum_pi_squared.detach().double()).clamp_min(0)
    if rollout_weights is not None:
        energy = energy * rollout_weights.detach().double() ** 2
    path = torch.where(keep, energy, 0).cumsum(1)
    groups = Grouping.of(group_size, group_ids)
    if align == "position":
        advantages = _against_group(returns, path, keep, groups, keep_tail, eps)
    else:
        width = rewards.shape[1]
        place = torch.where(keep, keep.cumsum(1) - 1, width)  # column T takes what does not count

        def moved(x: Tensor) -> Tensor:
            return x.new_zeros((x.shape[0], width + 1)).scatter(1, place, x)[:, :width]

        dense = _against_group(moved(returns), moved(path), moved(keep), groups, keep_tail, eps)
        advantages = dense.gather(1, place.clamp_max(max(width - 1, 0)))
    return torch.where(keep, advantages, 0).to(wide(rewards.dtype))


def _against_group(
    returns: Tensor, path: Tensor, keep: Tensor, groups: Grouping, keep_tail: bool, eps: float
) -> Tensor:
    """(B, T) returns less the baseline of their column; anything where `keep` is False."""
    products = groups.sum(torch.where(keep, returns * path, 0))
    advantages = returns - products / (groups.sum(torch.where(keep, path, 0)) + eps)
    count = groups.sum(keep.double())
    low = groups.least(torch.where(keep, returns, torch.inf))
    high = groups.greatest(torch.where(keep, returns, -torch.inf))
    differ = (low != high) & (count > 0)
    advantages = torch.where(differ, advantages, 0)
    if keep_tail:
        advantages = torch.where((count == 1) & differ.any(1, keepdim=True), returns, advantages)
    return advantages
