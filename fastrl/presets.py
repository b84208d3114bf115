"""One row per paper: each preset is a `LossSpec`, nothing else."""

from __future__ import annotations

from typing import Any

from fastrl.spec import AdvantageScale, Aggregation, LossSpec, RatioLevel

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

PRESETS: dict[str, LossSpec] = {
    "ppo": PPO,
    "grpo": GRPO,
    "bnpo": BNPO,
    "dr_grpo": DR_GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
}


def preset(name: str, **overrides: Any) -> LossSpec:
    """The preset called `name`, in any case and with "-" or "_", with fields replaced."""
    key = name.lower().replace("-", "_") if isinstance(name, str) else name
    if key not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[key].replace(**overrides)
