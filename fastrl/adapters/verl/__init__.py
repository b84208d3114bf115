"""verl 0.9: policy losses and advantage estimators under `fastrl_*`, with verl's signatures, values and metrics.

    actor_rollout_ref.actor.policy_loss.loss_mode=fastrl_vanilla    # instead of: vanilla
    algorithm.adv_estimator=fastrl_grpo                             # instead of: grpo

The plug-in entry point registers the names when verl is imported; `register()` does it by hand. Nothing is registered
or changed by importing this package.
"""

from fastrl.adapters.verl.advantages import ADVANTAGE_ESTIMATORS
from fastrl.adapters.verl.config import spec_from_config
from fastrl.adapters.verl.losses import POLICY_LOSSES
from fastrl.adapters.verl.registry import install, register, restore

__all__ = ["ADVANTAGE_ESTIMATORS", "POLICY_LOSSES", "install", "register", "restore", "spec_from_config"]
