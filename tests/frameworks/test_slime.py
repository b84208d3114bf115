"""slime's policy loss against a transcription, from the logits of whole sequences end to end, with its reducers."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import pytest
import torch
from frameworks.batches import assert_same, sequence_mean, value_and_gradient

from fastrl.adapters.slime import policy_loss_function, spec_from_args

TOTALS, RESPONSES = [5, 9, 4, 7], [3, 6, 0, 5]
PADDING = 3  # Megatron pads the packed row


def batch_of(seed=0, rows=slice(0, 4)):
    """slime's micro-batch: lists of 1-D response tensors, lengths on the host."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64)  # noqa: E731
    tokens = [torch.randint(13, (n,), generator=g) for n in TOTALS]
    logits = [2 * random(n, 13) for n in TOTALS]
    logps = [
        z.log_softmax(-1)[n - r - 1 : n - 1].gather(-1, t[n - r :, None]).squeeze(-1)
        for z, t, n, r in zip(logits, tokens, TOTALS, RESPONSES, strict=True)
    ]
    masks = [torch.ones(r) for r in RESPONSES]
    masks[1][2] = 0
    old = [x + 0.4 * random(len(x)) for x in logps]
    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": TOTALS,
        "response_lengths": RESPONSES,
        "loss_masks": masks,
        "advantages": [random(1) + 0.3 * random(r) for r in RESPONSES],
        "log_probs": old,
        "rollout_log_probs": [x + 0.2 * random(len(x)) for x in old],
        "ref_log_probs": [x + 0.4 * random(len(x)) for x in old],
        "rollout_mask_sums": [torch.tensor(8.0), torch.tensor(8.0), torch.tensor(2.0), 5],
    }
    batch = {name: value[rows] for name, value in batch.items()}
    return batch, torch.cat([*logits[rows], random(PADDING, 13)])[None]


def reducer(batch, per_token):
    sums = batch.get("rollout_mask_sums") or [m.sum().clamp(min=1) for m in batch["loss_masks"]]

    def reduce(x):
        parts = x.split(batch["response_lengths"])
        return sum(
            (v * m).sum() / (1.0 if per_token else max(float(d), 1.0))
            for v, m, d in zip(parts, batch["loss_masks"], sums, strict=True)
        )

    return reduce


def args_of(**flags):
    """The namespace of a whole training run, of which most flags are none of the loss's business."""
    defaults = {"hidden_size": 8, "clip_grad": 1.0, "loss_scale": None, "kl_coef": 0.0, "rollout_temperature": 1.0}
    return argparse.Namespace(**{**defaults, "tensor_model_parallel_size": 1, "context_parallel_size": 1, **flags})


