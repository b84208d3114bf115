"""verl's estimators of one advantage per sequence, with fastrl's: the rewards of a sequence's tokens are added up.

All return (advantages, returns), (B, T), which are the same here, 0 under the mask.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrl import _checks
from fastrl.adapters._config import fields_of
from fastrl.adapters.verl.algorithm import ALGORITHM, Pair, given_or_refuse, groups_of, none_left, scale_of, spread
from fastrl.advantages import group_advantages, pass_at_k_advantages
from fastrl.batch_advantages import gdpo_advantages, gpg_advantages


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    **other: Any,
) -> Pair:
    """`group_advantages`; the scale is "group", or "none" where norm_adv_by_std_in_grpo is off (Dr. GRPO)."""
    none_left(other)
    rewards = token_level_rewards.sum(-1)
    scale = scale_of(norm_adv_by_std_in_grpo, config)
    if _may_hold_sessions(config):
        say_sessions()
    groups = groups_of(index, rewards)
    return spread(group_advantages(rewards, group_ids=groups, scale=scale, eps=epsilon), response_mask)


def _may_hold_sessions(config: Any) -> bool:
    """Whether verl's default trainer may have handed over every output of a session, the name not being "grpo"."""
    named = config is not None and fields_of(config).get("adv_estimator") == "fastrl_grpo"
    return named and "verl.trainer.ppo.v1.utils" in sys.modules


@functools.cache
def say_sessions() -> None:
    """Warn once: the outputs of a session look like those of any other, so there is nothing to refuse."""
    logging.getLogger("fastrl").warning(
        "algorithm.adv_estimator: verl's default trainer scores the last output of each agent's session under the name "
        "'grpo' only; under 'fastrl_grpo' every output is scored, which is the same for one output per session. With "
        "several, set algorithm.adv_estimator=grpo and have fastrl stand in: fastrl.adapters.verl.install(['grpo'])"
    )


def rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **other: Any
) -> Pair:
    """`group_advantages` with the leave-one-out baseline and no scale."""
    none_left(other)
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    groups = groups_of(index, rewards)
    advantages = group_advantages(rewards, group_ids=groups, baseline="leave-one-out", scale="none")
    return spread(advantages, response_mask)


def opo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **other: Any
) -> Pair:
    """`group_advantages` with the length-weighted baseline and no scale."""
    none_left(other)
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    advantages = group_advantages(
        rewards,
        group_ids=groups_of(index, rewards),
        baseline="length-weighted",
        scale="none",
        lengths=(response_mask != 0).sum(-1),
    )
    return spread(advantages, response_mask)


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    **other: Any,
) -> Pair:
    """`pass_at_k_advantages`; as in verl, the config decides on the scale, and the argument is not read."""
    none_left(other)
    rewards = token_level_rewards.sum(-1)
    scale = scale_of(None, config)
    groups = groups_of(index, rewards)
    return spread(pass_at_k_advantages(rewards, group_ids=groups, scale=scale, eps=epsilon), response_mask)


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any = None,
    **other: Any,
) -> Pair:
    """`gpg_advantages` with verl's α, the batch over its rewards that are not 0; as in verl, `alpha` and `epsilon` are
    not read."""
    none_left(other)
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    counted = rewards.shape[0] / rewards.count_nonzero().clamp(min=1)
    groups = groups_of(index, rewards)
    return spread(gpg_advantages(rewards, group_ids=groups, f_norm=f_norm, alpha=counted), response_mask)


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
    **other: Any,
) -> Pair:
    """`gdpo_advantages`, whitened over the tokens: of the rewards that config.gdpo_reward_keys names in
    non_tensor_batch; without a config, of the token rewards alone."""
    none_left(other)
    found = ALGORITHM.read(config)
    if not norm_adv_by_std_in_grpo:
        ALGORITHM.refuse("norm_adv_by_std_in_grpo", False, "GDPO divides each reward by its std; leave it True")
    weights = None
    if config is None:
        columns = token_level_rewards.sum(-1, keepdim=True)
    else:
        if non_tensor_batch is None:
            given_or_refuse("non_tensor_batch", None, "gdpo")
        columns = _reward_columns(found["gdpo_reward_keys"], non_tensor_batch, token_level_rewards)
        if found["gdpo_reward_weights"] is not None:
            weights = torch.tensor(list(found["gdpo_reward_weights"]), dtype=columns.dtype, device=columns.device)
    advantages = gdpo_advantages(
        columns,
        weights=weights,
        group_ids=groups_of(index, columns),
        whiten="tokens",
        lengths=(response_mask != 0).sum(-1),
        eps=epsilon,
    )
    return spread(advantages, response_mask)


def _reward_columns(keys: Any, batch: Any, like: Tensor) -> Tensor:
    if not keys:
        ALGORITHM.refuse("gdpo_reward_keys", keys, "list the rewards that compute_score returns")
    missing = [key for key in keys if key not in batch]
    if missing:
        _checks.refuse("gdpo_reward_keys", f"keys of non_tensor_batch, {', '.join(batch)}", repr(missing[0]))
    rewards = [torch.as_tensor(np.asarray(batch[key], dtype=np.float32)) for key in keys]
    return torch.stack(rewards, 1).to(like.device)
