"""Batches as fastrl takes them, and the float64 oracle: shared by every suite."""

from __future__ import annotations

from torch import Tensor

import fastrl
from bench.case import Inputs
from bench.plain import EPSILON, KL_COEF
from fastrl import reference
from fastrl.token_inputs import expand

SPEC = fastrl.GRPO.replace(kl_coef=KL_COEF, epsilon_low=EPSILON, epsilon_high=EPSILON)
SEQUENCE_SPEC = fastrl.GSPO.replace(kl_coef=KL_COEF, epsilon_low=EPSILON, epsilon_high=EPSILON)
WITHOUT_KL = SPEC.replace(kl_coef=0.0)


def rollouts(inputs: Inputs) -> fastrl.Rollouts:
    """Built inside the timed call: a new batch pays for its validation."""
    return fastrl.Rollouts(
        inputs["ids"],
        inputs["mask"],
        inputs["advantages"],
        old_logps=inputs["old"],
        ref_logps=inputs.get("ref"),
    )


def oracle_loss(logps: Tensor, inputs: Inputs, spec: fastrl.LossSpec = SPEC) -> Inputs:
    """The loss by the reference, in the dtype of the log-probs, and the ratios that it clips, (B, T)."""
    rows, _, batch = expand(logps.flatten(), None, rollouts(inputs).flat, None, spec)
    measured = reference.measure(rows, batch, spec)
    return {"loss": reference.total_loss(measured, None, batch, spec), "ratio": measured.ratio.view_as(inputs["ids"])}


def oracle_from_logits(inputs: Inputs, logits: Tensor, spec: fastrl.LossSpec = SPEC) -> Inputs:
    logps, _ = reference.logprobs(logits, inputs["ids"], inputs["mask"])
    return oracle_loss(logps, inputs, spec)
