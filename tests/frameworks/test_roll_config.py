"""Which fields of ROLL's configs are refused, and which are left to ROLL."""

from __future__ import annotations

import pytest
from frameworks.test_roll import correct

from fastrl.adapters._roll_config import spec_from_config


@pytest.mark.parametrize(
    ("pipeline", "worker", "named"),
    [
        ({"ratio_type": "segment"}, {}, "ratio_type"),
        ({"rl_loss_coef": 0.5}, {}, "rl_loss_coef"),
        ({"postive_loss_coef": 0.1}, {}, "postive_loss_coef"),
        ({"use_topr_neg_loss_coef": 0.1}, {}, "use_topr_neg_loss_coef"),
        ({"difficulty_loss_weight": True}, {}, "difficulty_loss_weight"),
        ({"pg_soft_clip": 0.1}, {}, "pg_soft_clip"),
        ({"prompt_kl_loss_coef": 0.1}, {}, "prompt_kl_loss_coef"),
        ({"use_sapo": True}, {}, "use_sapo"),
        ({"entropy_mask_quantile": 0.2}, {}, "entropy_mask_quantile"),
        ({"train_infer_ratio_mask": True}, {}, "train_infer_ratio_mask"),
        ({"loss_agg_mode": "prompt-mean"}, {}, "loss_agg_mode"),
        ({"importance_sampling": "segment"}, {}, "importance_sampling"),
        ({}, {"pg_variant": "topr"}, "pg_variant"),
        ({}, {"cispo_use_unified_mask": True}, "cispo_use_unified_mask"),
        ({}, {"tis_sequence": True}, "tis_sequence"),
        ({}, {"use_gspo_loss": True}, "use_gspo_loss"),
        (correct({"weight_type": "segment"}), {}, "is_weight.weight_type"),
        (correct(None, {"agg_type": "segment"}), {}, "filters.agg_type"),
        (correct(None, {}, {}), {}, "filters"),
        (correct(None, {"ratio_enabled": False, "diff_enabled": True, "diff_low": -0.1}), {}, "filters.diff_low"),
        (correct(None, {"veto": 1}), {}, "veto"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(pipeline, worker, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        spec_from_config(pipeline, worker)


ROLLS_OWN = {  # fields of RLVRConfig and of its bases that are none of the loss's business, or act around it
    "rollout_batch_size": 128, "sequence_length": 2048, "ppo_epochs": 1, "max_grad_norm": 1.0, "lambd": 0.95,
    "gamma": 1, "value_clip": None, "kl_penalty": "kl", "target_kl": None, "init_kl_coef": 0.2, "kl_horizon": 10000,
    "use_reward_scaling": False, "reward_clip": 10.0, "whiten_advantages": True, "advantage_clip": 2.0,
    "adv_estimator": "reinforce", "norm_mean_type": "group", "norm_std_type": None, "add_token_level_kl": False,
    "critic_warmup": 0, "enable_reference": True, "force_disable_old_logprobs_recompute": False,
    "async_generation_ratio": 1, "difficulty_low_threshold": 0.1, "error_max_len_clip": False, "max_len_mask": True,
    "error_max_len_threshold": 9999, "mask_type": "loss", "difficulty_mask": False, "minibatch_data_iter_num": 1,
    "length_loss_weight": False, "val_greedy": False, "use_opd": True, "opd_kl_coef": 1.0, "rollout_mock": None,
}  # fmt: skip


def test_the_rest_of_rolls_config_is_rolls():
    """Also those of its fields with a word of the loss in their names."""
    worker = {"apply_loss_scale": True, "topr_positive_weight": 1.0, "infer_batch_size": 16, "logits_in_fp32": True}
    assert spec_from_config(ROLLS_OWN, worker) == spec_from_config({}, {})
