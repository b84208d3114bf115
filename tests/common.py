"""What the tests share: backends, batches, and one error bar for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrl
from fastrl import reference
from fastrl.correction import correct_batch
from fastrl.flat import Flat
from fastrl.spec import LossSpec

ACCELERATOR = "cuda" if torch.cuda.is_available() else "cpu"  # without one, Triton runs in its interpreter

ON_CPU = ("torch",) if torch.cuda.is_available() else ("torch", "triton")  # engines that take CPU tensors here

BACKENDS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("triton", ACCELERATOR), id="triton", marks=pytest.mark.accelerator),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
]

PRESETS = fastrl.presets.PRESETS


def cubic(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """A custom objective that no preset has."""
    return -advantages * (log_ratio + log_ratio**3)


# One row per option, on top of a preset that it makes sense with.
OPTIONS: dict[str, LossSpec] = {
    **PRESETS,
    "asymmetric": fastrl.PPO.replace(epsilon_low=0.1, epsilon_high=0.4),
    "no-lower-bound": fastrl.PPO.replace(epsilon_low=None),
    "no-upper-bound": fastrl.PPO.replace(epsilon_high=None),
    "unbounded": fastrl.PPO.replace(epsilon_low=None, epsilon_high=None),
    "dual-clip": fastrl.PPO.replace(dual_clip=1.5),
    "delta": fastrl.GRPO.replace(delta=1.6),
    "delta-no-upper-bound": fastrl.PPO.replace(delta=1.4, epsilon_high=None),
    "delta-dual": fastrl.GRPO.replace(delta=1.8, dual_clip=1.4),
    "k1": fastrl.GRPO.replace(kl_coef=0.3, kl_estimator="k1"),
    "abs": fastrl.GRPO.replace(kl_coef=0.3, kl_estimator="abs"),
    "k2": fastrl.GRPO.replace(kl_coef=0.3, kl_estimator="k2"),
    "k3": fastrl.GRPO.replace(kl_coef=0.3),
    "entropy": fastrl.DAPO.replace(entropy_coef=0.1),
    "entropy-own-mean": fastrl.GRPO.replace(entropy_coef=0.1, entropy_aggregation="token-mean"),
    "entropy-own-sequences": fastrl.GSPO.replace(
        entropy_coef=-0.1, entropy_aggregation="seq-mean-token-mean", top_entropy_quantile=0.6
    ),
    "token-sum": fastrl.PPO.replace(aggregation="token-sum"),
    "seq-mean-token-sum": fastrl.PPO.replace(aggregation="seq-mean-token-sum"),
    "no-clamp": fastrl.PPO.replace(log_ratio_clamp=None),
    "tight-clamp": fastrl.PPO.replace(log_ratio_clamp=0.2, kl_coef=0.1),
    "gspo-full": fastrl.GSPO.replace(epsilon_low=0.1, epsilon_high=0.2, kl_coef=0.2, entropy_coef=0.05, dual_clip=1.2),
    "gspo-dr": fastrl.GSPO.replace(aggregation="seq-mean-token-sum-norm", max_length=9, epsilon_low=0.1, delta=1.5),
    "leave-one-out": fastrl.GRPO.replace(advantage_baseline="leave-one-out"),
    "batch-scale": fastrl.GRPO.replace(advantage_scale="batch"),
    "raw-rewards": fastrl.PPO.replace(advantage_baseline="none", advantage_scale="none"),
    "importance-sampling": LossSpec(objective="importance_sampling"),
    "cispo-two-sided": fastrl.CISPO.replace(epsilon_low=0.1, epsilon_high=0.2),
    "cispo-sequence": fastrl.CISPO.replace(ratio_level="sequence", epsilon_high=0.1),
    "cispo-unbounded": fastrl.CISPO.replace(epsilon_high=None),
    "sapo-sequence": fastrl.SAPO.replace(ratio_level="sequence", sapo_temperature_negative=3.0),
    "gmpo-tight": fastrl.GMPO.replace(epsilon_low=0.05, epsilon_high=0.1, kl_coef=0.1, entropy_coef=0.02),
    "gmpo-one-sided": fastrl.GMPO.replace(epsilon_low=None, epsilon_high=0.1),
    "vespo-kl": fastrl.VESPO.replace(kl_coef=0.1, kl_gradient="importance_weighted", vespo_k_negative=1.5),
    "dppo-tv-tight": fastrl.DPPO_TV.replace(epsilon_low=0.01, epsilon_high=0.02, dppo_ratio_cap=1.1),
    "dppo-kl-tight": fastrl.DPPO_KL.replace(epsilon_low=1e-3, epsilon_high=None, dppo_ratio_cap=1.1),
    "topr-sequence": fastrl.TOPR.replace(ratio_level="sequence_sum", topr_ratio_cap=0.9),
    "rloo-loose": fastrl.RLOO.replace(epsilon_high=2.0, epsilon_low=None),
    "gspo-token-tight": fastrl.GSPO_TOKEN.replace(epsilon_low=0.02, epsilon_high=0.1, dual_clip=1.3),
    "clip-cov-many": fastrl.CLIP_COV.replace(clip_cov_fraction=0.3, clip_cov_low=1e-4, seed=7),
    "kl-cov-many": fastrl.KL_COV.replace(kl_cov_fraction=0.3, kl_cov_coef=0.5, kl_coef=0.1),
    "importance-weighted-kl": fastrl.GRPO.replace(kl_coef=0.3, kl_gradient="importance_weighted"),
    "importance-weighted-sequence": fastrl.GSPO.replace(kl_coef=0.3, kl_gradient="importance_weighted", delta=1.3),
    "straight-through": fastrl.GRPO.replace(kl_coef=0.3, kl_gradient="straight_through", kl_clamp=0.05),
    "clamped-k1": fastrl.GRPO.replace(kl_coef=0.3, kl_estimator="k1", kl_clamp=0.2),
    "top-entropy": fastrl.DAPO.replace(top_entropy_quantile=0.4, kl_coef=0.1),
    "custom": LossSpec(objective=cubic, kl_coef=0.1, entropy_coef=0.02),
    "custom-sequence": LossSpec(objective=cubic, ratio_level="sequence", aggregation="seq-mean-token-mean"),
}


_R = fastrl.RolloutCorrection
# The same for options that need rollout log-probs, which `make_batch` gives with log ρ near ±0.1.
ROLLOUT_OPTIONS: dict[str, LossSpec] = {
    "truncate": fastrl.DAPO.replace(rollout=_R(upper=1.05)),
    "two-sided": fastrl.CISPO.replace(rollout=_R(lower=0.95, upper=1.1)),
    "icepop": fastrl.GRPO.replace(rollout=_R(mode="mask", lower=0.9, upper=1.1), kl_coef=0.2, entropy_coef=0.1),
    "sequence-truncate": fastrl.PPO.replace(rollout=_R(level="sequence", upper=1.1)),
    "sequence-mask": fastrl.GSPO.replace(rollout=_R(level="sequence", mode="mask", upper=1.2)),
    "geometric": fastrl.GMPO.replace(rollout=_R(level="geometric", lower=0.99, upper=1.05)),
    "reject-k1": fastrl.GSPO_TOKEN.replace(rollout=_R(reject="k1", reject_lower=-0.12, reject_upper=0.12)),
    "reject-k2-sum": fastrl.DAPO.replace(
        rollout=_R(level=None, reject="k2", reject_level="sequence-sum", reject_upper=0.02)
    ),
    "reject-k3-mean": fastrl.SAPO.replace(rollout=_R(reject="k3", reject_level="sequence-mean", reject_upper=0.005)),
    "reject-tv-max": fastrl.RLOO.replace(
        rollout=_R(level="sequence", reject="tv", reject_level="sequence-max", reject_upper=0.02)
    ),
    "reject-binary-kl": fastrl.TOPR.replace(rollout=_R(reject="binary_kl", reject_upper=1e-4)),
    "normalised": fastrl.REINFORCE.replace(rollout=_R(upper=1.1, normalize=True)),
    "normalised-sequence": fastrl.DRO.replace(rollout=_R(level="sequence", normalize=True)),
    "second-moment": fastrl.DAPO.replace(rollout=_R(level=None, second_moment=0.005)),
    "excluded": fastrl.GRPO.replace(
        rollout=_R(mode="mask", upper=1.1, rejected_in_denominator=False), kl_coef=0.1, entropy_coef=0.1
    ),
    "excluded-sequence": fastrl.GSPO.replace(
        rollout=_R(reject="k1", reject_level="sequence-mean", reject_upper=0.0, rejected_in_denominator=False)
    ),
    "vespo-token": fastrl.VESPO.replace(rollout=_R(mode="mask", upper=1.1)),
    "vespo-sequence": fastrl.VESPO.replace(rollout=_R(level="sequence", upper=1.1, reject="k3", reject_upper=0.01)),
    "off-policy": fastrl.GRPO.replace(off_policy_threshold=0.05, kl_coef=0.1),
    "off-policy-cispo": fastrl.CISPO.replace(off_policy_threshold=0.0, rollout=_R(upper=1.1)),
    "kl-cov-rollout": fastrl.KL_COV.replace(rollout=_R(upper=1.05), kl_cov_fraction=0.3),
    "top-entropy-rollout": fastrl.DAPO.replace(rollout=_R(mode="mask", upper=1.1), top_entropy_quantile=0.5),
}

EVERY_OPTION = {**OPTIONS, **ROLLOUT_OPTIONS}
# One spec for each way through the code (plan, ratio level, correction, selection, normaliser): what a promise about
# all of them is tested on. Formulas are tested on EVERY_OPTION.
KINDS = {
    name: EVERY_OPTION[name]
    for name in (
        "grpo", "dr_grpo", "gspo", "gspo-token-tight", "rloo", "gmpo-tight", "cispo", "sapo", "dro", "entropy", "k3",
        "clip-cov-many", "kl-cov-many", "top-entropy", "batch-scale", "raw-rewards", "custom", "custom-sequence",
        "importance-weighted-sequence", "icepop", "sequence-mask", "reject-k3-mean", "normalised", "second-moment",
        "excluded", "vespo-token", "off-policy", "top-entropy-rollout",
    )
}  # fmt: skip
# Of those, the ones whose tokens do not depend on other sequences of the batch.
PARTITIONED = [
    name for name, spec in KINDS.items() if not spec.by_batch and not (spec.rollout and spec.rollout.by_batch)
]


@dataclass
class Batch:
    """Hidden states with a head, and the rollouts they are scored against."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)
    rollouts: fastrl.Rollouts
    temperature: float | Tensor = 0.7
    logit_scale: float = 1.0
    softcap: float | None = None

    def head(self, weight: Tensor | None = None, bias: Tensor | None = None) -> fastrl.LMHead:
        w, b = self.weight if weight is None else weight, self.bias if bias is None else bias
        return fastrl.LMHead(w, b, self.logit_scale, self.softcap)

    def logits(self) -> Tensor:
        """fp64 logits after the head's transform, before the temperature."""
        return transform(self.hidden.double(), self.weight.double(), self.bias.double(), self)


