"""`compute_loss_func` for `transformers.Trainer`, and what it shares with `PolicyTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.adapters._versions import warn_outside
from fastrl.adapters.hf.collator import RolloutLabels, counts_sequences
from fastrl.functional import policy_loss_from_logits
from fastrl.metrics import Metrics
from fastrl.options import AdvantageScale
from fastrl.reduction import weighting
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec

TESTED = ("transformers", "5.23", "5.24")


class MetricLog:
    """The metrics of the micro-batches since they were last read, merged; training and evaluation apart."""

    def __init__(self) -> None:
        self._held: dict[bool, Metrics | None] = {True: None, False: None}

    def add(self, metrics: Metrics) -> None:
        """Take the metrics of a batch; of training where gradients are enabled."""
        training = torch.is_grad_enabled()
        held = self._held[training]
        self._held[training] = metrics if held is None else held.merge(metrics)

    def pop(self, *, training: bool = True, all_ranks: bool = False) -> dict[str, float]:
        """The merged metrics as floats, empty if there are none; with `all_ranks` a collective call."""
        held, self._held[training] = self._held[training], None
        if held is None:
            return {}
        return (held.all_reduce() if all_ranks else held).to_floats()


class PolicyLossFunction:
    """What `compute_loss_func` returns: the loss of `Trainer(compute_loss_func=)`, from the model's logits."""

    def __init__(self, spec: LossSpec, temperature: float, backend: str) -> None:
        self.spec, self.temperature, self.backend = spec, temperature, backend
        self._log = MetricLog()
        self._calls = 0

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        logits = _logits_of(outputs)
        spec = spec_at(self.spec, self._calls)
        self._calls += torch.is_grad_enabled()
        out = policy_loss_from_logits(
            logits[:, :-1],
            rollouts_from_labels(labels, spec),
            spec,
            temperature=self.temperature,
            normalizer=normalizer_of(labels, spec, num_items_in_batch),
            backend=self.backend,
        )
        self._log.add(out.metrics)
        return out.loss

    def pop_metrics(self, *, training: bool = True) -> dict[str, float]:
        """fastrl's metrics over the micro-batches since the last call, of this process; waits for the device."""
        return self._log.pop(training=training)


def compute_loss_func(spec: LossSpec, *, temperature: float = 1.0, backend: str = "auto") -> PolicyLossFunction:
    """The policy loss for `Trainer(..., compute_loss_func=)`, beside `data_collator=RolloutCollator(spec=spec)`.

    `Trainer` calls it as f(outputs, labels, num_items_in_batch). Old, reference and rollout log-probs, masks and
    advantages travel in `labels`, a `RolloutLabels` that only `RolloutCollator` makes; num_items_in_batch is then the
    denominator D of the spec's aggregation over the accumulation window and all processes, and the loss is Σ/D. After
    it the Trainer multiplies by the number of processes where it gathered the count, as its gradients are averaged.

    Args:
        spec: which loss.
        temperature: of the sampler; divides the logits.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError (at a call): other labels; a batch counted for another aggregation; a model output without logits or
            with a router loss; a spec that takes the whole batch at once, on a batch that is split over gradient
            accumulation or processes (see `normalizer_of`).

    Source: transformers 5.23.0, `Trainer.compute_loss` and `Trainer._get_num_items_in_batch`.
    """
    if not isinstance(spec, LossSpec):
        _checks.refuse("spec", "a LossSpec", spec, 'e.g. fastrl.GRPO or LossSpec.preset("dapo")', TypeError)
    warn_outside(*TESTED)
    return PolicyLossFunction(spec, temperature, backend)


def rollouts_from_labels(labels: Any, spec: LossSpec) -> Rollouts:
    """The `labels` of a batch as `Rollouts`; (B, L − 1), position t scored by `logits[:, t]`."""
    if not isinstance(labels, RolloutLabels):
        remedy = "pass data_collator=fastrl.adapters.hf.RolloutCollator(spec=spec)"
        _checks.refuse("labels", "the RolloutLabels of a RolloutCollator", type(labels).__name__, remedy)
    wanted = "sequences" if counts_sequences(spec) else "tokens"
    if labels.counted != wanted:
        expected = f"a count of {wanted}, as aggregation is {str(spec.aggregation)!r}"
        _checks.refuse("labels", expected, f"a count of {labels.counted}", "give the collator the spec of the loss")
    given = {name: value for name, value in labels.items() if not name.startswith("counted_")}
    return Rollouts(**given)


def normalizer_of(labels: RolloutLabels, spec: LossSpec, num_items_in_batch: Any) -> Tensor | float | None:
    """The denominator of a micro-batch: the Trainer's count, at least 1; None = the batch's own, or none at all.

    A spec that takes a statistic of all tokens of a batch (top_entropy_quantile, clip_cov, kl_cov, entropy_aggregation,
    a correction of the whole batch, rewards with advantage_scale "batch") has no exact split, and is refused where
    num_items_in_batch shows that the batch is one of several.

    Raises:
        ValueError: that, or no count while training (the Trainer could not take one: gradients would add up wrongly).
    """
    if num_items_in_batch is None:
        if torch.is_grad_enabled() and weighting(spec).denominator is not None:
            remedy = "let the Trainer count the labels of a RolloutCollator"
            _checks.refuse("num_items_in_batch", "the count over the accumulation window", "None", remedy)
        return None
    whole = _takes_whole_batch(spec, "rewards" in labels)
    if whole:
        own, counted = labels.count().item(), float(num_items_in_batch)
        if own != counted:
            came = f"{own} of {counted:g} {labels.counted}: gradient accumulation or several processes"
            remedy = "use gradient_accumulation_steps=1 in one process, or leave the option out"
            _checks.refuse(whole, "a whole batch in one call, which it takes a statistic of", came, remedy)
        return None
    if weighting(spec).denominator is None:
        return None
    return num_items_in_batch.clamp_min(1) if isinstance(num_items_in_batch, Tensor) else max(num_items_in_batch, 1)


def spec_at(spec: LossSpec, step: int) -> LossSpec:
    """The spec of a step: one that draws at random (clip_cov) draws anew."""
    return spec if spec.seed is None else spec.replace(seed=spec.seed + step)


def refuse_router_loss(where: str) -> None:
    remedy = "set output_router_logits = False in model.config, or in its text_config"
    _checks.refuse(where, "a model without a router loss", "one, which the policy loss would drop", remedy)


def _takes_whole_batch(spec: LossSpec, rewards: bool) -> str:
    """The name of the spec's field that takes a statistic of the whole batch, or ""."""
    if spec.top_entropy_quantile < 1:
        return "top_entropy_quantile"
    if spec.by_batch:
        return "objective"
    if spec.entropy_aggregation is not None:
        return "entropy_aggregation"
    if spec.rollout is not None and spec.rollout.by_batch:
        return "rollout"
    return "advantage_scale" if rewards and spec.advantage_scale == AdvantageScale.BATCH else ""


def _logits_of(outputs: Any) -> Tensor:
    if not isinstance(outputs, Mapping) or outputs.get("logits") is None:
        _checks.refuse("outputs", "a model output with logits", type(outputs).__name__, "use a causal language model")
    if outputs.get("aux_loss") is not None:
        refuse_router_loss("outputs")
    return outputs["logits"]
