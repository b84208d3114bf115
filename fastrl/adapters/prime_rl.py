"""prime-rl (main, September 2026): its rl losses, and any preset, as a custom loss.

    [trainer.loss]
    type = "custom"
    import_path = "fastrl.adapters.prime_rl.loss"
    kwargs = { type = "ipo", eps = 0.3 }

prime-rl calls the loss once per sample and divides the sum over all samples by its global count: the loss is a plain
sum over the tokens of `loss_mask`, the ratio is against the sampler.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastrl.adapters._batch import flat_offsets, no_ids
from fastrl.adapters._config import Options, fields_of
from fastrl.adapters._versions import warn_outside
from fastrl.functional import policy_loss
from fastrl.rollout_correction import RolloutCorrection
from fastrl.rollouts import Rollouts
from fastrl.spec import Aggregation, LossSpec

_WAY_OUT = "use prime-rl's own [trainer.loss] type"
_INPUTS = Options(
    framework="prime-rl's LossInputs",
    honoured=dict.fromkeys(
        ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask", "loss_weights")
    ),
    elsewhere={"trainer_mask_logprobs", "inference_mask_logprobs"},  # read by score centering alone
    own_loss=_WAY_OUT,
)
_CENTERING = {"score_centering": (False, "leave it False")}


class _Kind(NamedTuple):
    options: Options
    spec: Callable[[dict[str, Any]], LossSpec]
    against_sampler: bool
    """Whether the ratio is against the sampler; else it is 1 and the correction's weight is that ratio, detached."""


def _kind(defaults: dict[str, Any], spec: Callable[[dict[str, Any]], LossSpec], against_sampler: bool) -> _Kind:
    fields = {**defaults, "adv_tau": 1.0}
    return _Kind(
        Options(framework="prime-rl", honoured=fields, refused=_CENTERING, own_loss=_WAY_OUT), spec, against_sampler
    )


def _on_policy(**correction: Any) -> LossSpec:
    """−sg(w)·A with gradient −w·A, w the ratio to the sampler as corrected."""
    return LossSpec(
        objective="importance_sampling",
        aggregation=Aggregation.TOKEN_SUM,
        log_ratio_clamp=None,
        rollout=RolloutCorrection(**correction),
    )


def _clipped(objective: str, low: float | None, high: float, clamp: float | None = None) -> LossSpec:
    return LossSpec(
        objective=objective,
        epsilon_low=None if not low else 1 - low,
        epsilon_high=high - 1,
        aggregation=Aggregation.TOKEN_SUM,
        log_ratio_clamp=clamp,
    )


_KINDS = {
    "ipo": _kind(
        {"eps": 0.3, "max_importance_ratio": 1e4},
        lambda f: _on_policy(upper=f["max_importance_ratio"], reject="tv", reject_upper=f["eps"]),
        against_sampler=False,
    ),
    "icepop": _kind(
        {"ratio_low": 0.2, "ratio_high": 5.0},
        lambda f: _on_policy(mode="mask", lower=f["ratio_low"], upper=f["ratio_high"]),
        against_sampler=False,
    ),
    "ppo": _kind(
        {"ratio_low": 0.8, "ratio_high": 1.2, "max_importance_ratio": 1e4},
        lambda f: _clipped("ppo_clip", f["ratio_low"], f["ratio_high"], math.log(f["max_importance_ratio"])),
        against_sampler=True,
    ),
    "cispo": _kind(
        {"ratio_low": 0.0, "ratio_high": 5.0},
        lambda f: _clipped("cispo", f["ratio_low"], f["ratio_high"]),
        against_sampler=True,
    ),
}


class LossOutputs(NamedTuple):
    """prime-rl's `LossOutputs` where prime-rl is not installed."""

    loss: Tensor
    metrics: dict[str, Tensor]


@functools.cache
def _mapped(loss_type: str, items: tuple[tuple[str, Any], ...]) -> tuple[LossSpec, bool, float]:
    """The spec, whether its ratio is against the sampler, and the factor of the advantages."""
    warn_outside("prime-rl", "0.9", "0.10", "written for")
    kwargs = dict(items)
    if loss_type in _KINDS:
        kind = _KINDS[loss_type]
        fields = kind.options.read(kwargs)
        return kind.spec(fields), kind.against_sampler, fields["adv_tau"]
    scale = kwargs.pop("adv_tau", 1.0)
    return LossSpec.preset(loss_type, **{**kwargs, "aggregation": Aggregation.TOKEN_SUM}), True, scale


def loss(inputs: Any, *, type: str = "ipo", **kwargs: Any) -> Any:
    """One sample's loss: `LossInputs` of (seq,) tensors -> `LossOutputs(loss, metrics)`, not normalised.

    `type` is ipo, icepop, ppo or cispo with prime-rl's own fields and defaults, or the name of a preset
    (`fastrl.presets`) with fields of `LossSpec`; `adv_tau` scales the advantages. ppo: a token whose ratio is beyond
    `max_importance_ratio` counts with that ratio and has no gradient (prime-rl keeps the gradient).

    Metrics: is_masked (ipo, icepop), is_clipped (ppo); fastrl's own under fastrl/.

    Raises:
        ValueError: a keyword or an input that is not honoured, named.
    """
    spec, against_sampler, scale = _mapped(type, tuple(sorted(kwargs.items())))
    given = _INPUTS.read({name: value for name, value in fields_of(inputs).items() if value is not None})
    logps, sampled, weights = given["trainer_logprobs"], given["inference_logprobs"], given["loss_weights"]
    advantages = given["advantages"] * scale
    if weights is not None and not against_sampler:  # these losses are linear in A
        advantages, weights = advantages * weights, None
    rollouts = Rollouts(
        no_ids(logps),
        given["loss_mask"],
        advantages,
        old_logps=sampled if against_sampler else None,
        ref_logps=given["ref_logprobs"],
        rollout_logps=None if against_sampler else sampled,
        rollout_weights=weights,
        cu_seqlens=flat_offsets(logps),
    )
    out = policy_loss(logps, rollouts, spec)
    metrics = {f"fastrl/{name}": out.metrics[name] for name in out.metrics}
    if type in ("ipo", "icepop"):
        metrics["is_masked"] = out.metrics["rollout_rejected_fraction"]
    elif type == "ppo":
        metrics["is_clipped"] = out.metrics["clip_fraction"]
    theirs = sys.modules.get("prime_rl.trainer.rl.loss")  # imported already by the trainer that calls
    return (LossOutputs if theirs is None else theirs.LossOutputs)(loss=out.loss, metrics=metrics)
