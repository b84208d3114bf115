"""One row per paper: each preset is a `LossSpec`, nothing else."""

from __future__ import annotations

from typing import Any

from fastrl.options import AdvantageBaseline, AdvantageScale, Aggregation, RatioLevel
from fastrl.spec import LossSpec

PPO = LossSpec()
"""Clipped surrogate, ℓ = −min(r·A, clip(r, 1±0.2)·A), mean over tokens (Schulman et al. 2017, arXiv:1707.06347)."""

GRPO = LossSpec(aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN)
"""The PPO clip on group-normalised rewards, mean over each sequence, then over sequences (DeepSeekMath,
arXiv:2402.03300). The paper's KL is `kl_coef=0.04` with the default k3; peers default it to 0, and so does this."""

BNPO = LossSpec(aggregation=Aggregation.TOKEN_MEAN)
"""GRPO with the mean over the tokens of the local batch (TRL `loss_type="bnpo"`)."""

DAPO = LossSpec(epsilon_high=0.28, aggregation=Aggregation.TOKEN_MEAN)
"""Clip-higher (ε₋ = 0.2, ε₊ = 0.28) and the mean over all tokens (arXiv:2503.14476). Over several micro-batches or
ranks pass the global token count as `normalizer`."""

GSPO = LossSpec(
    ratio_level=RatioLevel.SEQUENCE,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
)
"""Sequence ratio s = exp(mean log r), clipped at the paper's 3e-4 / 4e-4, gradient through the mean
(arXiv:2507.18071)."""

DR_GRPO = LossSpec(
    aggregation=Aggregation.SEQ_MEAN_TOKEN_SUM_NORM,
    max_length=1024,
    advantage_scale=AdvantageScale.NONE,
)
"""GRPO without its length and difficulty biases: rewards only centred, token sums over a constant length
(arXiv:2503.20783). Set `max_length` to the run's longest completion: `LossSpec.preset("dr_grpo", max_length=2048)`."""

GSPO_TOKEN = LossSpec(
    ratio_level=RatioLevel.SEQUENCE_TOKEN,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
)
"""GSPO with a gradient per token: the value sg(s), the gradient of the token's own log-prob, log s = lp − sg(lp) +
sg(mean log r) (arXiv:2507.18071, section 4.3). Equal to GSPO in value and gradient unless advantages, weights or
masks differ within a sequence.

Peers: verl "gspo" (with its clip ratios, `aggregation="token-mean"` by default there; verl bounds log s by 10 from
above only: `log_ratio_clamp=10` does so on both sides). TRL 1.16 has only the form through the mean, `GSPO`."""

