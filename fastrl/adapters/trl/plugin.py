"""fastrl in one trainer: `use_fastrl(trainer)`, and what the two subclasses call."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from fastrl.adapters._versions import warn_outside
from fastrl.adapters.trl import batch, config, entropy, metrics
from fastrl.adapters.trl.scoring import HIDDEN, LEVELS, LOGITS, LOGPROBS, Finish, Scored, Scorer, base_model, with_logps
from fastrl.functional import LossOutput, policy_loss, policy_loss_from_hidden, policy_loss_from_logits
from fastrl.head import LMHead
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec
from fastrl.token_metrics import token_metrics

TESTED = ("trl", "1.16", "1.17")
_PACKAGE = "fastrl.adapters.trl"
_SCORING = "_get_per_token_logps_and_entropies"
_NOT_CALLED = ("get_off_policy_mask", "get_gamma_weights", "get_high_entropy_mask")


class Plugin:
    """fastrl's loss and scoring in one `GRPOTrainer` or `RLOOTrainer`; made by `use_fastrl`, or by the subclasses.

    Attributes:
        trainer: the trainer.
        level: "hidden", "logits" or "logprobs".
        active: False after `restore()`.
    """

    def __init__(self, trainer: Any, level: str = HIDDEN) -> None:
        self.kind = _kind(trainer)
        self.trainer = trainer
        self.trl: Any = {"GRPO": GRPOTrainer, "RLOO": RLOOTrainer}[self.kind]
        self.level = level
        self.active = True
        self.check()

    def check(self) -> None:
        """Raise ValueError for an option that cannot be honoured, named."""
        if self.level not in LEVELS:
            raise ValueError(f"level: expected one of {', '.join(map(repr, LEVELS))}, got {self.level!r}")
        warn_outside(*TESTED)
        config.spec_from_config(self.trainer.args)
        self.spec()
        _check_overrides(self.trainer, self.trl, _NOT_CALLED)
        if self.kind == "GRPO" and self.trainer.use_adaptive_entropy:
            entropy.controller(self.trainer)
        if self.level == HIDDEN:
            self._check_hidden()
        elif self.level == LOGITS and getattr(self.trainer.args, "cast_lm_head_to_fp32", False):
            config.refuse("cast_lm_head_to_fp32", True, "use another level: autocast would cast the logits back")

    def _check_hidden(self) -> None:
        remedy = "use level='logits', where the model applies its own head, or level='logprobs'"
        if self.trainer.is_fsdp_enabled and not getattr(self.trainer.accelerator, "is_fsdp2", False):
            config.refuse("fsdp", "version 1", f"set fsdp_config={{'version': 2}}; or {remedy}")
        model = base_model(self.trainer.model, self.trainer.accelerator)
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            config.refuse("device_map", model.hf_device_map, remedy)
        if model.base_model is model:
            config.refuse("model", type(model).__name__, "it has no backbone of its own; use level='logits'")
        if type(getattr(model.get_output_embeddings(), "weight", None)).__name__ == "DTensor":
            return  # inside the forward of its FSDP module it is whole; if not, it is refused there
        try:
            LMHead.from_model(model)
        except ValueError as error:
            raise ValueError(f"{error}; or use level='logits', where the model applies its own head") from None

    def spec(self) -> LossSpec:
        """The loss of the next step, from the trainer's options as they stand."""
        trainer = self.trainer
        if self.kind == "RLOO":
            return config.rloo_spec(trainer.epsilon_low, trainer.epsilon_high)
        return config.grpo_spec(config.options_of(trainer, batch.accumulation(trainer)))

    def score(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *more: Any, **options: Any
    ) -> Any:
        """TRL's `_get_per_token_logps_and_entropies`, which takes old and reference log-probs, by fastrl's scoring."""
        if self.active and self.level != LOGPROBS:
            finish = functools.partial(with_logps, self.trainer.temperature)
            model = self._scorer(model, logits_to_keep, finish)
        own = self.trl._get_per_token_logps_and_entropies
        return own(self.trainer, model, input_ids, attention_mask, logits_to_keep, *more, **options)

    def _scorer(self, model: Any, keep: int, finish: Finish) -> Scorer:
        float32 = getattr(self.trainer.args, "cast_lm_head_to_fp32", False)
        return Scorer(model, base_model(model, self.trainer.accelerator), self.level, keep, finish, float32)

    def compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's `_compute_loss`: the scalar loss; the metrics are appended to the trainer's.

        Raises:
            ValueError: an input that is not known, or an option that is not honoured.
        """
        if not self.active:
            return self.trl._compute_loss(self.trainer, model, inputs)
        trainer, spec = self.trainer, self.spec()
        rollouts = self._rollouts(inputs)
        normalizer = batch.normalizer(trainer, inputs, rollouts, spec)
        if self.level == LOGPROBS or self._scored_by_an_override():
            logps, entropies, aux_loss = self._call(trainer._get_per_token_logps_and_entropies, model, inputs)
            rollouts = self._selected(rollouts, entropies)
            out = policy_loss(logps, rollouts, spec, entropy=entropies, normalizer=normalizer)
            loss = out.loss
        else:
            loss, out, rollouts, aux_loss = self._fused(model, inputs, rollouts, spec, normalizer)
        self._log(out, rollouts, spec)
        return self._total(loss, rollouts, aux_loss)

    def _fused(
        self, model: Any, inputs: dict[str, Any], rollouts: Rollouts, spec: LossSpec, normalizer: Tensor | float
    ) -> tuple[Tensor, LossOutput, Rollouts, Tensor | None]:
        """The loss from hidden states or logits, as the model's wrappers return it; its output; the rollouts with the
        tokens that all processes have picked; the router loss."""
        temperature = self.trainer.temperature
        given = {"temperature": temperature, "normalizer": normalizer}
        results: list[tuple[LossOutput, Rollouts]] = []

        def finish(rows: Tensor, head: LMHead | None, ids: Tensor, mask: Tensor) -> Scored:
            picked = rollouts
            if self._picks_over_processes():  # once more over the head, to know the entropies before the loss
                with torch.no_grad():
                    picked = self._selected(rollouts, with_logps(temperature, rows, head, ids, mask).entropy)
            if head is None:
                out = policy_loss_from_logits(rows, picked, spec, **given)
            else:
                out = policy_loss_from_hidden(rows, head, picked, spec, **given)
            results.append((out, picked))
            return Scored(out.logps, out.entropy, loss=out.loss)

        scorer = self._scorer(model, inputs["completion_ids"].shape[1], finish)
        own = functools.partial(self.trl._get_per_token_logps_and_entropies, self.trainer)
        _, _, aux_loss = self._call(own, scorer, inputs)
        return scorer.scored.loss, *results[0], aux_loss

    def _picks_over_processes(self) -> bool:
        """Whether the threshold of top_entropy_quantile is that of several processes."""
        trainer = self.trainer
        several = trainer.accelerator.num_processes > 1
        return several and self.kind == "GRPO" and trainer.top_entropy_quantile < 1

    def _selected(self, rollouts: Rollouts, entropies: Tensor) -> Rollouts:
        """The rollouts with the tokens that TRL's own gathering of the entropies picks; a collective call."""
        if not self._picks_over_processes():
            return rollouts
        trainer = self.trainer
        mask = rollouts.flat.valid().view(rollouts.shape)
        kept = trainer.get_high_entropy_mask(entropies.detach(), mask, 1 - trainer.top_entropy_quantile)
        return dataclasses.replace(rollouts, selected=kept)

    def _call(self, scoring: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_get_per_token_logps_and_entropies` as TRL's loss calls it."""
        return scoring(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            compute_aux_loss=self.trainer.aux_loss_enabled,
            **{key: inputs.get(key) for key in batch.FORWARD_KEYS},
        )

    def _scored_by_an_override(self) -> bool:
        """Whether someone else's method gives the log-probs; TRL's loss would call it, and so does this one."""
        method = self.trainer._get_per_token_logps_and_entropies
        own = str(getattr(method, "__module__", "")).startswith(_PACKAGE)
        if not own:
            _say_override(type(self.trainer).__name__)
        return not own

    def _rollouts(self, inputs: dict[str, Any]) -> Rollouts:
        if self.kind == "RLOO":
            return batch.rloo_rollouts_from_batch(inputs)
        trainer = self.trainer
        corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        # VESPO takes the ratio into its own weight wherever it is there.
        return batch.rollouts_from_batch(inputs, weighted=None if trainer.loss_type == "vespo" else corrected)

    def _log(self, out: LossOutput, rollouts: Rollouts, spec: LossSpec) -> None:
        tokens = token_metrics(out, rollouts, spec)
        if self.kind == "GRPO" and self.trainer._entropy_bonus_enabled:
            entropy.account(self.trainer, out, rollouts, spec, tokens)
        metrics.log(self.trainer, out, rollouts, spec, tokens)

    def _total(self, loss: Tensor, rollouts: Rollouts, aux_loss: Tensor | None) -> Tensor:
        """The loss with what TRL adds to it: the router loss; RLOO's constant for empty completions."""
        trainer = self.trainer
        if self.kind == "RLOO":  # the ratio of no tokens is 1, their loss −A
            empty = torch.where(rollouts.flat.lengths == 0, rollouts.flat.advantages, 0.0)
            loss = loss - empty.sum().to(loss.dtype) / rollouts.num_sequences
        if aux_loss is None:
            return loss
        metrics.append(trainer, {"aux_loss": trainer.accelerator.gather_for_metrics(aux_loss.detach()).mean()})
        steps = batch.accumulation(trainer) if self.kind == "GRPO" else 1
        return loss + trainer.router_aux_loss_coef * aux_loss / steps

    def restore(self) -> None:
        """Give the trainer TRL's own loss and scoring back. Does nothing the second time."""
        self.active = False
        placed = {"_compute_loss": self.compute_loss, _SCORING: self.score, "fastrl": self}
        if vars(self.trainer).get("_compute_loss") == self.compute_loss:  # else a subclass, whose methods ask `active`
            for name, value in placed.items():
                if vars(self.trainer).get(name) == value:
                    del vars(self.trainer)[name]


def use_fastrl(trainer: Any, *, level: str | None = None) -> Plugin:
    """Give this trainer fastrl's loss and scoring: `_compute_loss` and `_get_per_token_logps_and_entropies` of the
    instance. No class is changed, and of the model only its forward, during a call. Twice returns the same `Plugin`.

    Args:
        trainer: a TRL `GRPOTrainer` or `RLOOTrainer`, or an instance of a subclass that leaves their loss as it is. One
            that overrides the scoring keeps it, and the loss is taken from its log-probs.
        level: "hidden" takes the loss from hidden states, without logits; "logits" from the model's own logits;
            "logprobs" from the log-probs of TRL's fused head. None = as it is, "hidden" at first.

    Returns:
        The plugin, whose `restore()` undoes it.

    Raises:
        TypeError: another kind of object.
        ValueError: an option that is not honoured, or a method of the loss that a subclass has overridden, named.
    """
    plugin = vars(trainer).get("fastrl") if hasattr(trainer, "__dict__") else None
    if isinstance(plugin, Plugin):
        former, plugin.level = plugin.level, level or plugin.level
        try:
            plugin.check()
        except ValueError:
            plugin.level = former
            raise
        plugin.active = True
        return plugin
    plugin = Plugin(trainer, level or HIDDEN)
    _check_overrides(trainer, plugin.trl, ("_compute_loss", "compute_loss"))
    trainer.fastrl = plugin
    trainer._compute_loss = plugin.compute_loss
    if not _overridden(trainer, plugin.trl, _SCORING):
        trainer._get_per_token_logps_and_entropies = plugin.score
    return plugin


def _kind(trainer: Any) -> str:
    for kind, cls in (("GRPO", GRPOTrainer), ("RLOO", RLOOTrainer)):
        if isinstance(trainer, cls):
            return kind
    raise TypeError(f"trainer: expected a trl.GRPOTrainer or trl.RLOOTrainer, got {type(trainer).__name__}")


def _overridden(trainer: Any, trl: Any, name: str) -> bool:
    """Whether the trainer has its own version of a method of TRL's class."""
    return getattr(type(trainer), name, None) is not getattr(trl, name, None) or name in vars(trainer)


def _check_overrides(trainer: Any, trl: Any, names: tuple[str, ...]) -> None:
    """Refuse a trainer that has its own version of a method which fastrl's loss replaces or does not call."""
    for name in names:
        if _overridden(trainer, trl, name):
            config.refuse(name, f"the override in {type(trainer).__name__}", "leave the method to TRL, or the loss")


@functools.cache
def _say_override(trainer: str) -> None:
    config.logger.warning("%s scores by its own %s: the loss is taken from its log-probs", trainer, _SCORING)
