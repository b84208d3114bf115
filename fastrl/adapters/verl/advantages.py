"""verl's advantage estimators with fastrl's, of verl's signatures, for its registry.

All return (advantages, returns), (B, T), 0 under the mask. A group of one, or of equal rewards, has advantage exactly 0;
what verl gives there is in `docs/verl.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrl import _checks
from fastrl.adapters._config import Options
from fastrl.advantages import group_advantages, pass_at_k_advantages
from fastrl.batch_advantages import gdpo_advantages, gpg_advantages
from fastrl.returns import discounted_returns, gae
from fastrl.token_advantages import (
    optimal_token_baseline_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
)

PREFIX = "fastrl_"
_OWN = "set algorithm.adv_estimator to verl's own name, without 'fastrl_'"
ALGORITHM = Options(
    framework="verl 0.9's AlgoConfig",
    honoured={
        "gamma": 1.0,
        "norm_adv_by_std_in_grpo": True,
        "gdpo_reward_keys": None,
        "gdpo_reward_weights": None,
    },
    elsewhere=frozenset({
        "_target_", "lam", "adv_estimator", "use_kl_in_reward", "kl_penalty", "kl_ctrl", "use_pf_ppo", "pf_ppo",
        "filter_groups", "rollout_correction",
    }),
    own_loss=_OWN,
)  # fmt: skip

Pair = tuple[Tensor, Tensor]


def _groups(index: Any, rewards: Tensor) -> Tensor:
    """(B,) int64 from verl's uids: strings, numbers or a tensor."""
    if index is None:
        _checks.refuse("index", "the uid of each sequence", "None", "put 'uid' into the batch")
    if isinstance(index, Tensor):
        return index.to(rewards.device)
    return torch.from_numpy(np.unique(np.asarray(index), return_inverse=True)[1].reshape(-1)).to(rewards.device)


def _scale(by_std: bool | None, config: Any) -> str:
    """The argument, as verl hands it to its own grpo; else the config's."""
    by_std = ALGORITHM.read(config)["norm_adv_by_std_in_grpo"] if by_std is None else by_std
    return "group" if by_std else "none"


def _spread(advantages: Tensor, mask: Tensor) -> Pair:
    """(B,) -> (B, T), 0 under the mask; outcome advantages are their own returns."""
    spread = torch.where(mask != 0, advantages[:, None], 0)
    return spread, spread


def grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
) -> Pair:
    """`group_advantages`; the scale is "group", or "none" where norm_adv_by_std_in_grpo is off (Dr. GRPO)."""
    rewards = token_level_rewards.sum(-1)
    scale = _scale(norm_adv_by_std_in_grpo, config)
    groups = _groups(index, rewards)
    return _spread(group_advantages(rewards, group_ids=groups, scale=scale, eps=epsilon), response_mask)


def rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, epsilon: float = 1e-6, config: Any = None
) -> Pair:
    """`group_advantages` with the leave-one-out baseline and no scale; epsilon is not used, nor by verl."""
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    groups = _groups(index, rewards)
    advantages = group_advantages(rewards, group_ids=groups, baseline="leave-one-out", scale="none")
    return _spread(advantages, response_mask)


def opo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, epsilon: float = 1e-6, config: Any = None
) -> Pair:
    """`group_advantages` with the length-weighted baseline and no scale; epsilon is not used, nor by verl."""
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    advantages = group_advantages(
        rewards,
        group_ids=_groups(index, rewards),
        baseline="length-weighted",
        scale="none",
        lengths=(response_mask != 0).sum(-1),
    )
    return _spread(advantages, response_mask)


def grpo_passk(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
) -> Pair:
    """`pass_at_k_advantages`; as in verl, the config decides on the scale, and the argument is not read."""
    rewards = token_level_rewards.sum(-1)
    scale = _scale(None, config)
    groups = _groups(index, rewards)
    return _spread(pass_at_k_advantages(rewards, group_ids=groups, scale=scale, eps=epsilon), response_mask)


def gpg(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config: Any = None,
) -> Pair:
    """`gpg_advantages` with verl's α, the batch over its rewards that are not 0; as in verl, `alpha` and `epsilon` are
    not read."""
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    counted = rewards.shape[0] / rewards.count_nonzero().clamp(min=1)
    groups = _groups(index, rewards)
    return _spread(gpg_advantages(rewards, group_ids=groups, f_norm=f_norm, alpha=counted), response_mask)


def reinforce_plus_plus(token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **other: Any) -> Pair:
    """`reinforce_plus_plus_advantages` at the config's gamma, and its returns."""
    _none_left(other, "index", "epsilon")
    mask = response_mask != 0
    gamma = ALGORITHM.read(config)["gamma"]
    advantages = reinforce_plus_plus_advantages(token_level_rewards, mask=mask, gamma=gamma)
    return advantages, discounted_returns(token_level_rewards, mask=mask, gamma=gamma)


