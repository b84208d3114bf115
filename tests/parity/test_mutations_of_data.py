"""As `test_mutations.py`, for the critic, the reward model and the advantages: without a normaliser, a mask or a clamp
exactly the comparisons named fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("datasets", reason="needs datasets")

from parity import peers
from parity import test_advantages as sequences
from parity import test_critic as critics
from parity import test_token_advantages as tokens

from fastrl import _checks, advantages, batch_advantages, critic, reduction

peers.verl()
peers.openrlhf()

TORCH = ("torch", "cpu")
TRL, VERL = sequences.TestTRL(), sequences.TestVerl()

CRITIC: dict[str, Callable[[], None]] = {
    "verl token-mean": lambda: critics.test_value_loss_of_verl("token-mean", 1),
    "verl token-sum": lambda: critics.test_value_loss_of_verl("token-sum", 1),
    "verl seq-mean-token-sum": lambda: critics.test_value_loss_of_verl("seq-mean-token-sum", 1),
    "verl seq-mean-token-sum-norm": lambda: critics.test_value_loss_of_verl("seq-mean-token-sum-norm", 2),
    "verl seq-mean-token-mean": lambda: critics.test_value_loss_of_verl("seq-mean-token-mean", 2),
    "openrlhf by token": lambda: critics.test_value_loss_of_openrlhf(True, None),
    "openrlhf by sequence": lambda: critics.test_value_loss_of_openrlhf(False, None),
    "openrlhf by token, clipped": lambda: critics.test_value_loss_of_openrlhf(True, 0.5),
    "clip fraction": critics.test_value_clip_fraction,
}
OUTCOMES: dict[str, Callable[[], None]] = {
    "trl group": lambda: TRL.test_group("group"),
    "trl batch": lambda: TRL.test_group("batch"),
    "trl none": lambda: TRL.test_group("none"),
    "trl rloo": TRL.test_leave_one_out,
    "trl gdpo": TRL.test_normalize_then_sum,
    "verl grpo": lambda: VERL.test_grpo("group", True),
    "verl dr_grpo": lambda: VERL.test_grpo("none", False),
    "verl rloo": VERL.test_rloo,
    "verl opo": VERL.test_opo,
    "verl passk": lambda: VERL.test_pass_at_k("group", True),
    "verl gpg": VERL.test_gpg,
    "verl gdpo": VERL.test_gdpo,
}
TOKENS: dict[str, Callable[[], None]] = {
    "gae": lambda: tokens.test_gae(0.97, 0.9, TORCH),
    "reinforce++": lambda: tokens.test_reinforce_plus_plus(0.9),
    "reinforce++ baseline": tokens.test_reinforce_plus_plus_baseline,
    "remax": tokens.test_remax,
    "otb": lambda: tokens.test_optimal_token_baseline("optimal_token_baseline", True, True),
    "tir otb": lambda: tokens.test_optimal_token_baseline("tir_optimal_token_baseline", True, True),
}


def failing(comparisons: dict[str, Callable[[], None]]) -> set[str]:
    def fails(comparison: Callable[[], None]) -> bool:
        try:
            comparison()
        except AssertionError:
            return True
        return False

    return {name for name, comparison in comparisons.items() if fails(comparison)}


def test_all_agree():
    assert not failing(CRITIC | OUTCOMES | TOKENS)


def test_critic_without_the_normaliser(monkeypatch):
    monkeypatch.setattr(reduction, "denominator", lambda *_: None)
    assert failing(CRITIC) == set(CRITIC) - {"verl token-sum", "clip fraction"}


def test_critic_without_the_mask(monkeypatch):
    monkeypatch.setattr(critic, "_check", lambda values, *_: torch.ones_like(values, dtype=torch.bool))
    assert failing(CRITIC) == set(CRITIC)


def test_critic_without_the_clamp(monkeypatch):
    original = critic._terms

    def far(values, returns, old_values, clip, huber_delta, mask):
        return original(values, returns, old_values, None if clip is None else 1e3, huber_delta, mask)

    monkeypatch.setattr(critic, "_terms", far)
    assert failing(CRITIC) == set(CRITIC) - {"openrlhf by token", "openrlhf by sequence"}


def test_advantages_without_the_std(monkeypatch):
    original = advantages.normalise

    def centred(r, groups, baseline, scale, eps, lengths=None):
        return original(r, groups, baseline, "none", eps, lengths)

    for module in (advantages, batch_advantages):
        monkeypatch.setattr(module, "normalise", centred)
    divided = {"trl group", "trl batch", "trl gdpo", "verl grpo", "verl passk", "verl gdpo"}
    assert failing(OUTCOMES) == divided


def test_advantages_without_the_mask(monkeypatch):
    """All: there is garbage under the mask, or should be zeros."""
    monkeypatch.setattr(_checks, "keep", lambda mask, like, of: torch.ones_like(like, dtype=torch.bool))
    assert failing(TOKENS) == set(TOKENS)
