"""NeMo-RL's clipped policy gradient loss against a transcription, on its (B, S) batches and its global counts."""

from __future__ import annotations

import pytest
import torch
from frameworks.batches import assert_same, scored

from fastrl.adapters.nemo_rl import ClippedPGLossFn

RTOL = 1e-7  # NeMo-RL adds 1e-8 to every count
OFF = {"reference_policy_kl_penalty": 0.0}


def data_of(b, sample_mask=(1, 1, 1, 0)):
    """Whole sequences: (B, S) with the first column, which predicts nothing, filled with NaN."""
    full = lambda x: torch.cat([torch.full((len(x), 1), torch.nan, dtype=x.dtype), x], 1)  # noqa: E731
    return {
        "input_ids": torch.zeros(len(b.mask), 8, dtype=torch.long),
        "token_mask": torch.cat([torch.zeros(len(b.mask), 1), b.mask.float()], 1).double(),
        "sample_mask": torch.tensor(sample_mask[: len(b.mask)], dtype=torch.float64),
        "advantages": full(b.advantages),
        "prev_logprobs": full(b.old),
        "generation_logprobs": full(b.rollout),
        "reference_policy_logprobs": full(b.ref),
    }


def masked_mean(values, mask, count=None, dim=None):
    count = mask.sum(dim) if count is None else count
    return torch.where(mask > 0, values, 0.0).sum(dim) / (count + 1e-8)


def weights_of(f, prev, gen, token_mask):
    low, high = f.get("truncated_importance_sampling_ratio_min"), f.get("truncated_importance_sampling_ratio")
    d = torch.where(token_mask > 0, prev - gen, 0.0)
    w = d.sum(-1, keepdim=True).expand(d.shape).exp() if f.get("sequence_level_importance_ratios") else d.exp()
    kind = f.get("truncated_importance_sampling_type")
    if kind == "tis":
        w = w.clamp(low or 0.0, high)
    elif kind == "icepop":
        w = torch.where((w >= low) & (w <= high), w, 0.0)
    elif kind == "seq-mask-tis":
        mean = (d.sum(-1) / token_mask.sum(-1).clamp(min=1)).exp()
        w = w * ((mean >= low) & (mean <= high))[:, None]
    return w


def transcribed(f, x, data, sequences, tokens):
    """ClippedPGLossFn: actor term, KL term with its importance weights, global denominators."""
    token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
    full_mask = token_mask
    if "curr_logprobs_keep_mask" in data:
        token_mask = token_mask * data["curr_logprobs_keep_mask"]
    a, gen = data["advantages"][:, 1:], data["generation_logprobs"][:, 1:]
    prev = x.detach() if f.get("force_on_policy_ratio") else data["prev_logprobs"][:, 1:]
    d = torch.where(token_mask > 0, x - prev, 0.0)
    if f.get("force_on_policy_ratio"):
        ratio = clamped = d.exp()
    elif f.get("disable_ppo_ratio"):
        ratio = clamped = x
    else:
        if f.get("sequence_level_importance_ratios"):
            d = (d.sum(-1, keepdim=True) / (token_mask.sum(-1, keepdim=True) + 1e-8)).expand(d.shape)
        ratio = d.exp()
        clamped = ratio.clamp(1 - f.get("ratio_clip_min", 0.2), 1 + f.get("ratio_clip_max", 0.2))
    loss = -a * clamped.detach() * x if f.get("use_cispo") else torch.maximum(-a * ratio, -a * clamped)
    if f.get("ratio_clip_c") is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -a * f["ratio_clip_c"]), loss)
    if f.get("use_importance_sampling_correction"):
        loss = weights_of(f, prev, gen, token_mask).detach() * loss

    def reduce(values, tokens_that_count):
        if f.get("token_level_loss", True):
            return masked_mean(values, tokens_that_count * sample_mask[:, None], tokens)
        return masked_mean(masked_mean(values, tokens_that_count, dim=-1), sample_mask, sequences)

    total = reduce(loss, token_mask)
    coef = f.get("reference_policy_kl_penalty", 0.01)
    if coef and not f.get("use_kl_in_reward"):
        whole = data.get("curr_logprobs_unfiltered", x)
        total = total + coef * reduce(kl_of(f, whole, data["reference_policy_logprobs"][:, 1:], gen), full_mask)
    return total


