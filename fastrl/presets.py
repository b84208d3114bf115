"""One row per paper: each preset is a `LossSpec`, nothing else.

Each docstring has four paragraphs, from which `docs/losses.md` is generated: the formula of one token's loss ℓ and its
source; `Gradient:`, dℓ/dlog π of the token; `Use it when`; and `Peers:`. r is the ratio π/π_old, s that of a sequence,
A the advantage, sg the stop-gradient, ε₋ and ε₊ are `epsilon_low` and `epsilon_high`.
"""

from __future__ import annotations

from typing import Any

from fastrl.options import AdvantageBaseline, AdvantageScale, Aggregation, RatioLevel
from fastrl.spec import LossSpec

PPO = LossSpec()
"""ℓ = −min(r·A, clip(r, 1−ε₋, 1+ε₊)·A), ε₋ = ε₊ = 0.2, mean over tokens: the clipped surrogate (Schulman et al. 2017,
arXiv:1707.06347).

Gradient: −r·A where A > 0 and r ≤ 1+ε₊, or A < 0 and r ≥ 1−ε₋; 0 elsewhere. For A < 0 it is also 0 above `dual_clip`
and above `delta`, where they are set.

Use it when a batch serves several optimiser steps or is a little stale: a token is not pushed further once its ratio
has left the range. The clip removes an incentive and is no bound: other tokens still move the ratio, and for A < 0 a
large ratio keeps its large gradient unless `dual_clip` or `delta` is set.

Peers: OpenRLHF "ppo", SkyRL "regular", slime, AReaL, NeMo-RL and ROLL "ppo" have this surrogate. verl "vanilla" always
adds a dual clip, its `clip_ratio_c`: `dual_clip=3.0`. ROLL derives its own, 1 + 2·pg_clip. Tinker "ppo" sums:
`aggregation="token-sum"`.
"""

GRPO = LossSpec(aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN)
"""ℓ as in PPO, with rewards standardised within the answers to one prompt; mean over each sequence, then over sequences
(DeepSeekMath, arXiv:2402.03300).

Gradient: as PPO; a token of a long sequence weighs less, since each sequence is averaged first.

Use it when several answers per prompt can be scored and no critic is wanted. Prompts whose answers all score the same
give no gradient, and the mean per sequence favours short right answers and long wrong ones. The paper has a KL penalty,
`kl_coef=0.04` with k3; peers default it to 0, and so does this.

Peers: TRL and Liger "grpo", which average over all sequences, empty ones too: pass their number as `normalizer`. TRL
multiplies its KL by the ratio unless use_bias_correction_kl is off: `kl_gradient="importance_weighted"`. verl:
loss_agg_mode "seq-mean-token-mean"; OpenRLHF: token_level_loss off; slime by default. verl's advantages take
`advantage_eps=1e-6`, and a group of one gets A = r, here 0. NeMo-RL leaves
one out: `advantage_baseline="leave-one-out"`, `advantage_scale="leave-one-out"`, `advantage_eps=1e-6`.
"""

BNPO = LossSpec(aggregation=Aggregation.TOKEN_MEAN)
"""ℓ as in GRPO, with the mean over the tokens of the local batch (TRL, `loss_type="bnpo"`).

Gradient: as PPO; every token of the batch weighs the same.

Use it when each batch is one optimiser step. Split into micro-batches, it depends on how their lengths fall, since
each is divided by its own token count; DAPO with a global count does not.

Peers: TRL and Liger "bnpo". TRL divides once more, by the accumulation steps, which here is left to the loop. The spec
is that of PPO; the name stands for the local denominator.
"""

DAPO = LossSpec(epsilon_high=0.28, aggregation=Aggregation.TOKEN_MEAN)
"""ℓ as in PPO with a higher upper bound, ε₋ = 0.2 and ε₊ = 0.28, and the mean over all tokens (Yu et al. 2025,
arXiv:2503.14476).

Gradient: −r·A where A > 0 and r ≤ 1.28, or A < 0 and r ≥ 0.8; 0 elsewhere.

Use it when entropy falls too early, since unlikely tokens may rise further before they are clipped, or when answers are
long and each token should count the same. Long answers then dominate the batch. Over micro-batches or ranks pass the
global token count as `normalizer`. The paper's dynamic sampling and overlong penalty belong to the trainer.

Peers: TRL "dapo", its default loss, with the bounds of its own config: ε₊ = ε = 0.2 unless set, so `epsilon_high=0.2`.
Liger "dapo". verl: clip_ratio_high 0.28 with loss_agg_mode "token-mean", and `dual_clip=3.0`.
"""

