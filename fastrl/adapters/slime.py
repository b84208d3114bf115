"""slime (main, August 2026): its policy loss as a custom loss, from the logits.

    --loss-type custom_loss --custom-loss-function-path fastrl.adapters.slime.policy_loss_function

slime divides afterwards: the loss is Σ over samples of (Σ over tokens / the sample's denominator), with
`--calculate-per-token-loss` Σ over tokens. The denominator is the mask sum of the whole rollout that a sample is part
of (`rollout_mask_sums`). All flags that shape slime's policy_loss are read, or refused by name.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from fastrl.adapters._batch import no_ids, offsets
from fastrl.adapters._config import Options
from fastrl.adapters._versions import warn_outside
from fastrl.adapters._words import LOSS_WORDS, named_with
from fastrl.functional import logprobs_from_logits, policy_loss
from fastrl.rollout_correction import RolloutCorrection
from fastrl.rollouts import Rollouts
from fastrl.spec import Aggregation, LossSpec

_ARGS = Options(
    framework="slime",
    honoured={
        "eps_clip": 0.2, "eps_clip_high": None, "eps_clip_c": None, "advantage_estimator": "grpo", "pg_loss_type": None,
        "use_kl_loss": False, "kl_loss_coef": 0.0, "kl_loss_type": "k1", "use_unbiased_kl": False, "entropy_coef": 0.0,
        "use_rollout_logprobs": False, "use_tis": False, "tis_clip": 2.0, "tis_clip_low": 0.0,
        "custom_tis_function_path": None, "use_opsm": False, "opsm_delta": 1e-4, "calculate_per_token_loss": False,
        "rollout_temperature": 1.0, "tensor_model_parallel_size": 1,
    },
    elsewhere={  # advantages, critic, masks, checks and Megatron's loss scaling
        "kl_coef", "opd_kl_coef", "value_clip", "loss_type", "loss_mask_type", "custom_loss_function_path", "clip_grad",
        "recompute_loss_function", "use_rollout_entropy", "score_centering_top_k", "ci_disable_kl_checker",
        "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "log_loss_scale_to_tensorboard",
        "eod_mask_loss",
    },
    refused={
        "custom_pg_loss_reducer_function_path": (None, "leave it None"),
        "get_mismatch_metrics": (False, "leave it off: fastrl reports its own"),
        "use_score_centering": (False, "leave it off"),
        "rollout_top_p": (1.0, "sample with top-p 1"),
        "context_parallel_size": (1, "train without context parallelism"),
        "allgather_cp": (False, "leave it off"),
    },
    own_loss="use --loss-type policy_loss",
    # of several hundred flags, those with such a word can shape a policy loss; the prefixes are Megatron's and SGLang's
    scope=named_with(
        LOSS_WORDS,
        but=("check_for_", "cross_entropy_", "dsa_", "grpo_", "moe_", "mtp_", "qk_clip", "rl_", "sglang_"),
    ),
)  # fmt: skip


def spec_from_args(args: Any) -> tuple[LossSpec, dict[str, Any]]:
    """The `LossSpec` of slime's flags, and the flags; ValueError names what is not honoured."""
    warn_outside("slime", "0.3", "0.5", "written for")
    f = _ARGS.read(args)
    by_sequence = f["advantage_estimator"] == "gspo"
    kinds = {None: None, "ppo": "ppo_clip", "reinforce": "reinforce"}
    objective = _ARGS.choose("pg_loss_type", f["pg_loss_type"], kinds)
    objective = objective or ("cispo" if f["advantage_estimator"] == "cispo" else "ppo_clip")
    high = f["eps_clip"] if f["eps_clip_high"] is None else f["eps_clip_high"]
    clip = {"epsilon_low": f["eps_clip"], "epsilon_high": high}
    changes: dict[str, Any] = {
        "ppo_clip": {**clip, "dual_clip": f["eps_clip_c"], "ratio_level": "sequence" if by_sequence else "token"},
        "cispo": clip,
        "reinforce": {},
    }
    per_token = f["calculate_per_token_loss"]
    spec = LossSpec(
        objective=objective,
        aggregation=Aggregation.TOKEN_SUM if per_token else Aggregation.SEQ_MEAN_TOKEN_MEAN,
        entropy_coef=f["entropy_coef"],
        off_policy_threshold=f["opsm_delta"] if f["use_opsm"] else None,
        rollout=_correction(f),
        log_ratio_clamp=None,
        **_penalty(f, by_sequence),
        **changes[objective],
    )
    return spec, f