def transcribed(logits, batch, **f):
    """slime's policy_loss_function at TP = CP = 1."""
    scaled = logits[0] / f.get("rollout_temperature", 1.0)
    logps, entropies, end = [], [], 0
    for tokens, total, response in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        end += total
        rows = scaled[end - response - 1 : end - 1].log_softmax(-1)
        logps.append(rows.gather(-1, tokens[total - response :, None]).squeeze(-1))
        entropies.append(-(rows.exp() * rows).sum(-1))
    x, entropy, adv = torch.cat(logps), torch.cat(entropies), torch.cat(batch["advantages"])
    name = "rollout_log_probs" if f.get("use_rollout_logprobs") else "log_probs"
    old = torch.cat(batch[name]) if batch.get(name) else x.detach()
    d = x - old
    if f.get("advantage_estimator") == "gspo":
        pairs = zip(d.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        d = torch.cat([sequence_mean(v[None], m[None].bool())[0].expand(len(v)) for v, m in pairs])
    low, high = f.get("eps_clip", 0.2), f.get("eps_clip_high") or f.get("eps_clip", 0.2)
    ratio = d.exp()
    if f.get("pg_loss_type") == "reinforce":
        loss = -adv * x
    elif f.get("advantage_estimator") == "cispo":
        loss = -ratio.clamp(1 - low, 1 + high).detach() * adv * x
    else:
        loss = torch.maximum(-ratio * adv, -ratio.clamp(1 - low, 1 + high) * adv)
        if f.get("eps_clip_c") is not None:
            loss = torch.where(adv < 0, torch.minimum(loss, -f["eps_clip_c"] * adv), loss)
    if f.get("use_opsm"):
        gaps = [
            sequence_mean(v[None], m[None].bool())[0].expand(len(v))
            for v, m in zip((old - x.detach()).split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        ]
        loss = loss * ~((adv < 0) & (torch.cat(gaps) > f["opsm_delta"]))
    if f.get("use_tis"):
        w = (old - torch.cat(batch["rollout_log_probs"])).exp()
        low, high = f.get("tis_clip_low", 0.0), f.get("tis_clip", 2.0)
        if f.get("custom_tis_function_path"):
            w = torch.where((w >= low) & (w <= high), w, 0.0)
        loss = loss * w.clamp(low, high) if not f.get("custom_tis_function_path") else loss * w
    reduce = reducer(batch, f.get("calculate_per_token_loss", False))
    total = reduce(loss) - f.get("entropy_coef", 0.0) * reduce(entropy)
    if f.get("use_kl_loss") and f.get("kl_loss_coef", 0.0):
        kl_d = x - torch.cat(batch["ref_log_probs"])
        kind = f.get("kl_loss_type", "k1")
        kl = {"k1": kl_d, "k2": kl_d**2 / 2}.get(kind, (-kl_d).exp() - 1 + kl_d)
        if f.get("use_unbiased_kl"):
            kl = (x - old).exp() * kl
        if kind == "low_var_kl":
            kl = kl.clamp(-10, 10)
        total = total + f["kl_loss_coef"] * reduce(kl)
    return total


KL = {"use_kl_loss": True, "kl_loss_coef": 0.3}
ICEPOP = "slime.backends.megatron_utils.loss.icepop_function"
CASES = {
    "ppo": {},
    "clip-higher": {"eps_clip": 0.1, "eps_clip_high": 0.5},
    "dual-clip": {"eps_clip_c": 1.3},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.02, "eps_clip_high": 0.04},
    "cispo": {"advantage_estimator": "cispo", "eps_clip": 1.0, "eps_clip_high": 0.3},
    "reinforce": {"pg_loss_type": "reinforce"},
    "rollout-log-probs": {"use_rollout_logprobs": True},
    "tis": {"use_tis": True, "tis_clip": 1.1, "tis_clip_low": 0.8},
    "icepop": {"use_tis": True, "tis_clip": 1.2, "tis_clip_low": 0.8, "custom_tis_function_path": ICEPOP},
    "opsm": {"use_opsm": True, "opsm_delta": 0.05},
    "entropy": {"entropy_coef": 0.1, "rollout_temperature": 0.8},
    "kl-k1": {**KL},
    "kl-k2": {**KL, "kl_loss_type": "k2"},
    "kl-k3": {**KL, "kl_loss_type": "k3"},
    "kl-low-var": {**KL, "kl_loss_type": "low_var_kl"},
    "kl-unbiased": {**KL, "kl_loss_type": "k3", "use_unbiased_kl": True},
    "kl-measured": {"use_kl_loss": True, "kl_loss_coef": 0.0},
    "gspo-kl-entropy": {"advantage_estimator": "gspo", **KL, "kl_loss_type": "k2", "entropy_coef": 0.05},
}


@pytest.mark.parametrize("denominators", ["per-token", "own", "of-the-rollout"])
@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient(name, denominators):
    flags = {**CASES[name], "calculate_per_token_loss": denominators == "per-token"}
    batch, logits = batch_of()
    if denominators == "own":
        batch.pop("rollout_mask_sums")
    reduce = reducer(batch, denominators == "per-token")
    assert_same(
        lambda z: policy_loss_function(args_of(**flags), batch, z, reduce)[0],
        lambda z: transcribed(z, batch, **flags),
        logits,
    )


def test_a_split_vocabulary_is_scored_by_slime(monkeypatch):
    """With tensor parallelism the logits that a rank holds are part of a row: slime's own function scores them."""
    batch, logits = batch_of()
    reduce = reducer(batch, False)
    flags = {"entropy_coef": 0.1, "rollout_temperature": 0.8}

    def get_log_probs_and_entropy(shard, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy):
        assert with_entropy and args.tensor_model_parallel_size == 2 and shard.shape[-1] == 7
        z, out, end = torch.cat([shard, logits[..., 7:]], -1)[0] / args.rollout_temperature, {}, 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
            end += total
            rows = z[end - response - 1 : end - 1].log_softmax(-1)
            out.setdefault("log_probs", []).append(rows.gather(-1, tokens[total - response :, None]).squeeze(-1))
            out.setdefault("entropy", []).append(-(rows.exp() * rows).sum(-1))
        return torch.empty(0), out

    module = ModuleType("loss")
    module.get_log_probs_and_entropy = get_log_probs_and_entropy
    monkeypatch.setitem(sys.modules, "slime.backends.megatron_utils.loss", module)
    args = args_of(**{**flags, "tensor_model_parallel_size": 2})
    assert_same(
        lambda z: policy_loss_function(args, batch, z, reduce)[0],
        lambda z: transcribed(torch.cat([z, logits[..., 7:]], -1), batch, **flags),
        logits[..., :7],
    )


def test_without_old_log_probs_the_ratio_is_one():
    batch, logits = batch_of()
    batch["log_probs"] = []
    reduce = reducer(batch, False)
    ours = lambda z: policy_loss_function(args_of(), batch, z, reduce)[0]  # noqa: E731
    assert_same(ours, lambda z: transcribed(z, batch), logits)
    assert value_and_gradient(ours, logits)[1].abs().max() > 0


def test_unequal_micro_batches_and_a_divided_rollout_add_up():
    """Samples 0 and 1 are parts of one rollout with 8 tokens that count: each is divided by 8, in any micro-batch."""
    flags = args_of(entropy_coef=0.1, **KL)
    whole, logits = batch_of()
    parts = [batch_of(rows=slice(0, 1)), batch_of(rows=slice(1, 4))]
    want, want_gradient = value_and_gradient(
        lambda z: policy_loss_function(flags, whole, z, reducer(whole, False))[0], logits
    )
    values, gradients = [], []
    for batch, z in parts:
        z = z.clone()
        value, gradient = value_and_gradient(
            lambda y, batch=batch: policy_loss_function(flags, batch, y, reducer(batch, False))[0], z
        )
        values.append(value)
        gradients.append(gradient[0, :-PADDING])
    torch.testing.assert_close(sum(values), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat(gradients), want_gradient[0, :-PADDING], rtol=1e-9, atol=1e-12)


def test_metrics_are_reduced_by_slimes_reducer():
    batch, logits = batch_of()
    reduce = reducer(batch, False)
    loss, metrics = policy_loss_function(args_of(), batch, logits, reduce)
    assert set(metrics) == {"loss", "entropy_loss", "ppo_kl"}
    torch.testing.assert_close(metrics["loss"], loss)
    x = []
    for i, (tokens, total, response) in enumerate(zip(batch["unconcat_tokens"], TOTALS, RESPONSES, strict=True)):
        end = sum(TOTALS[: i + 1])
        rows = logits[0, end - response - 1 : end - 1].log_softmax(-1)
        x.append(rows.gather(-1, tokens[total - response :, None]).squeeze(-1))
    torch.testing.assert_close(metrics["ppo_kl"], reduce(torch.cat(batch["log_probs"]) - torch.cat(x)))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"context_parallel_size": 2}, "context_parallel_size"),
        ({"custom_pg_loss_reducer_function_path": "a.b"}, "custom_pg_loss_reducer_function_path"),
        ({"use_tis": True, "custom_tis_function_path": "mine.weights"}, "custom_tis_function_path"),
        ({"use_tis": True, "use_rollout_logprobs": True}, "use_rollout_logprobs"),
        ({"use_tis": True, "use_opsm": True, "opsm_delta": 0.1}, "use_opsm"),
        ({"use_score_centering": True}, "use_score_centering"),
        ({"rollout_top_p": 0.9}, "rollout_top_p"),
        ({"get_mismatch_metrics": True}, "get_mismatch_metrics"),
        ({**KL, "kl_loss_type": "kl"}, "kl_loss_type"),
        ({**KL, "kl_loss_type": "low_var_kl", "use_unbiased_kl": True}, "kl_loss_type"),
        ({**KL, "use_unbiased_kl": True, "advantage_estimator": "gspo"}, "use_unbiased_kl"),
        ({"pg_loss_type": "sapo"}, "pg_loss_type"),
        ({"eps_clip_soft": 0.1}, "eps_clip_soft"),
        ({"kl_loss_schedule": "cosine"}, "kl_loss_schedule"),
        ({"use_fancy_loss": True}, "use_fancy_loss"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        ({"use_sapo": True}, "use_sapo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(flags, named):
    batch, logits = batch_of()
    with pytest.raises(ValueError, match=f"^{named}: "):
        policy_loss_function(args_of(**flags), batch, logits, reducer(batch, False))


OTHERS = {  # slime's, Megatron's and SGLang's own, some with a word of the loss in their names
    "loss_type": "custom_loss", "loss_mask_type": "qwen", "recompute_loss_function": True, "value_clip": 0.2,
    "opd_kl_coef": 1.0, "opd_type": "sglang", "use_rollout_entropy": True, "ci_disable_kl_checker": False,
    "score_centering_top_k": 128, "normalize_advantages": True, "grpo_std_normalization": True,
    "min_batch_collection_ratio": 1, "initial_loss_scale": 2**32, "min_loss_scale": 1.0, "loss_scale_window": 1000,
    "check_for_nan_in_loss_and_grad": True, "check_for_spiky_loss": False, "eod_mask_loss": False,
    "moe_aux_loss_coeff": 0.001, "moe_z_loss_coeff": None,
    "mtp_loss_scaling_factor": 0.2, "cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te",
    "grpo_kl_beta": 0.001, "grpo_entropy_term_weight": 0.0, "mask_prob": 0.15, "qk_clip_threshold": 100.0,
    "sglang_clip_max_new_tokens_estimation": 4096, "lr": 1e-6,
}  # fmt: skip


def test_other_flags_are_not_the_losss_business():
    assert spec_from_args(args_of(**OTHERS))[0] == spec_from_args(args_of())[0]