GSPO = LossSpec(
    ratio_level=RatioLevel.SEQUENCE,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
)
"""ℓ = −min(s·A, clip(s, 1−ε₋, 1+ε₊)·A), s = exp(mean log r) over the sequence: one ratio and one clip for a whole
answer (Zheng et al. 2025, arXiv:2507.18071).

Gradient: −s·A at every token of the sequence where A > 0 and s ≤ 1+ε₊, or A < 0 and s ≥ 1−ε₋; 0 elsewhere.

Use it when ratios of single tokens are noisy, as with mixtures of experts, and rewards are given per answer. An answer
is kept or dropped whole. The mean keeps s close to 1, so the bounds are hundreds of times tighter than PPO's: at 0.2
hardly anything is clipped.

Peers: TRL and Liger "grpo" with importance_sampling_level "sequence", at the epsilon of their config (0.2 unless set);
OpenRLHF "gspo", NeMo-RL, slime, ROLL. OpenRLHF's takes the ratio against the rollout policy when its correction is on:
pass those log-probs as `old_logps`. AReaL averages A over the sequence first. verl and SkyRL: GSPO_TOKEN.
"""

DR_GRPO = LossSpec(
    aggregation=Aggregation.SEQ_MEAN_TOKEN_SUM_NORM,
    max_length=1024,
    advantage_scale=AdvantageScale.NONE,
)
"""ℓ as in PPO, with rewards only centred within the group, and sums over tokens divided by a constant length: GRPO
without its biases by length and difficulty (Liu et al. 2025, arXiv:2503.20783).

Gradient: as PPO; every token weighs 1/(sequences · max_length), however long its sequence is.

Use it when wrong answers grow long under GRPO, or prompts of all difficulties should count alike. Without the division
by the std, the step depends on the scale of the rewards. Set `max_length` to the run's longest completion:
`LossSpec.preset("dr_grpo", max_length=2048)`.

Peers: TRL and Liger "dr_grpo", whose constant is max_completion_length; TRL centres only with scale_rewards "none", so
under its default `advantage_scale="group"`. They count all sequences, empty ones too: pass `normalizer`. verl:
"seq-mean-token-sum-norm" with norm_adv_by_std_in_grpo off, its constant loss_scale_factor, or the padded length.
OpenRLHF's "dr_grpo" is the advantage alone.
"""

GSPO_TOKEN = LossSpec(
    ratio_level=RatioLevel.SEQUENCE_TOKEN,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
)
"""ℓ as in GSPO with sₜ = sg(s)·π/sg(π): the value of s, and the gradient of the token's own log-prob (arXiv:2507.18071,
section 4.3).

Gradient: −s·Aₜ where Aₜ > 0 and s ≤ 1+ε₊, or Aₜ < 0 and s ≥ 1−ε₋; 0 elsewhere.

Use it when advantages, rollout weights or masks differ within a sequence, as over several turns: each token then
follows its own. Where they do not differ it equals GSPO in value and gradient.

Peers: verl "gspo", with its own clip ratios and by default `aggregation="token-mean"`; verl bounds log s by 10 from
above only, which `log_ratio_clamp=10` does on both sides. SkyRL "gspo". TRL 1.16 has only the form through the mean.
"""

