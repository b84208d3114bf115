"""NeMo-RL (main, August 2026): `ClippedPGLossFn`, same config, call and metrics.

    from fastrl.adapters.nemo_rl import ClippedPGLossFn
    loss_fn = ClippedPGLossFn(master_config["loss_fn"])     # given to grpo_train(..., loss_fn, ...)

NeMo-RL hands over the counts of the whole step: the loss is Σ/global_valid_toks (token level) or Σ of sequence means /
global_valid_seqs, and its metrics are parts that it adds over micro-batches.
"""

from __future__ import annotations

import enum
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fastrl.adapters._batch import no_ids, part_of_mean
from fastrl.adapters._nemo_config import penalty_spec, policy_spec, read
from fastrl.adapters._versions import warn_outside
from fastrl.functional import policy_loss
from fastrl.rollouts import Rollouts


class _LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class _LossInputType(enum.Enum):
    LOGPROB = "logprob"


class _MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


def _theirs(name: str, own: Any) -> Any:
    """NeMo-RL's enum, which its trainer compares with; ours of the same values where it is not installed."""
    if importlib.util.find_spec("nemo_rl") is None:
        return own
    return getattr(importlib.import_module("nemo_rl.algorithms.loss.interfaces"), name)


class ClippedPGLossFn:
    """`nemo_rl.algorithms.loss.loss_functions.ClippedPGLossFn`, by the protocol `LossFunction`.

    A NaN generation log-prob drops its token's policy term, as in NeMo-RL; with "seq-mask-tis" its sequence.

    Raises:
        ValueError: a field of the config that is not honoured or not known, named.
    """

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False) -> None:
        warn_outside("nemo-rl", "0.6", "0.8", "written for")
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.fields = read(cfg)
        self.spec = policy_spec(self.fields)
        self.penalty = penalty_spec(self.fields)
        loss_type = _theirs("LossType", _LossType)
        self.loss_type = loss_type.TOKEN_LEVEL if self.fields["token_level_loss"] else loss_type.SEQUENCE_LEVEL
        self.input_type = _theirs("LossInputType", _LossInputType).LOGPROB
        by = _theirs("MetricNormalizer", _MetricNormalizer)
        gradient = by.TOKENS if self.fields["token_level_loss"] else by.SEQUENCES
        self.metric_normalizations = {
            **dict.fromkeys((*self._parts(), "token_mult_prob_error"), by.TOKENS),
            **dict.fromkeys(("loss", "kl_penalty"), gradient),
            **dict.fromkeys(("num_valid_samples", "probs_ratio_min", "probs_ratio_max"), by.NONE),
        }

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """(B, S − 1) log-probs of the next tokens; `data` with (B, S) tensors, of which the first column is dropped."""
        token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
        mask = (token_mask * sample_mask[:, None]) != 0
        keep = data.get("curr_logprobs_keep_mask")
        count = global_valid_toks if self.fields["token_level_loss"] else global_valid_seqs
        generated = data["generation_logprobs"][:, 1:]
        sampled = generated.nan_to_num(nan=torch.inf) if self.spec.rollout is not None else generated
        previous = None if self.fields["force_on_policy_ratio"] else data["prev_logprobs"][:, 1:]
        rollouts = Rollouts(
            no_ids(next_token_logprobs),
            mask if keep is None else mask & (keep != 0),
            data["advantages"][:, 1:],
            old_logps=previous,
            rollout_logps=sampled,
        )
        out = policy_loss(next_token_logprobs, rollouts, self.spec, normalizer=count)
        loss, penalty = out.loss, 0.0
        if (
            self.penalty is not None
        ):  # over all tokens, also those that a top-k or top-p filter took from the policy term
            whole = data.get("curr_logprobs_unfiltered", next_token_logprobs)
            reference = data["reference_policy_logprobs"][:, 1:]
            weights = (reference - generated).nan_to_num(nan=-torch.inf)  # read by the on-policy approximation alone
            pairs = Rollouts(no_ids(whole), mask, weights, old_logps=reference)
            kl = policy_loss(whole, pairs, self.penalty, normalizer=count).loss
            loss = loss + self.fields["reference_policy_kl_penalty"] * kl
            penalty = kl.item()
        apart = (generated - (next_token_logprobs.detach() if previous is None else previous)).abs()
        error = torch.where(mask if previous is not None else rollouts.mask, apart.exp(), 0.0).sum() / global_valid_toks
        metrics = {
            name: part_of_mean(out.metrics, own, global_valid_toks).item() for name, own in self._parts().items()
        }
        for name in ("min", "max"):
            metrics[f"probs_ratio_{name}"] = out.metrics[f"ratio_{name}"].item()
        named = {"loss": loss.item(), "kl_penalty": penalty, "num_valid_samples": sample_mask.sum().item()}
        return loss, {**metrics, **named, "token_mult_prob_error": error.item()}

    def _parts(self) -> dict[str, str]:
        """NeMo-RL's names of means over tokens, of which each micro-batch gives its part, and the library's."""
        parts = {"probs_ratio": "ratio_mean"}
        if not self.fields["sequence_level_importance_ratios"]:
            parts["sampling_importance_ratio"] = "rollout_weight_mean"
        if self.fields["truncated_importance_sampling_type"] == "icepop":
            parts["is_oob_ratio"] = "rollout_rejected_fraction"
        if self.spec.objective != "reinforce":
            parts["fastrl/clip_fraction"] = "clip_fraction"
        return parts
