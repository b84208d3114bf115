"""SkyRL's policy losses against transcriptions of their formulas, on (B, T) batches with pre-scaled advantages."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from frameworks.batches import assert_same, cispo, masked_sum, ppo, scored, sequence_mean

from fastrl.adapters import skyrl


def config(correction=None, **fields):
    """SkyRL's AlgorithmConfig, as far as the losses see it."""
    return SimpleNamespace(policy_loss_type="fastrl", kl_loss_coef=0.1, off_policy_correction=correction, **fields)


def ours(b, loss_type, cfg):
    return lambda x: skyrl.policy_loss_fn(x, b.old, b.advantages, cfg, b.mask.double(), b.rollout, loss_type=loss_type)[
        0
    ]


def ratio(x, other):
    return (x - other).clamp(-20, 20).exp()


def gspo(x, b, low, high):
    s = x - x.detach() + sequence_mean(x - b.old, b.mask).detach()
    s = s.clamp(max=10)
    return ppo(s, torch.zeros_like(s), b.advantages, low, high)


def sapo(x, b, positive, negative):
    tau = torch.where(b.advantages > 0, positive, torch.full_like(x, negative))
    return -b.advantages * 4 / tau * torch.sigmoid(tau * (ratio(x, b.old) - 1))


def rollout_is(x, b, low, high):
    r = ratio(x, b.rollout).detach()
    return -torch.where((r > 1 - low) & (r < 1 + high), r, 0.0) * b.advantages * x


LOSSES = {
    "regular": ("regular", {}, lambda x, b: ppo(x, b.old, b.advantages, 0.2, 0.2)),
    "clip-higher": (
        "regular",
        {"eps_clip_low": 0.1, "eps_clip_high": 0.6},
        lambda x, b: ppo(x, b.old, b.advantages, 0.1, 0.6),
    ),
    "dual_clip": ("dual_clip", {"clip_ratio_c": 1.3}, lambda x, b: ppo(x, b.old, b.advantages, 0.2, 0.2, 1.3)),
    "dual_clip-default": ("dual_clip", {}, lambda x, b: ppo(x, b.old, b.advantages, 0.2, 0.2, 3.0)),
    "gspo": ("gspo", {"eps_clip_low": 0.02, "eps_clip_high": 0.03}, lambda x, b: gspo(x, b, 0.02, 0.03)),
    "cispo": (
        "cispo",
        {"cispo": {"cispo_eps_clip_low": 0.3, "cispo_eps_clip_high": 0.4}},
        lambda x, b: cispo(x, b.old, b.advantages, 0.3, 0.4),
    ),
    "cispo-default": ("cispo", {}, lambda x, b: cispo(x, b.old, b.advantages, 1.0, 4.0)),
    "sapo": ("sapo", {"sapo": {"tau_pos": 1.5, "tau_neg": 2.0}}, lambda x, b: sapo(x, b, 1.5, 2.0)),
    "importance_sampling": ("importance_sampling", {}, lambda x, b: -(x - b.old).exp() * b.advantages),
}
AGAINST_ROLLOUT = {
    "cispo-rollout": (
        "cispo",
        {"cispo": {"cispo_anchor": "rollout", "cispo_eps_clip_high": 0.2}},
        lambda x, b: cispo(x, b.rollout, b.advantages, 1.0, 0.2),
    ),
    "rollout_is": ("rollout_is", {"eps_clip_low": 0.3}, lambda x, b: rollout_is(x, b, 0.3, 0.2)),
}


@pytest.mark.parametrize("name", [*LOSSES, *AGAINST_ROLLOUT])
def test_same_loss_and_gradient(name):
    loss_type, fields, formula = (LOSSES | AGAINST_ROLLOUT)[name]
    b = scored()
    assert_same(ours(b, loss_type, config(**fields)), lambda x: masked_sum(formula(x, b), b.mask), b.logps)


def token_weight(b):
    return ratio(b.old, b.rollout)


def geometric(b):
    return sequence_mean(b.old - b.rollout, b.mask).exp()


def product(b):
    return (sequence_mean(b.old - b.rollout, b.mask) * b.mask.sum(-1, keepdim=True)).exp()


