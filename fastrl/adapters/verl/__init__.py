"""verl 0.9.1: policy losses and advantage estimators under `fastrl_*`, with verl's signatures, values and metrics.

    actor_rollout_ref.actor.policy_loss.loss_mode=fastrl_vanilla    # instead of: vanilla
    algorithm.adv_estimator=fastrl_rloo                             # instead of: rloo

The plug-in entry point registers the names when verl is imported; `register()` does it by hand. Estimators that verl's
trainers know by name (grpo, gae, ...) run fastrl through `install()`. Importing this package registers and changes
nothing.
"""

from fastrl.adapters.verl.advantages import ADVANTAGE_ESTIMATORS
from fastrl.adapters.verl.config import spec_from_config
from fastrl.adapters.verl.losses import POLICY_LOSSES
from fastrl.adapters.verl.registry import install, register, restore

__all__ = ["ADVANTAGE_ESTIMATORS", "POLICY_LOSSES", "install", "register", "restore", "spec_from_config"]