CISPO = LossSpec(objective="cispo", epsilon_low=None, epsilon_high=4.0, aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −sg(min(r, 5))·A·log π: the ratio is a bounded weight and every token keeps a gradient (MiniMax-M1,
arXiv:2506.13585).

Peers: TRL and Liger take a raw upper bound and no lower one: their `epsilon_high` e is `epsilon_high=e − 1` here
(5.0, TRL's recommendation, is 4.0). verl, slime, NeMo-RL and ROLL clip to [1−ε₋, 1+ε₊]: set both. Truncated
importance sampling −sg(clip(r, 0, 1))·A·log π (ROLL "tis") is `epsilon_low=1, epsilon_high=0`."""

SAPO = LossSpec(objective="sapo", aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN)
"""ℓ = −A·(4/τ)·σ(τ·(r − 1)), τ = 1 for A > 0 and 1.05 for A ≤ 0: a soft gate, with gradient −A·r at r = 1
(arXiv:2511.20347).

Peers: TRL, Liger, verl (whose aggregation is always seq-mean-token-mean), with the same temperatures."""

GMPO = LossSpec(
    objective="gmpo",
    ratio_level=RatioLevel.SEQUENCE,
    epsilon_low=0.4,
    epsilon_high=0.4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
)
"""ℓᵢ = −Aᵢ·exp( meanₜ clip(log r) ), each log-ratio clipped to ±0.4 on the side that A pushes it: the geometric
instead of the arithmetic mean of ratios (arXiv:2507.20673).

Peers: verl "geo_mean" and TRL's experimental GMPO trainer; both average over all sequences, empty ones included (pass
`normalizer`). A rollout weight must belong to the sequence: verl takes the geometric mean of token weights, which is
`level="geometric"` without bounds."""

LUSPO = LossSpec(
    ratio_level=RatioLevel.SEQUENCE,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_SUM,
)
"""GSPO whose sequence loss is multiplied by the sequence's length, so that long answers do not count less per token
(arXiv:2602.05261): meanᵢ Σₜ ℓ.

Peers: TRL "luspo" with importance_sampling_level "sequence" (it divides by all sequences, empty ones included: pass
`normalizer`). Liger 0.8.5 computes mean over B·T of ℓ·lengthᵢ instead, which differs."""

VESPO = LossSpec(objective="vespo", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −sg(φ(w))·A·log π with w the probability ratio of the whole sequence, φ(w) = e^λ·w^k·e^(−λw), (k, λ) = (2, 3) for
A ≥ 0 and (3, 2) for A < 0 (arXiv:2602.10693).

Peers: TRL "vespo", rollout weights inside w. Liger 0.8.5 leaves them outside, which this does not reproduce."""

DPPO_TV = LossSpec(objective="dppo_tv", epsilon_low=0.2, epsilon_high=0.2, aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −sg(min(r, 20))·A·log π, dropped where the token's probability has moved by more than 0.2 the way that A pushes
it (arXiv:2602.04879).

Peers: verl "dppo_tv" (its ActorConfig makes the cap 3: `dppo_ratio_cap=3.0`); SkyRL and prime-rl have the same gradient
below the cap, with −r·A as the value. prime-rl adds a squared log-ratio, which this does not."""

DPPO_KL = LossSpec(objective="dppo_kl", epsilon_low=0.05, epsilon_high=0.05, aggregation=Aggregation.TOKEN_MEAN)
"""DPPO_TV with the binary KL between old and new probability of the token in place of their difference, bounded by 0.05
(arXiv:2602.04879). Peers: verl "dppo_kl", SkyRL; both take their bounds from the clip ratios."""

REINFORCE = LossSpec(objective="reinforce", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −A·log π, mean over tokens (Williams 1992). With `rollout=RolloutCorrection(...)` and no old_logps the loss is
multiplied by the detached, bounded ratio π/π_rollout.

Peers: verl "gpg" and its bypass mode "reinforce"; ROLL "vanilla". With old_logps None, importance sampling −r·A has the
same gradient."""

RLOO = LossSpec(
    ratio_level=RatioLevel.SEQUENCE_SUM,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
    advantage_baseline=AdvantageBaseline.LEAVE_ONE_OUT,
    advantage_scale=AdvantageScale.NONE,
)
"""REINFORCE on whole answers, the baseline the mean reward of the others (Ahmadian et al. 2024, arXiv:2402.14740),
with the PPO clip on the probability ratio of the answer, s = exp(Σ log r).

Peers: TRL's RLOOTrainer, which subtracts its KL from the reward (`kl_shaped_rewards`) and averages over all
sequences. verl "rloo" is the advantage alone."""

GPG = LossSpec(objective="reinforce", aggregation=Aggregation.TOKEN_MEAN, advantage_scale=AdvantageScale.NONE)
"""ℓ = −A·log π with rewards centred in their group (arXiv:2504.02546). The paper's factor, the batch over its samples
with a non-zero advantage, is `gpg_advantages`, given as `Rollouts.advantages`. Peers: verl "gpg", loss and
estimator."""

TOPR = LossSpec(objective="topr", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −A·log π for A > 0, −sg(min(r, 1))·A·log π for A ≤ 0 (tapered off-policy REINFORCE, arXiv:2503.14286).

Peers: ROLL "topr", which goes by the sign of the score; the paper's ratio is that of the whole answer:
`ratio_level="sequence_sum"`."""

DRO = LossSpec(objective="dro", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −(A·log π − β/2·(log r)²), β = 0.1 (Kimi k1.5, arXiv:2501.12599; DRO, arXiv:2405.19107).

Peers: verl "dro" (β = `dro_beta` there too), ROLL "kimi15" with τ = β; Tinker "dro" sums
(`aggregation="token-sum"`)."""

CLIP_COV = LossSpec(objective="clip_cov", seed=0, aggregation=Aggregation.TOKEN_MEAN)
"""The PPO clip without a fraction 2e-4 of the tokens, drawn from those whose covariance between advantage and
log-prob lies in (1, 5): they are the ones that collapse the entropy (arXiv:2505.22617). Change `seed` every step.

Peers: verl "clip_cov", SkyRL; they draw with the global generator, so the same tokens only when all candidates are
taken."""

KL_COV = LossSpec(objective="kl_cov", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −r·A, plus |log r| at the fraction 2e-4 of tokens with the highest covariance between advantage and log-prob
(arXiv:2505.22617).

Peers: verl "kl_cov" (its config sets the coefficient to 0.1: `kl_cov_coef=0.1`), SkyRL."""

PRESETS: dict[str, LossSpec] = {
    name.lower(): value for name, value in list(globals().items()) if isinstance(value, LossSpec)
}


def preset(name: str, **overrides: Any) -> LossSpec:
    """The preset called `name`, in any case and with "-" or "_", with fields replaced."""
    key = name.lower().replace("-", "_") if isinstance(name, str) else name
    if key not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[key].replace(**overrides)