CORRECTIONS = {
    "token": ({"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.1}, lambda b: token_weight(b).clamp(max=1.1)),
    "sequence": (
        {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.2},
        lambda b: product(b).clamp(max=1.2),
    ),
    "token-mask": (
        {"token_mask_is_threshold_low": 0.9, "token_mask_is_threshold_high": 1.2},
        lambda b: ((token_weight(b) >= 0.9) & (token_weight(b) <= 1.2)).double(),
    ),
    "token+mask": (
        {"tis_ratio_type": "token", "token_mask_is_threshold_low": 0.8, "token_mask_is_threshold_high": 3.0},
        lambda b: token_weight(b).clamp(max=2.0) * ((token_weight(b) >= 0.8) & (token_weight(b) <= 3)),
    ),
    "geometric": (
        {"sequence_mask_metric": "geometric", "geo_mask_low": 0.98, "geo_mask_high": 1.2},
        lambda b: ((geometric(b) >= 0.98) & (geometric(b) <= 1.2)).double(),
    ),
    "product+token": (
        {"tis_ratio_type": "token", "sequence_mask_metric": "product", "product_mask_low": 0.6},
        lambda b: token_weight(b).clamp(max=2.0) * ((product(b) >= 0.6) & (product(b) <= 2.0)),
    ),
    "outlier": (
        {"outlier_token_is_threshold_low": 0.75},
        lambda b: (torch.where(b.mask, token_weight(b), 9.0).amin(-1, keepdim=True) >= 0.75).double(),
    ),
}


@pytest.mark.parametrize("name", ["clip-higher", "gspo", "cispo", "sapo", "dual_clip"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_off_policy_correction(correction, name):
    loss_type, fields, formula = LOSSES[name]
    settings, weight = CORRECTIONS[correction]
    b = scored(seed=1)
    kept = weight(b).expand(b.mask.shape)[b.mask]
    assert kept.max() > 0 and not bool((kept == 1).all())
    theirs = lambda x: masked_sum(weight(b) * formula(x, b), b.mask)  # noqa: E731
    assert_same(ours(b, loss_type, config(settings, **fields)), theirs, b.logps)
    uncorrected = lambda x: skyrl.policy_loss_fn(  # noqa: E731
        x, b.old, b.advantages, config(settings, **fields), b.mask, None, loss_type=loss_type
    )[0]
    assert_same(uncorrected, lambda x: masked_sum(formula(x, b), b.mask), b.logps)


@pytest.mark.parametrize("scored_by_sampler", [True, False])
@pytest.mark.parametrize("kind", ["binary_tv", "binary_kl"])
def test_dppo_gradient(kind, scored_by_sampler):
    """The gradient is SkyRL's; the value is that of another surrogate with the same gradient."""
    b = scored()
    anchor = b.rollout if scored_by_sampler else b.old
    bounds = {"binary_tv": (0.05, 0.1), "binary_kl": (0.01, 0.02)}[kind]

    def theirs(x):
        p, q = x.detach().exp(), anchor.exp()
        moved = p - q
        kl = q * (anchor - x.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
        if kind == "binary_tv":
            drop = ((b.advantages > 0) & (moved > bounds[1])) | ((b.advantages < 0) & (-moved > bounds[0]))
        else:
            drop = ((b.advantages > 0) & (moved > 0) & (kl > bounds[1])) | (
                (b.advantages < 0) & (moved < 0) & (kl > bounds[0])
            )
        assert 0 < int((drop & b.mask).sum()) < int(b.mask.sum())
        return masked_sum(-ratio(x, anchor) * b.advantages * ~drop, b.mask)

    cfg = config(dppo={"dppo_type": kind, "delta_low": bounds[0], "delta_high": bounds[1]})
    rollout = b.rollout if scored_by_sampler else None
    mine = lambda x: skyrl.policy_loss_fn(x, b.old, b.advantages, cfg, b.mask, rollout, loss_type="dppo")[0]  # noqa: E731
    assert_same(mine, theirs, b.logps, value=False)


def covariance(b):
    a, x = b.advantages[b.mask], b.logps[b.mask]
    return (b.advantages - a.mean()) * (b.logps - x.mean())


def test_clip_cov_where_all_candidates_are_taken():
    b = scored()
    fields = {"clip_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 0.6}

    def theirs(x):
        loss = ppo(x, b.old, b.advantages, 0.2, 0.2)
        r = (x - b.old).exp()
        clipped = ((r < 0.8) & (b.advantages < 0)) | ((r > 1.2) & (b.advantages > 0))
        drop = (covariance(b) > 0.05) & (covariance(b) < 0.6) & ~clipped
        assert 0 < int((drop & b.mask).sum()) < int(b.mask.sum())
        return masked_sum(loss * ~drop, b.mask)

    assert_same(ours(b, "clip_cov", config(clip_cov=fields)), theirs, b.logps)


def test_kl_cov():
    b = scored()

    def theirs(x):
        count = int(0.3 * int(b.mask.sum()))
        bound = covariance(b)[b.mask].topk(count).values.min()
        picked = covariance(b) >= bound
        return masked_sum(-(x - b.old).exp() * b.advantages + 0.5 * (x - b.old).abs() * picked, b.mask)

    assert_same(ours(b, "kl_cov", config(kl_cov={"kl_cov_frac": 0.3, "ppo_kl_coef": 0.5})), theirs, b.logps)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_sum_over_unequal_micro_batches_is_the_reduction(reduction):
    """SkyRL scales the advantages of the mini-batch; the sums of its micro-batches are then the reduced loss."""
    b = scored()
    scale = {
        "token_mean": 1 / b.mask.sum(),
        "sequence_mean": 1 / (4 * b.mask.sum(-1, keepdim=True).clamp(min=1)),
        "seq_mean_token_sum_norm": torch.tensor(1 / (4 * 16)),
    }[reduction].double()
    scaled = b._replace(advantages=b.advantages * scale)
    parts = [scaled.rows(slice(0, 1)), scaled.rows(slice(1, 4))]

    def split(x):
        return ours(parts[0], "regular", config())(x[:1]) + ours(parts[1], "regular", config())(x[1:])

    assert_same(split, lambda x: masked_sum(scale * ppo(x, b.old, b.advantages, 0.2, 0.2), b.mask), b.logps)


def test_metrics():
    b = scored()
    r = (b.logps - b.old).exp()
    clipped = ((r < 0.8) & (b.advantages < 0)) | ((r > 1.2) & (b.advantages > 0))
    _, metrics = skyrl.policy_loss_fn(b.logps, b.old, b.advantages, config(), b.mask, None)
    assert metrics["clip_ratio"] == pytest.approx(float(clipped[b.mask].double().mean()), rel=1e-6)
    _, metrics = skyrl.policy_loss_fn(b.logps, b.old, b.advantages, config(), b.mask, None, loss_type="cispo")
    assert metrics["cispo/ratio_max"] == pytest.approx(float(r[b.mask].max()), rel=1e-6)
    _, metrics = skyrl.policy_loss_fn(b.logps, b.old, b.advantages, config(), b.mask, b.rollout, loss_type="rollout_is")
    r = (b.logps - b.rollout).exp()
    outside = ((r <= 0.8) | (r >= 1.2))[b.mask]
    assert metrics["clip_ratio"] == pytest.approx(float(outside.double().mean()), rel=1e-6)
    assert all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize(
    ("loss_type", "cfg", "named"),
    [
        ("regular", config(use_tis=True), "use_tis"),
        ("regular", config(tis_imp_ratio_cap=2.0), "tis_imp_ratio_cap"),
        ("regular", config(new_loss_knob=1), "new_loss_knob"),
        ("cross_entropy", config(), "policy_loss_type"),
        ("cispo", config(cispo={"cispo_anchor": "reference"}), "cispo.cispo_anchor"),
        ("cispo", config(cispo={"soft": True}), "soft"),
        ("dppo", config(dppo={"dppo_type": "topk_tv"}), "dppo.dppo_type"),
        ("regular", config({"tis_ratio_type": "segment"}), "off_policy_correction.tis_ratio_type"),
        ("regular", config({"outlier_token_is_threshold_high": 100.0}), "outlier_token_is_threshold_high"),
        ("regular", config({"token_mask_is_threshold_low": 0.5}), "token_mask_is_threshold_low"),
        ("regular", config({"sequence_mask_metric": "mean"}), "sequence_mask_metric"),
        ("regular", config({"veto": 1}), "veto"),
        ("kl_cov", config({"tis_ratio_type": "token"}), "off_policy_correction"),
        ("rollout_is", config({"tis_ratio_type": "token"}), "off_policy_correction"),
        (
            "regular",
            config({"outlier_token_is_threshold_low": 0.1, "sequence_mask_metric": "product"}),
            "outlier_token_is_threshold_low and sequence_mask_metric",
        ),
        (
            "regular",
            config(
                {"tis_ratio_type": "sequence", "token_mask_is_threshold_low": 0.5, "token_mask_is_threshold_high": 2}
            ),
            "tis_ratio_type",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(loss_type, cfg, named):
    b = scored()
    with pytest.raises(ValueError, match=f"^{named}: "):
        ours(b, loss_type, cfg)(b.logps)


def test_needs_rollout_log_probs():
    b = scored()
    with pytest.raises(ValueError, match="^rollout_logprobs: "):
        skyrl.policy_loss_fn(b.logps, b.old, b.advantages, config(), b.mask, None, loss_type="rollout_is")
