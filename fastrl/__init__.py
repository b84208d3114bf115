"""GRPO / PPO losses for language models: fused, exact, drop-in. The public list; nothing else happens here."""

from fastrl._info import info
from fastrl.advantages import group_advantages
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
from fastrl.rollout_correction import RolloutCorrection
from fastrl.rollouts import Rollouts, shift_for_next_token
from fastrl.spec import LossSpec

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
    "LMHead",
    "LossOutput",
    "LossSpec",
    "Metrics",
    "PolicyLoss",
    "RolloutCorrection",
    "Rollouts",
    "TokenLogprobs",
    "group_advantages",
    "info",
    "logprobs_from_hidden",
    "logprobs_from_logits",
    "policy_loss",
    "policy_loss_from_hidden",
    "policy_loss_from_logits",
    "shift_for_next_token",
]