def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, epsilon: float = 1e-6, config: Any = None
) -> Pair:
    """`reinforce_plus_plus_baseline_advantages`; epsilon is not used, nor by verl."""
    ALGORITHM.read(config)
    rewards = token_level_rewards.sum(-1)
    groups = _groups(index, rewards)
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
    _none_left(other, "index", "epsilon")
    ALGORITHM.read(config)
    _given("reward_baselines", reward_baselines, "remax")
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
    _none_left(other, "index")
    _given("values", values, "gae")
    found = ALGORITHM.read(config)
    found["lam"] = 1.0 if config is None else config["lam"]
    gamma, lam = (found[k] if v is None else float(v) for k, v in (("gamma", gamma), ("lam", lam)))
    return gae(token_level_rewards, values, mask=response_mask != 0, gamma=gamma, lam=lam, whiten=True)


def gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
) -> Pair:
    """`gdpo_advantages`, whitened over the tokens: of the rewards that config.gdpo_reward_keys names in
    non_tensor_batch; without a config, of the token rewards alone."""
    found = ALGORITHM.read(config)
    if not norm_adv_by_std_in_grpo:
        ALGORITHM.refuse("norm_adv_by_std_in_grpo", False, "GDPO divides each reward by its std; leave it True")
    weights = None
    if config is None:
        columns = token_level_rewards.sum(-1, keepdim=True)
    else:
        if non_tensor_batch is None:
            _given("non_tensor_batch", None, "gdpo")
        columns = _reward_columns(found["gdpo_reward_keys"], non_tensor_batch, token_level_rewards)
        if found["gdpo_reward_weights"] is not None:
            weights = torch.tensor(list(found["gdpo_reward_weights"]), dtype=columns.dtype, device=columns.device)
    advantages = gdpo_advantages(
        columns,
        weights=weights,
        group_ids=_groups(index, columns),
        whiten="tokens",
        lengths=(response_mask != 0).sum(-1),
        eps=epsilon,
    )
    return _spread(advantages, response_mask)


def _reward_columns(keys: Any, batch: Any, like: Tensor) -> Tensor:
    if not keys:
        ALGORITHM.refuse("gdpo_reward_keys", keys, "list the rewards that compute_score returns")
    missing = [key for key in keys if key not in batch]
    if missing:
        _checks.refuse("gdpo_reward_keys", f"keys of non_tensor_batch, {', '.join(batch)}", repr(missing[0]))
    rewards = [torch.as_tensor(np.asarray(batch[key], dtype=np.float32)) for key in keys]
    return torch.stack(rewards, 1).to(like.device)


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
    _none_left(given)
    for name, value in (("old_log_probs", old), ("sum_pi_squared", squares)):
        _given(name, value, "optimal_token_baseline")
    mask = response_mask != 0
    advantages = optimal_token_baseline_advantages(
        rewards, old, squares, mask=mask, group_ids=_groups(index, rewards), rollout_weights=weights, align=align,
        keep_tail=keep_tail, eps=eps,
    )  # fmt: skip
    return advantages, discounted_returns(rewards, mask=mask)


def _given(name: str, value: Any, verl: str) -> None:
    if value is None:
        remedy = f"verl's trainers hand it to '{verl}' only: see fastrl.adapters.verl.install for that name"
        _checks.refuse(name, "a value, as this estimator reads it", "None", remedy)


def _none_left(other: dict[str, Any], *unread: str) -> None:
    """Refuse an argument that neither verl nor this adapter knows; `unread` are those that verl does not read."""
    unknown = sorted(set(other) - set(unread))
    if unknown:
        _checks.refuse(unknown[0], "an argument of verl 0.9's estimator", repr(other[unknown[0]]), _OWN)


ADVANTAGE_ESTIMATORS: dict[str, Callable[..., Pair]] = {
    "fastrl_gae": generalized,
    "fastrl_gdpo": gdpo,
    "fastrl_gpg": gpg,
    "fastrl_grpo": grpo,
    "fastrl_grpo_passk": grpo_passk,
    "fastrl_grpo_vectorized": grpo,
    "fastrl_opo": opo,
    "fastrl_optimal_token_baseline": optimal_token_baseline,
    "fastrl_reinforce_plus_plus": reinforce_plus_plus,
    "fastrl_reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "fastrl_remax": remax,
    "fastrl_rloo": rloo,
    "fastrl_rloo_vectorized": rloo,
    "fastrl_tir_optimal_token_baseline": tir_optimal_token_baseline,
}
"""Every estimator by the name that it is registered under."""