CISPO = LossSpec(objective="cispo", epsilon_low=None, epsilon_high=4.0, aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −sg(min(r, 1+ε₊))·A·log π, 1+ε₊ = 5: the ratio is a bounded weight, and no token is dropped (MiniMax-M1,
arXiv:2506.13585).

Gradient: −min(r, 1+ε₊)·A at every token; with a lower bound −clip(r, 1−ε₋, 1+ε₊)·A.

Use it when the clip of PPO silences rare tokens that matter, such as those that begin a reflection. Nothing stops a
token from being pushed on, so it leans on small steps and fresh rollouts. The value contains log π: watch the metrics,
not the loss.

Peers: TRL and Liger take a raw upper bound and no lower one: their `epsilon_high` e is `epsilon_high=e − 1` here (5.0,
recommended by ScaleRL, arXiv:2510.13786, is 4.0). verl, slime, NeMo-RL, SkyRL and ROLL clip to [1−ε₋, 1+ε₊]: set both.
ROLL's "tis", −sg(clip(r, 0, 1))·A·log π, is `epsilon_low=1, epsilon_high=0`. Tinker "cispo" takes raw thresholds on
both sides and sums. ROLL's optional mask of clipped tokens is not reproduced.
"""

SAPO = LossSpec(objective="sapo", aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN)
"""ℓ = −A·(4/τ)·σ(τ·(r − 1)), τ = 1 for A > 0 and 1.05 for A ≤ 0: a smooth gate in place of the clip (Soft Adaptive
Policy Optimization, arXiv:2511.20347).

Gradient: −r·A·4σ(1−σ) with σ = σ(τ·(r − 1)): that of −r·A times a gate, which is 1 at r = 1 and falls on both sides.
The product is largest near r = 2, then fades, and is never exactly 0.

Use it when the on-and-off gradient of a clip makes runs unstable. A larger τ fades faster. There is no hard bound: for
A > 0 a token is still pushed, and harder, between r = 1.2 and 2; for A < 0 a large r fades, where PPO's grows.

Peers: TRL, Liger and verl "sapo" with the same temperatures; verl always averages per sequence, as here. AReaL and
SkyRL have it too. TRL's is also defined at `ratio_level="sequence"`, Liger's not.
"""

GMPO = LossSpec(
    objective="gmpo",
    ratio_level=RatioLevel.SEQUENCE,
    epsilon_low=0.4,
    epsilon_high=0.4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
)
"""ℓᵢ = −Aᵢ·g, g = exp(meanₜ clip(log r)), each log-ratio held to at most 0.4 for A > 0 and to at least −0.4 for A < 0:
the geometric mean of the sequence's ratios, clipped one by one (Zhao et al. 2025, arXiv:2507.20673).

Gradient: −g·A at tokens whose own log-ratio is not clipped; 0 at the others, which still count in g.

Use it when a few outlying ratios dominate the arithmetic mean. Bounds are in log space and wide, from e^−0.4 = 0.67 to
e^0.4 = 1.49. The loss is one number per sequence, so advantages and rollout weights must belong to the sequence.

Peers: verl "geo_mean" and TRL's experimental GMPOTrainer, their bounds in log space too; both average over all
sequences, empty ones too: pass `normalizer`. verl weighs a sequence by the geometric mean of its rollout weights:
`RolloutCorrection(level="geometric")` without bounds. TRL's entropy mask, which shortens the mean, is not reproduced.
"""

LUSPO = LossSpec(
    ratio_level=RatioLevel.SEQUENCE,
    epsilon_low=3e-4,
    epsilon_high=4e-4,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_SUM,
)
"""ℓ as in GSPO, each sequence multiplied by its length: meanᵢ Σₜ ℓ (Liu et al. 2026, arXiv:2602.05261).

Gradient: −s·A at every token of the sequence, as GSPO but not divided by the length.

Use it when answers shrink under GSPO, whose mean gives the tokens of long answers less weight. The size of the gradient
grows with the length of the answers, so the learning rate has to fit it.

Peers: TRL "luspo" with importance_sampling_level "sequence", at the epsilon of its config (0.2 unless set); it divides
by all sequences, empty ones too: pass `normalizer`. Liger 0.8.5 takes the mean over B·T of ℓ·lengthᵢ instead, which is
not reproduced.
"""

VESPO = LossSpec(objective="vespo", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −sg(φ(w))·A·log π, φ(w) = e^λ·w^k·e^(−λ·w), w = exp(Σ log r) over the sequence, (k, λ) = (2, 3) for A ≥ 0 and
(3, 2) for A < 0: a smooth weight on whole sequences in place of a clip (arXiv:2602.10693).

Gradient: −φ(w)·A at every token of the sequence. φ(1) = 1; the largest weight is at w = k/λ, 2/3 for A ≥ 0 and 3/2 for
A < 0.

Use it when rollouts are stale and whole answers should fade out instead of being cut. w is a product over all tokens
and spreads quickly with length: a long answer that has drifted gets nearly no weight. log w is held to [log 1e-8, 20].

Peers: TRL "vespo" with the same k and λ; rollout weights enter w, as here (`level="token"`, or "sequence"). Liger 0.8.5
multiplies the loss by them instead, which is not reproduced.
"""

DPPO_TV = LossSpec(objective="dppo_tv", epsilon_low=0.2, epsilon_high=0.2, aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −sg(min(r, 20))·A·log π, dropped where the token's probability has moved by more than 0.2 the way that A pushes
it: a bound on the total variation in place of the ratio (Qi et al. 2026, arXiv:2602.04879).

Gradient: −min(r, 20)·A where A > 0 and π − π_old ≤ ε₊, or A ≤ 0 and π − π_old ≥ −ε₋; 0 elsewhere.

Use it when the clip treats tokens unequally: by ratio, an unlikely token is cut after a tiny change of probability and
a likely one hardly ever. Here unlikely tokens move freely, and the cap alone holds their weight. Only the sampled
token's probability is seen, not the distribution.

Peers: verl "dppo_tv", bounds from its clip ratios; its config makes the cap 3: `dppo_ratio_cap=3.0`. SkyRL and prime-rl
have the same gradient below the cap, with −r·A as the value. prime-rl's squared log-ratio is not reproduced.
"""

DPPO_KL = LossSpec(objective="dppo_kl", epsilon_low=0.05, epsilon_high=0.05, aggregation=Aggregation.TOKEN_MEAN)
"""ℓ as in DPPO_TV, dropped where KL(π_old ‖ π) between "this token" and "another" exceeds 0.05 the way that A pushes it
(Qi et al. 2026, arXiv:2602.04879).

Gradient: −min(r, 20)·A where A > 0 and (KL ≤ ε₊ or π ≤ π_old), or A ≤ 0 and (KL ≤ ε₋ or π ≥ π_old); 0 elsewhere.

Use it when DPPO_TV's bound is too loose near probabilities of 0 and 1, where the same difference costs more KL. The
bound is in nats; 0.05 is a choice of this library, to be tuned.

Peers: verl "dppo_kl", with `dppo_ratio_cap=3.0`, and SkyRL; both take their bounds from the clip ratios (0.2 in verl
unless set).
"""

REINFORCE = LossSpec(objective="reinforce", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −A·log π, mean over tokens: the plain policy gradient (Williams 1992).

Gradient: −A at every token, whatever the ratio; with `rollout=RolloutCorrection(...)` times its detached weight.

Use it when each batch serves one step on fresh rollouts. There is no protection against stale data but the rollout
weights: without `old_logps` they are π/π_rollout, bounded as the correction says.

Peers: verl "gpg" and its bypass mode "reinforce" (pass `rollout_logps` and no `old_logps`), ROLL "vanilla", NeMo-RL
with disable_ppo_ratio. TRL's "dapo" and the like have this gradient when they keep no old log-probs, since r is then 1;
their value is −A.
"""

RLOO = LossSpec(
    ratio_level=RatioLevel.SEQUENCE_SUM,
    aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN,
    advantage_baseline=AdvantageBaseline.LEAVE_ONE_OUT,
    advantage_scale=AdvantageScale.NONE,
)
"""ℓ = −min(s·A, clip(s, 1−ε₋, 1+ε₊)·A), s = exp(Σ log r) over the sequence, A the reward minus the mean of the other
answers': REINFORCE on whole answers (Ahmadian et al. 2024, arXiv:2402.14740), with the PPO clip.

Gradient: −s·A, undivided by the length, at every token of the sequence where A > 0 and s ≤ 1+ε₊, or A < 0 and
s ≥ 1−ε₋; 0 elsewhere.

Use it when the answer is one action and rewards have a meaningful scale. The baseline is unbiased and needs no critic.
s multiplies over tokens, so long answers leave the clip range soon once the policy has moved.

Peers: TRL's RLOOTrainer, which subtracts its KL from the reward (`kl_shaped_rewards`) and averages over all sequences:
pass `normalizer`. For its normalize_advantages, off by default, pass `advantages` instead of rewards. verl "rloo" is
the advantage alone.
"""

GPG = LossSpec(objective="reinforce", aggregation=Aggregation.TOKEN_MEAN, advantage_scale=AdvantageScale.NONE)
"""ℓ = −A·log π with rewards centred in their group: policy gradient without surrogate, critic, reference or KL (Chu et
al. 2025, arXiv:2504.02546).

Gradient: −A at every token, whatever the ratio.

Use it when fresh rollouts make a surrogate unnecessary. The paper's factor, the batch over its samples with a non-zero
advantage, is `gpg_advantages`, given as `Rollouts.advantages`; without it, prompts solved always or never shrink the
step.

Peers: verl "gpg", loss and estimator; verl's factor counts rewards that are not 0, see `gpg_advantages`.
"""

TOPR = LossSpec(objective="topr", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −A·log π for A > 0, −sg(min(r, 1))·A·log π for A ≤ 0: good samples count in full, bad ones fade as the policy
leaves them (tapered off-policy REINFORCE, Le Roux et al. 2025, arXiv:2503.14286).

Gradient: −A for A > 0; −min(r, 1)·A for A ≤ 0.

Use it when rollouts are far off-policy, or a fixed data set: pushing down an answer that is already unlikely would
otherwise never end. Good answers are imitated however unlikely they are. The paper's ratio is that of the whole answer,
`ratio_level="sequence_sum"`.

Peers: ROLL "topr", ratio per token, which goes by the sign of the score; here it is that of the advantage, the same for
rewards used as they are (`advantage_baseline="none"`, `advantage_scale="none"`).
"""

DRO = LossSpec(objective="dro", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −(A·log π − β/2·(log r)²), β = 0.1: policy gradient with a squared distance to the old policy (Kimi k1.5,
arXiv:2501.12599; Direct Reward Optimisation, Richemond et al. 2024, arXiv:2405.19107).

Gradient: −A + β·log r at every token; it vanishes at r = e^(A/β).

Use it when a soft pull towards the sampling policy is wanted in place of a clip, also on logged data. The pull works at
A = 0 too, and in the log-ratio, so it is weak while r is near 1. The papers square the log-ratio of the whole answer;
this is per token.

Peers: verl "dro" (β is `dro_beta` there too, without a default), ROLL "kimi15" with τ = β. Tinker "dro" sums:
`aggregation="token-sum"`.
"""

CLIP_COV = LossSpec(objective="clip_cov", seed=0, aggregation=Aggregation.TOKEN_MEAN)
"""ℓ as in PPO, without a fraction 2e-4 of the tokens, drawn from those that the clip leaves alone and whose covariance
(A − mean A)·(log π − mean log π) lies in (1, 5): such tokens collapse the entropy (Cui et al. 2025, arXiv:2505.22617).

Gradient: 0 at the tokens drawn; elsewhere −r·A where A > 0 and r ≤ 1+ε₊, or A < 0 and r ≥ 1−ε₋, else 0.

Use it when entropy collapses early and an entropy bonus is hard to tune. Means are over the batch that is passed, so
the pick depends on how it is split. Change `seed` every step: `spec.replace(seed=step)`.

Peers: verl "clip_cov", SkyRL; they draw with the global generator, so the tokens are the same only where all candidates
are taken.
"""

KL_COV = LossSpec(objective="kl_cov", aggregation=Aggregation.TOKEN_MEAN)
"""ℓ = −r·A, plus |log r| at the fraction 2e-4 of the tokens with the highest covariance between advantage and log-prob
(Cui et al. 2025, arXiv:2505.22617).

Gradient: −r·A at every token; plus sign(log r), times `kl_cov_coef`, at those picked.

Use it when entropy collapses early, and tokens should be held back instead of dropped. Nothing is clipped: all other
ratios are free. On the first step of a batch r = 1, where the penalty has no gradient.

Peers: verl "kl_cov", whose config sets the coefficient to 0.1: `kl_cov_coef=0.1`; SkyRL.
"""

PRESETS: dict[str, LossSpec] = {
    name.lower(): value for name, value in list(globals().items()) if isinstance(value, LossSpec)
}


def preset(name: str, **overrides: Any) -> LossSpec:
    """The preset called `name`, in any case and with "-" or "_", with fields replaced."""
    key = name.lower().replace("-", "_") if isinstance(name, str) else name
    if key not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[key].replace(**overrides)
