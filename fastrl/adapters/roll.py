"""ROLL (main, August 2026): an actor worker whose policy loss is fastrl's.

    actor_train:
      worker_cls: fastrl.adapters.roll.ActorWorker      # instead of roll.pipeline.rlvr.actor_worker.ActorWorker

ROLL hands the counts of the whole step to each micro-batch (`batch_num_tokens`, `global_valid_samples`). Log-probs and
entropies come from its strategy, which knows the parallelism.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from fastrl.adapters._batch import no_ids
from fastrl.adapters._roll_config import PIPELINE, count_of, spec_from_config, weighs
from fastrl.functional import policy_loss
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec


def loss_func(self: Any, data: Any, output_tensor: Tensor) -> tuple[Tensor, dict[str, float]]:
    """`ActorWorker.loss_func(self, data: DataProto, output_tensor)`.

    Scores and advantages (B, S − 1), masks and ids (B, S). In ROLL's "token-mean" a masked token counts with whatever
    it holds; here it does not count.

    Metrics: actor/total_loss@sum, actor/ratio_max@max, actor/ratio_min@min; fastrl's own under actor/fastrl/.

    Raises:
        ValueError: an option that is not honoured or not known, named.
    """
    spec = spec_from_config(self.pipeline_config, getattr(self, "worker_config", None))
    final = data.batch.get("final_response_mask", None)
    if final is not None and spec.entropy_coef:
        PIPELINE.refuse("entropy_loss_coef", spec.entropy_coef, "set it to 0 with sample masks (final_response_mask)")
    response = data.batch["response_mask"]
    mask = response[:, 1:] if final is None else final
    score = self.strategy.op_compute_log_probs
    logps = score(logits=output_tensor, input_ids=data.batch["input_ids"], attention_mask=response)
    entropy = None
    if spec.entropy_coef:
        entropy = self.strategy.op_compute_entropy(logits=output_tensor, attention_mask=response)
    rollouts = _rollouts(self, data, logps, mask, spec)
    key = "response_mask" if final is None else "final_response_mask"
    count = count_of(self.pipeline_config, data.meta_info, mask, key)
    out = policy_loss(logps, rollouts, spec, entropy=entropy, normalizer=count)
    values = out.metrics.to_floats()
    metrics = {f"actor/fastrl/{name}@mean": value for name, value in values.items()}
    metrics |= {"actor/ratio_max@max": values["ratio_max"], "actor/ratio_min@min": values["ratio_min"]}
    return out.loss, {**metrics, "actor/total_loss@sum": out.loss.item()}


def _rollouts(worker: Any, data: Any, logps: Tensor, mask: Tensor, spec: LossSpec) -> Rollouts:
    old = worker.get_old_log_probs_with_cache(data, logps)
    sampled = data.batch.get("infer_logprobs", None)
    weighted = spec.rollout is None and weighs(worker.pipeline_config)
    return Rollouts(
        no_ids(logps),
        mask,
        data.batch["advantages"],
        old_logps=old,
        ref_logps=data.batch["ref_log_probs"] if spec.kl_coef else None,
        rollout_logps=old if sampled is None or len(sampled) == 0 else sampled,
        rollout_weights=data.batch["train_infer_is_weight"] if weighted else None,
    )


def _worker_class(base: Any) -> Any:
    @functools.wraps(base.initialize)  # with the attributes by which ROLL dispatches it
    def initialize(self: Any, pipeline_config: Any) -> Any:
        spec_from_config(pipeline_config, getattr(self, "worker_config", None))  # refuses before a model is loaded
        return base.initialize(self, pipeline_config)

    methods = {"loss_func": loss_func, "initialize": initialize, "__module__": __name__}
    return type("ActorWorker", (base,), methods)


def __getattr__(name: str) -> Any:
    if name != "ActorWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _worker_class(importlib.import_module("roll.pipeline.rlvr.actor_worker").ActorWorker)
    return globals()[name]