def _penalty(f: dict[str, Any], by_sequence: bool) -> dict[str, Any]:
    if not f["use_kl_loss"] or not f["kl_loss_coef"]:
        return {}
    estimators = {"k1": ("k1", None), "k2": ("k2", None), "k3": ("k3", None), "low_var_kl": ("k3", 10.0)}
    estimator, clamp = _ARGS.choose("kl_loss_type", f["kl_loss_type"], estimators)
    weighted = f["use_unbiased_kl"]
    if weighted and by_sequence:
        _ARGS.refuse("use_unbiased_kl", True, "leave it off with advantage_estimator 'gspo'")
    if weighted and clamp is not None:
        _ARGS.refuse("kl_loss_type", "low_var_kl", "use 'k3' with use_unbiased_kl")
    gradient = "importance_weighted" if weighted else "plain"
    return {"kl_coef": f["kl_loss_coef"], "kl_estimator": estimator, "kl_clamp": clamp, "kl_gradient": gradient}


def _correction(f: dict[str, Any]) -> RolloutCorrection | None:
    if not f["use_tis"]:
        return None
    for name in ("use_rollout_logprobs", "use_opsm"):
        if f[name]:
            _ARGS.refuse(name, True, "leave it off with use_tis")
    path = f["custom_tis_function_path"]
    modes = {None: "truncate", "vanilla_tis_function": "truncate", "icepop_function": "mask"}
    mode = _ARGS.choose("custom_tis_function_path", path and str(path).rsplit(".", 1)[-1], modes)
    return RolloutCorrection(mode=mode, lower=f["tis_clip_low"], upper=f["tis_clip"])


def policy_loss_function(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: logits (1, T, V) of whole sequences end to end -> (loss, metrics).

    With a vocabulary split over tensor-parallel ranks the log-probs and entropies are slime's own.

    Metrics, reduced by `sum_of_sample_mean` as slime's are: loss, entropy_loss, ppo_kl.

    Raises:
        ValueError: a flag that is not honoured or not known, named.
    """
    spec, f = spec_from_args(args)
    logps, entropy = _scores(args, f, batch, logits)

    def joined(name: str) -> Tensor | None:
        return torch.cat(list(batch[name])) if batch.get(name) else None

    old = joined("rollout_log_probs" if f["use_rollout_logprobs"] else "log_probs")
    rollouts = Rollouts(
        no_ids(logps),
        joined("loss_masks"),
        torch.cat(list(batch["advantages"])),
        old_logps=old,
        ref_logps=joined("ref_log_probs") if f["use_kl_loss"] else None,
        rollout_logps=joined("rollout_log_probs") if spec.rollout is not None else None,
        cu_seqlens=offsets(batch["response_lengths"], logits.device),
    )
    sums = None if f["calculate_per_token_loss"] else batch.get("rollout_mask_sums")
    loss = _summed(logps, entropy, rollouts, spec, sums)
    with torch.no_grad():
        apart = torch.zeros_like(logps) if old is None else old - logps
        metrics = {"entropy_loss": sum_of_sample_mean(entropy), "ppo_kl": sum_of_sample_mean(apart)}
    return loss, {"loss": loss.detach(), **metrics}


def _scores(args: Any, f: dict[str, Any], batch: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) log-probs and entropies of all response tokens, end to end."""
    lengths, totals, tokens = (list(batch[name]) for name in ("response_lengths", "total_lengths", "unconcat_tokens"))
    if f["tensor_model_parallel_size"] > 1:
        theirs = importlib.import_module("slime.backends.megatron_utils.loss").get_log_probs_and_entropy
        sizes = {"unconcat_tokens": tokens, "total_lengths": totals, "response_lengths": lengths}
        _, scores = theirs(logits, args=args, **sizes, with_entropy=True)
        return torch.cat(scores["log_probs"]), torch.cat(scores["entropy"])
    ends = zip(itertools.accumulate(totals), lengths, strict=True)
    rows = torch.cat([torch.arange(end - n - 1, end - 1, device=logits.device) for end, n in ends])
    answers = torch.cat([t[len(t) - n :] for t, n in zip(tokens, lengths, strict=True)]).long()
    ids = answers.new_zeros(logits.shape[1]).index_copy(0, rows, answers)
    mask = torch.zeros_like(ids, dtype=torch.bool).index_fill(0, rows, True)
    every = logprobs_from_logits(logits[0], ids, temperature=f["rollout_temperature"], mask=mask)
    return every.logps[rows], every.entropy[rows]


def _summed(logps: Tensor, entropy: Tensor, rollouts: Rollouts, spec: LossSpec, sums: Any) -> Tensor:
    """Σ over samples: in one call, or sample by sample where each has a denominator of its own."""
    if sums is None:
        whole = None if spec.aggregation == Aggregation.TOKEN_SUM else 1.0
        return policy_loss(logps, rollouts, spec, entropy=entropy, normalizer=whole).loss
    spec = spec.replace(aggregation=Aggregation.TOKEN_MEAN)
    loss = logps.new_zeros(())
    for part, tokens in zip(rollouts.split(rollouts.num_sequences), sums, strict=True):
        rows = part.token_slice
        count = tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(float(tokens), 1.0)
        loss = loss + policy_loss(logps[rows], part, spec, entropy=entropy[rows], normalizer=count).loss
    return loss