def kl_of(f, x, ref, gen):
    log_ratio = ref - x
    behaviour = gen if f.get("use_on_policy_kl_approximation") else x.detach()
    weight = (x - behaviour).exp().nan_to_num(nan=0.0, posinf=0.0)
    bound = f.get("kl_input_clamp_value", 20.0)
    if bound is not None:
        held = log_ratio.clamp(-bound, bound)
        weight = torch.where(held == log_ratio, weight, weight.detach())
        log_ratio = held
    kind = f.get("reference_policy_kl_type", "k3")
    kl = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[kind]
    bound = f.get("kl_output_clamp_value", 10.0)
    return weight * kl if bound is None else (weight * kl).clamp(-bound, bound)


IS = {"use_importance_sampling_correction": True}
GSPO = {
    "sequence_level_importance_ratios": True,
    "token_level_loss": False,
    "ratio_clip_min": 0.02,
    "ratio_clip_max": 0.05,
}


def tis(kind, low, high):
    return {
        **IS,
        "truncated_importance_sampling_type": kind,
        "truncated_importance_sampling_ratio": high,
        "truncated_importance_sampling_ratio_min": low,
    }


APPROXIMATION = {"reference_policy_kl_penalty": 0.5, "use_on_policy_kl_approximation": True}
CASES = {
    "default": {},
    "clip-higher": {**OFF, "ratio_clip_max": 0.5},
    "dual-clip": {**OFF, "ratio_clip_c": 1.4},
    "sequence-mean": {**OFF, "token_level_loss": False},
    "gspo": {**OFF, **GSPO},
    "gspo-is": {**OFF, **GSPO, **IS},
    "gspo-tis": {**OFF, **GSPO, **tis("tis", None, 1.02)},
    "gspo-icepop": {**OFF, **GSPO, **tis("icepop", 0.3, 1.02)},
    "cispo": {**OFF, "use_cispo": True, "ratio_clip_min": 0.3},
    "reinforce": {**OFF, "disable_ppo_ratio": True},
    "reinforce-is": {**OFF, "disable_ppo_ratio": True, **IS},
    "on-policy": {**OFF, "force_on_policy_ratio": True, "ratio_clip_c": 3.0},
    "on-policy-is": {**OFF, "force_on_policy_ratio": True, **IS},
    "is": {**OFF, **IS},
    "tis": {**OFF, **tis("tis", 0.8, 1.1)},
    "tis-upper": {**OFF, **tis("tis", None, 1.1)},
    "icepop": {**OFF, **tis("icepop", 0.8, 1.1)},
    "seq-mask-tis": {**OFF, **tis("seq-mask-tis", 0.95, 1.1)},
    "kl-k1": {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": "k1"},
    "kl-k2": {"reference_policy_kl_penalty": 0.5, "reference_policy_kl_type": "k2"},
    "kl-k3": {"reference_policy_kl_penalty": 0.5},
    "kl-bounds": {"reference_policy_kl_penalty": 0.5, "kl_input_clamp_value": 0.8, "kl_output_clamp_value": 0.1},
    "kl-unbounded": {
        "reference_policy_kl_penalty": 0.5, "kl_input_clamp_value": None, "kl_output_clamp_value": None
    },
    "kl-on-policy-k1": {**APPROXIMATION, "reference_policy_kl_type": "k1"},
    "kl-on-policy-k2": {**APPROXIMATION, "reference_policy_kl_type": "k2"},
    "kl-on-policy-bounds": {**APPROXIMATION, "kl_output_clamp_value": 0.1},
    "kl-sequence": {"reference_policy_kl_penalty": 0.5, **GSPO, **IS},
    "kl-in-reward": {"reference_policy_kl_penalty": 0.5, "use_kl_in_reward": True},
}  # fmt: skip


def call(f, x, data, sequences=5, tokens=29):
    return ClippedPGLossFn(f)(
        next_token_logprobs=x,
        data=data,
        global_valid_seqs=torch.tensor(sequences),
        global_valid_toks=torch.tensor(tokens),
    )


@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient(name):
    f, b = CASES[name], scored(seed=1)
    data = data_of(b)
    assert_same(lambda x: call(f, x, data)[0], lambda x: transcribed(f, x, data, 5, 29), b.logps, rtol=RTOL)


@pytest.mark.parametrize("name", ["default", "clip-higher", "kl-sequence", "gspo-tis", "icepop"])
def test_unequal_micro_batches_add_up(name):
    """Loss, gradient and metrics of two micro-batches, with the counts of both, are those of one call."""
    f, b = CASES[name], scored(seed=1)
    whole = data_of(b)
    mask = whole["token_mask"][:, 1:] * whole["sample_mask"][:, None]
    counts = (int((whole["sample_mask"] > 0).sum()), int(mask.sum()))

    def part(rows):
        return {key: value[rows] for key, value in whole.items()}

    def split(x):
        return call(f, x[:1], part(slice(0, 1)), *counts)[0] + call(f, x[1:], part(slice(1, 4)), *counts)[0]

    assert_same(split, lambda x: transcribed(f, x, whole, *counts), b.logps, rtol=RTOL)
    together = call(f, b.logps, whole, *counts)[1]
    apart = [call(f, b.logps[s], part(s), *counts)[1] for s in (slice(0, 1), slice(1, 4))]
    for key, value in together.items():
        pick = min if key.endswith("_min") else max if key.endswith("_max") else sum
        assert pick(m[key] for m in apart) == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_metrics():
    b = scored(seed=1)
    data = data_of(b)
    f = {**tis("icepop", 0.8, 1.1), "reference_policy_kl_penalty": 0.5}
    loss, metrics = call(f, b.logps, data)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    ratio, weight = (b.logps - b.old).exp(), (b.old - b.rollout).exp()
    inside = (weight >= 0.8) & (weight <= 1.1)
    expected = {
        "loss": float(loss),
        "probs_ratio": masked_mean(ratio, mask, 29),
        "probs_ratio_min": ratio[mask > 0].min(),
        "probs_ratio_max": ratio[mask > 0].max(),
        "kl_penalty": masked_mean(kl_of(f, b.logps, b.ref, b.rollout), mask, 29),
        "token_mult_prob_error": masked_mean((b.rollout - b.old).abs().exp(), mask, 29),
        "sampling_importance_ratio": masked_mean(weight * inside, mask, 29),
        "is_oob_ratio": masked_mean((~inside).double(), mask, 29),
        "num_valid_samples": 3,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    fn = ClippedPGLossFn(f)
    assert set(fn.metric_normalizations) == set(metrics)
    assert fn.loss_type.value == "token_level" and fn.input_type.value == "logprob"
    assert ClippedPGLossFn({**OFF, **GSPO}).loss_type.value == "sequence_level"


def test_filtered_tokens_leave_the_policy_term_only():
    """Top-k and top-p filters: a keep mask for the policy term, unfiltered log-probs and all tokens for the KL."""
    f, b = CASES["kl-sequence"], scored(seed=1)
    data = data_of(b)
    keep = torch.ones_like(b.logps)
    keep[0, 1] = keep[1, 2] = 0
    data |= {"curr_logprobs_keep_mask": keep, "curr_logprobs_unfiltered": b.logps - 0.1}

    def same(x):
        return {**data, "curr_logprobs_unfiltered": x - 0.1}

    assert_same(lambda x: call(f, x, same(x))[0], lambda x: transcribed(f, x, same(x), 5, 29), b.logps, rtol=RTOL)


@pytest.mark.parametrize("f", [{**OFF, **IS}, {**IS, **APPROXIMATION}], ids=["weights", "kl"])
def test_a_token_without_a_generation_log_prob_is_dropped(f):
    b = scored(seed=1)
    data = data_of(b)
    data["generation_logprobs"][0, 1] = torch.nan
    seen = {
        **data,
        "token_mask": data["token_mask"].clone(),
        "generation_logprobs": data["generation_logprobs"].clone(),
    }
    seen["token_mask"][0, 1] = seen["generation_logprobs"][0, 1] = 0
    assert b.mask[0, 0]
    assert_same(lambda x: call(f, x, data)[0], lambda x: transcribed(f, x, seen, 5, 29), b.logps, rtol=RTOL)


@pytest.mark.parametrize(
    ("f", "named"),
    [
        ({"positive_example_nll_weight": 0.1}, "positive_example_nll_weight"),
        ({"kl_schedule": "cosine"}, "kl_schedule"),
        ({"reference_policy_kl_type": "abs"}, "reference_policy_kl_type"),
        ({"sequence_level_importance_ratios": True}, "sequence_level_importance_ratios"),
        ({"use_cispo": True, "ratio_clip_c": 3.0}, "ratio_clip_c"),
        ({"use_cispo": True, "disable_ppo_ratio": True}, "disable_ppo_ratio"),
        ({"use_cispo": True, "token_level_loss": False}, "token_level_loss"),
        ({"disable_ppo_ratio": True, "ratio_clip_c": 3.0}, "ratio_clip_c"),
        ({"truncated_importance_sampling_type": "tis"}, "truncated_importance_sampling_type"),
        (tis("tis", None, None), "truncated_importance_sampling_ratio"),
        (tis("icepop", None, 2.0), "truncated_importance_sampling_ratio_min"),
        (tis("veto", None, 2.0), "truncated_importance_sampling_type"),
        (tis(None, None, 2.0), "truncated_importance_sampling_ratio"),
        ({**GSPO, **tis("seq-mask-tis", 0.9, 1.1)}, "truncated_importance_sampling_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(f, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        ClippedPGLossFn(f)
