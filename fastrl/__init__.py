"""GRPO / PPO losses for language models: fused, exact, drop-in. The public list; nothing else happens here."""

from fastrl._info import info
from fastrl.advantages import group_advantages, pass_at_k_advantages
from fastrl.batch_advantages import gdpo_advantages, gpg_advantages
from fastrl.controllers import AdaptiveEntropyController, AdaptiveKLController, FixedKLController
from fastrl.critic import ValueMetrics, td_loss, value_loss, value_metrics
from fastrl.functional import (
    LossOutput,
    TokenLogprobs,
    logprobs_from_hidden,
    logprobs_from_logits,
    policy_loss,
    policy_loss_from_hidden,
    policy_loss_from_logits,
)
from fastrl.head import LMHead
from fastrl.metrics import Metrics
from fastrl.nn import PolicyLoss
from fastrl.presets import (
    BNPO,
    CISPO,
    CLIP_COV,
    DAPO,
    DPPO_KL,
    DPPO_TV,
    DR_GRPO,
    DRO,
    GMPO,
    GPG,
    GRPO,
    GSPO,
    GSPO_TOKEN,
    KL_COV,
    LUSPO,
    PPO,
    REINFORCE,
    RLOO,
    SAPO,
    TOPR,
    VESPO,
)
from fastrl.returns import discounted_returns, gae, length_adaptive_lambda, n_step_returns, td_errors
from fastrl.reward_model import ranked_reward_loss, reward_model_loss
from fastrl.reward_shaping import ShapedRewards, kl_shaped_advantages, kl_shaped_rewards
from fastrl.rollout_correction import RolloutCorrection
from fastrl.rollouts import Rollouts, shift_for_next_token
from fastrl.spec import LossSpec
from fastrl.token_advantages import (
    optimal_token_baseline_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
)
from fastrl.whitening import whiten

__version__ = "0.1.0"

__all__ = [
    "BNPO",
    "CISPO",
    "CLIP_COV",
    "DAPO",
    "DPPO_KL",
    "DPPO_TV",
    "DRO",
    "DR_GRPO",
    "GMPO",
    "GPG",
    "GRPO",
    "GSPO",
    "GSPO_TOKEN",
    "KL_COV",
    "LUSPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SAPO",
    "TOPR",
    "VESPO",
    "AdaptiveEntropyController",
    "AdaptiveKLController",
    "FixedKLController",
    "LMHead",
    "LossOutput",
    "LossSpec",
    "Metrics",
    "PolicyLoss",
    "RolloutCorrection",
    "Rollouts",
    "ShapedRewards",
    "TokenLogprobs",
    "ValueMetrics",
    "discounted_returns",
    "gae",
    "gdpo_advantages",
    "gpg_advantages",
    "group_advantages",
    "info",
    "kl_shaped_advantages",
    "kl_shaped_rewards",
    "length_adaptive_lambda",
    "logprobs_from_hidden",
    "logprobs_from_logits",
    "n_step_returns",
    "optimal_token_baseline_advantages",
    "pass_at_k_advantages",
    "policy_loss",
    "policy_loss_from_hidden",
    "policy_loss_from_logits",
    "ranked_reward_loss",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "reward_model_loss",
    "shift_for_next_token",
    "td_errors",
    "td_loss",
    "value_loss",
    "value_metrics",
    "whiten",
]