def transform(hidden: Tensor, weight: Tensor, bias: Tensor, batch: Batch) -> Tensor:
    """bias, scale, softcap, in plain torch."""
    z = torch.nn.functional.linear(hidden, weight, bias) * batch.logit_scale
    return z if batch.softcap is None else batch.softcap * torch.tanh(z / batch.softcap)


def make_batch(
    B: int = 4,
    T: int = 6,
    V: int = 37,
    H: int = 8,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    drift: float = 0.3,
    garbage: bool = True,
    seed: int = 0,
    scale: float = 1.0,
    rewards: bool = True,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    group_size: int = 2,
    rollout: bool = True,
) -> Batch:
    """A batch with a holed mask, one fully masked sequence, and garbage wherever the mask is 0."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, H, generator=g, dtype=torch.float64) * scale * 0.5).to(dtype)
    bias = (torch.randn(V, generator=g, dtype=torch.float64) * 0.2).to(dtype)
    ids = torch.randint(0, V, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) > 0.3
    if B > 2:
        mask[2] = False
    batch = Batch(hidden, weight, bias, None, logit_scale=logit_scale, softcap=softcap)
    clean = torch.where(mask, ids, 0)
    logps, _ = reference.logprobs(batch.logits(), clean, None, 0.7)
    old = (logps + drift * torch.randn(B, T, generator=g, dtype=torch.float64)).float()
    ref = (logps + drift * torch.randn(B, T, generator=g, dtype=torch.float64)).float()
    sampler = old + 0.1 * torch.randn(B, T, generator=torch.Generator().manual_seed(seed + 1))
    sampler[0, 0] = float("nan")
    if garbage:
        ids = ids.masked_fill(~mask, -100)
        old = old.masked_fill(~mask, float("nan"))
        ref = ref.masked_fill(~mask, float("inf"))
        sampler = sampler.masked_fill(~mask, 1e30)
        hidden = hidden.masked_fill(~mask[..., None], float("nan"))
    values = torch.randn(B, generator=g)
    given: dict[str, Any] = {"rewards": values, "group_size": group_size} if rewards else {"advantages": values}
    extra = {"rollout_logps": sampler} if rollout else {}
    rollouts = fastrl.Rollouts(ids, mask, **given, old_logps=old, ref_logps=ref, **extra).to(device)
    batch.hidden, batch.weight, batch.bias = hidden.to(device), weight.to(device), bias.to(device)
    batch.rollouts = rollouts
    return batch


def clean_logits(batch: Batch, fill: float = 0.0) -> Tensor:
    """fp64 logits with `fill` where the mask is 0."""
    keep = batch.rollouts.flat.valid().view(batch.rollouts.shape)[..., None]
    safe = torch.where(keep, torch.nan_to_num(batch.hidden.double()), 0.0)
    logits = transform(safe, batch.weight.double(), batch.bias.double(), batch)
    return torch.where(keep, logits, fill)


@dataclass
class Truth:
    """fp64 values and gradients."""

    loss: Tensor
    statistics: Tensor
    logps: Tensor
    entropy: Tensor
    gradients: list[Tensor]


def on_cpu(rollouts: fastrl.Rollouts) -> fastrl.Rollouts:
    return rollouts if rollouts.token_ids.device.type == "cpu" else rollouts.to("cpu")


def wide_flat(rollouts: fastrl.Rollouts, spec: LossSpec) -> Flat:
    """The flat rows in fp64, after the corrections of the whole batch."""
    flat = rollouts.flat
    wide = {name: getattr(flat, name) for name in ("old_logps", "ref_logps", "rollout_logps")}
    wide = {name: value.double() for name, value in wide.items() if value is not None}
    return correct_batch(flat._replace(**wide), spec)


def truth_from_logits(
    logits: Tensor, rollouts: fastrl.Rollouts, spec: LossSpec, temperature: float | Tensor, normalizer: Any = None
) -> Truth:
    """The reference in fp64, differentiated by autograd, on the CPU."""
    rollouts = on_cpu(rollouts)
    leaf = logits.detach().cpu().double().requires_grad_()
    temperature = temperature.cpu().double() if isinstance(temperature, Tensor) else temperature
    flat = wide_flat(rollouts, spec)
    mask = flat.valid().view(rollouts.shape)
    logps, entropy = reference.logprobs(leaf, rollouts.token_ids, mask, temperature)
    d = None if normalizer is None else torch.as_tensor(normalizer, dtype=torch.float64)
    loss, statistics = reference.token_loss(logps.reshape(-1), entropy.reshape(-1), flat, d, spec)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return Truth(loss.detach(), statistics, logps.detach(), entropy.detach(), [gradient])


def truth_from_hidden(batch: Batch, spec: LossSpec, normalizer: Any = None) -> Truth:
    """As above through the head, with gradients of hidden, weight and bias."""
    rollouts = on_cpu(batch.rollouts)
    flat = wide_flat(rollouts, spec)
    keep = flat.valid().view(rollouts.shape)
    leaves = [x.detach().cpu().double() for x in (batch.hidden, batch.weight, batch.bias)]
    leaves[0] = torch.where(keep[..., None], leaves[0], 0.0)
    leaves = [x.requires_grad_() for x in leaves]
    temperature = batch.temperature.cpu().double() if isinstance(batch.temperature, Tensor) else batch.temperature
    logps, entropy = reference.logprobs(transform(*leaves, batch), rollouts.token_ids, keep, temperature)
    d = None if normalizer is None else torch.as_tensor(normalizer, dtype=torch.float64)
    loss, statistics = reference.token_loss(logps.reshape(-1), entropy.reshape(-1), flat, d, spec)
    gradients = list(torch.autograd.grad(loss, leaves))
    return Truth(loss.detach(), statistics, logps.detach(), entropy.detach(), gradients)


def close(got: Tensor, want: Tensor, *, ulps: float = 64, dtype: torch.dtype = torch.float32, what: str = "") -> None:
    """|got − want| <= ulps · eps(dtype) · max|want|: a bar on the error against the largest entry, as sums have it."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} against {tuple(want.shape)}"
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in different places"
    if not want.numel():
        return
    error = (got - want).nan_to_num().abs().max().item()
    bar = ulps * torch.finfo(dtype).eps * max(want.nan_to_num().abs().max().item(), 1e-30)
    assert error <= bar, f"{what}: error {error:.3g} over the bar {bar:.3g}"


def no_worse_than_torch(
    got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, what: str, *, scale: float = 0.0
) -> None:
    """Promise 2: error to fp64 at most twice that of plain torch in the same dtype, plus a few ulp.

    `scale` is the size of the terms when they cancel in the result: the loss inherits the rounding of log-probs that
    are larger than it.
    """
    truth = truth.detach().cpu().double()
    ours = (got.detach().cpu().double() - truth).abs().max().item()
    theirs = (plain.detach().cpu().double() - truth).abs().max().item()
    ulp = torch.finfo(dtype).eps * max(truth.abs().max().item(), scale, 1e-30)
    assert ours <= 2 * theirs + 4 * ulp, f"{what}: error {ours:.3g}, plain torch {theirs:.3g}, ulp {ulp:.3g}"
