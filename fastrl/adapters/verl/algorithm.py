"""What verl's advantage estimators share: its `AlgoConfig`, the groups of a batch, and refusals by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrl import _checks
from fastrl.adapters._config import Options

OWN = "set algorithm.adv_estimator to verl's own name, without 'fastrl_'"
ALGORITHM = Options(
    framework="verl 0.9.1's AlgoConfig",
    honoured={
        "gamma": 1.0,
        "lam": 1.0,
        "norm_adv_by_std_in_grpo": True,
        "gdpo_reward_keys": None,
        "gdpo_reward_weights": None,
    },
    elsewhere=frozenset({
        "_target_", "adv_estimator", "use_kl_in_reward", "kl_penalty", "kl_ctrl", "use_pf_ppo", "pf_ppo",
        "filter_groups", "rollout_correction",
    }),
    own_loss=OWN,
)  # fmt: skip

Pair = tuple[Tensor, Tensor]


def groups_of(index: Any, rewards: Tensor) -> Tensor:
    """(B,) int64 from verl's uids: strings, numbers or a tensor."""
    if index is None:
        _checks.refuse("index", "the uid of each sequence", "None", "put 'uid' into the batch")
    if isinstance(index, Tensor):
        return index.to(rewards.device)
    return torch.from_numpy(np.unique(np.asarray(index), return_inverse=True)[1].reshape(-1)).to(rewards.device)


def scale_of(by_std: bool | None, config: Any) -> str:
    """The argument, as verl hands it to its own grpo; else the config's."""
    by_std = ALGORITHM.read(config)["norm_adv_by_std_in_grpo"] if by_std is None else by_std
    return "group" if by_std else "none"


def spread(advantages: Tensor, mask: Tensor) -> Pair:
    """(B,) -> (B, T), 0 under the mask; outcome advantages are their own returns."""
    spread = torch.where(mask != 0, advantages[:, None], 0)
    return spread, spread


def given_or_refuse(name: str, value: Any, verl: str) -> None:
    if value is None:
        remedy = f"verl's trainers hand it to '{verl}' only: see fastrl.adapters.verl.install for that name"
        _checks.refuse(name, "a value, as this estimator reads it", "None", remedy)


_UNREAD = {"index", "epsilon", "reward_baselines"}
"""What verl's trainer may hand to any estimator, read or not."""


def none_left(other: dict[str, Any]) -> None:
    """Refuse an argument that verl's estimators do not have."""
    unknown = sorted(set(other) - _UNREAD)
    if unknown:
        _checks.refuse(unknown[0], "an argument of verl 0.9.1's estimator", repr(other[unknown[0]]), OWN)
