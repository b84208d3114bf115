"""verl's advantage estimators with fastrl's, of verl's signatures, for its registry.

A group of one, or of equal rewards, has advantage exactly 0; what verl gives there is in `docs/verl.md`.
"""

from __future__ import annotations

from collections.abc import Callable

from fastrl.adapters.verl import outcome_advantages as outcome
from fastrl.adapters.verl import token_advantages as token
from fastrl.adapters.verl.algorithm import Pair

ADVANTAGE_ESTIMATORS: dict[str, Callable[..., Pair]] = {
    "fastrl_gae": token.generalized,
    "fastrl_gdpo": outcome.gdpo,
    "fastrl_gpg": outcome.gpg,
    "fastrl_grpo": outcome.grpo,
    "fastrl_grpo_passk": outcome.grpo_passk,
    "fastrl_grpo_vectorized": outcome.grpo,
    "fastrl_opo": outcome.opo,
    "fastrl_optimal_token_baseline": token.optimal_token_baseline,
    "fastrl_reinforce_plus_plus": token.reinforce_plus_plus,
    "fastrl_reinforce_plus_plus_baseline": token.reinforce_plus_plus_baseline,
    "fastrl_remax": token.remax,
    "fastrl_rloo": outcome.rloo,
    "fastrl_rloo_vectorized": outcome.rloo,
    "fastrl_tir_optimal_token_baseline": token.tir_optimal_token_baseline,
}
"""Every estimator by the name that it is registered under."""
