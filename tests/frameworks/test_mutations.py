"""The comparisons of this folder can fail: without the mask, with another denominator, clip range, correction or policy
that the ratio is against, each of them breaks."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
from frameworks import test_areal, test_nemo_rl, test_prime_rl, test_roll, test_skyrl, test_slime, test_torchtitan

RUNS = {
    "torchtitan": lambda: test_torchtitan.test_same_loss_and_gradient("clip-higher", 17, "padded"),
    "skyrl": lambda: test_skyrl.test_off_policy_correction("token", "clip-higher"),
    "prime_rl": lambda: test_prime_rl.test_sum_of_samples_over_a_global_count("ppo-asymmetric", True),
    "nemo_rl": lambda: test_nemo_rl.test_same_loss_and_gradient("gspo-tis"),
    "areal": lambda: test_areal.test_same_loss_and_gradient("sequence-mask"),
    "slime": lambda: test_slime.test_same_loss_and_gradient("tis", "own"),
    "roll": lambda: test_roll.test_same_loss_and_gradient("weight-token", "seq-mean-token-mean"),
}
MUTATIONS = {
    "mask": lambda r, s, n: (dataclasses.replace(r, mask=None), s, n),
    "denominator": lambda r, s, n: (r, s, n * 1.01),
    "clip": lambda r, s, n: (r, s.replace(epsilon_high=3.0), n),
    "correction": lambda r, s, n: (r, s.replace(rollout=None), n),
    "old": lambda r, s, n: (dataclasses.replace(r, old_logps=r.old_logps + 0.01), s, n),
    "advantages": lambda r, s, n: (dataclasses.replace(r, advantages=r.advantages.abs()), s, n),
}
# what a case does not have cannot be taken from it: sums have no denominator, AReaL's is local
ABSENT = {
    "denominator": ("skyrl", "prime_rl", "areal"),
    "correction": ("torchtitan", "prime_rl"),
}


PAIRS = [(name, mutation) for name in RUNS for mutation in MUTATIONS if name not in ABSENT.get(mutation, ())]


@pytest.mark.parametrize(("name", "mutation"), PAIRS)
def test_breaks(name, mutation, monkeypatch):
    module = importlib.import_module(f"fastrl.adapters.{name}")
    called = "policy_loss_from_logits" if name == "torchtitan" else "policy_loss"
    original = getattr(module, called)

    def mutated(scores, rollouts, spec, *, normalizer=None, **rest):
        rollouts, spec, normalizer = MUTATIONS[mutation](rollouts, spec, normalizer)
        return original(scores, rollouts, spec, normalizer=normalizer, **rest)

    RUNS[name]()
    monkeypatch.setattr(module, called, mutated)
    with pytest.raises((AssertionError, ValueError)) as failure:
        RUNS[name]()
    assert failure.type is AssertionError or mutation == "mask", failure.value  # an id of -100 shows at once
