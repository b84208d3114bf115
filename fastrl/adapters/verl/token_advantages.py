"""verl's estimators of one advantage per token, with fastrl's.

All return (advantages, returns), (B, T), 0 under the mask.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrl.adapters.verl.algorithm import ALGORITHM, Pair, given_or_refuse, groups_of, none_left
from fastrl.returns import discounted_returns, gae
from fastrl.token_advantages import (
    optimal_token_baseline_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
)


def reinforce_plus_plus(token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **other: Any) -> Pair:
    """`reinforce_plus_plus_advantages` at the config's gamma, and its returns."""
    none_left(other)
    mask = response_mask != 0
    gamma = ALGORITHM.read(config)["gamma"]
    advantages = reinforce_plus_plus_advantages(token_level_rewards, mask=mask, gamma=gamma)
    return advantages, discounted_returns(token_level_rewards, mask=mask, gamma=gamma)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **other: Any
) -> Pair:
    """`reinforce_plus_plus_baseline_advantages`."""
    none_left(other)
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    groups = groups_of(index, rewards)
    advantages = reinforce_plus_plus_baseline_advantages(rewards, mask=response_mask != 0, group_ids=groups)
    return advantages, advantages


def remax(
    token_level_rewards: Tensor,
    reward_baselines: Tensor | None = None,
    response_mask: Tensor | None = None,
    config: Any = None,
    **other: Any,
) -> Pair:
    """`remax_advantages` against the greedy answers' rewards, and the returns."""
    none_left(other)
    ALGORITHM.read(config)
    given_or_refuse("reward_baselines", reward_baselines, "remax")
    mask = response_mask != 0
    advantages = remax_advantages(token_level_rewards, reward_baselines.to(token_level_rewards.dtype), mask=mask)
    return advantages, discounted_returns(token_level_rewards, mask=mask)


def generalized(
    token_level_rewards: Tensor,
    values: Tensor | None = None,
    response_mask: Tensor | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    config: Any = None,
    **other: Any,
) -> Pair:
    """`gae`, whitened; gamma and lam are verl's arguments, or else the config's."""
    none_left(other)
    given_or_refuse("values", values, "gae")
    found = ALGORITHM.read(config)
    gamma, lam = (found[k] if v is None else float(v) for k, v in (("gamma", gamma), ("lam", lam)))
    return gae(token_level_rewards, values, mask=response_mask != 0, gamma=gamma, lam=lam, whiten=True)


def optimal_token_baseline(token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, **given: Any) -> Pair:
    """`optimal_token_baseline_advantages`, tokens of a group compared by their place in the row; and the returns."""
    return _optimal(token_level_rewards, response_mask, index, "position", given)


def tir_optimal_token_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, **given: Any
) -> Pair:
    """As `optimal_token_baseline`, the n-th valid tokens of a group compared."""
    return _optimal(token_level_rewards, response_mask, index, "token", given)


def _optimal(rewards: Tensor, response_mask: Tensor, index: Any, align: str, given: dict[str, Any]) -> Pair:
    ALGORITHM.read(given.pop("config", None))
    old, squares = given.pop("old_log_probs", None), given.pop("sum_pi_squared", None)
    weights, keep_tail = given.pop("rollout_is_weights", None), given.pop("handle_zero_tail", True)
    eps = given.pop("epsilon", 1e-8)
    none_left(given)
    for name, value in (("old_log_probs", old), ("sum_pi_squared", squares)):
        given_or_refuse(name, value, "optimal_token_baseline")
    mask = response_mask != 0
    advantages = optimal_token_baseline_advantages(
        rewards, old, squares, mask=mask, group_ids=groups_of(index, rewards), rollout_weights=weights, align=align,
        keep_tail=keep_tail, eps=eps,
    )  # fmt: skip
    return advantages, discounted_returns(rewards, mask=mask)
