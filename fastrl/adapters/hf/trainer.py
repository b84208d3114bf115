"""`PolicyTrainer`: `transformers.Trainer` on logged rollouts, its loss fused from hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from fastrl import _checks
from fastrl.adapters._forward import backbone, causal_model, forward_replaced
from fastrl.adapters._versions import warn_outside
from fastrl.adapters.hf.collator import ROW_KEYS, RolloutCollator
from fastrl.adapters.hf.loss import (
    TESTED,
    MetricLog,
    normalizer_of,
    refuse_router_loss,
    rollouts_from_labels,
    spec_at,
)
from fastrl.functional import LossOutput, policy_loss_from_hidden
from fastrl.head import LMHead
from fastrl.spec import LossSpec

# TrainingArguments that reach into the loss or the model's forward: the value that switches them off, and what to do.
_REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "a policy loss has no labels to smooth; leave it 0"),
    "use_liger_kernel": (False, "it replaces the model's forward; leave it False"),
    "torch_compile": (False, "compile the backbone instead: model.base_model.compile()"),
    "parallelism_config": (None, "the head or the sequence would be sharded; use data parallelism"),
}


def _refuse(name: str, value: Any, remedy: str) -> None:
    raise ValueError(f"{name}: fastrl.adapters.hf.PolicyTrainer does not honour {value!r}; {remedy}")


class PolicyTrainer(Trainer):
    """`Trainer` whose loss is `fastrl.policy_loss_from_hidden`: the backbone runs, the head is read, no logits exist.

    The dataset's rows are those of `RolloutCollator`, which is the default collator; their columns are kept whatever
    `remove_unused_columns` says. The loss of a micro-batch is Σ/D with D = num_items_in_batch, the tokens or sequences
    that count (by the spec's aggregation) over the accumulation window, and over all processes with
    `average_tokens_across_devices`, where it is multiplied by their number, as the gradients are averaged: the
    gradient is that of one batch. Logs fastrl's metrics as `fastrl/<name>`, in evaluation as `eval_fastrl/<name>`,
    merged exactly over micro-batches and processes; `eval_loss` is the Trainer's own mean over evaluation batches.

    Honoured: PEFT adapters on the body, gradient accumulation and checkpointing, autocast (bf16, fp16), tied heads,
    evaluation and compute_metrics (predictions are the log-probs (B, L − 1)), data parallelism (DDP).

    Args:
        args, kwargs: of `transformers.Trainer`.
        spec: which loss.
        temperature: of the sampler; divides the logits.
        buffer_bytes, backend: as for `policy_loss_from_hidden`.

    Raises:
        ValueError: before training starts, naming what is not honoured: label_smoothing_factor, use_liger_kernel,
            torch_compile, compute_loss_func, DataParallel, FSDP, DeepSpeed, context, sequence and tensor parallelism,
            encoder-decoder models, router losses, prompt-learning adapters, and any head that `LMHead` cannot read.

    Source: transformers 5.23.0, `Trainer.compute_loss`, `training_step` and `prediction_step`.
    """

    loss_is_scaled_for_ga = True
    _signature_columns: list[str] | None

    def __init__(
        self,
        *args: Any,
        spec: LossSpec,
        temperature: float = 1.0,
        buffer_bytes: int | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(spec, LossSpec):
            _checks.refuse("spec", "a LossSpec", spec, 'e.g. fastrl.GRPO or LossSpec.preset("dapo")', TypeError)
        warn_outside(*TESTED)
        self.spec, self.temperature, self.buffer_bytes, self.backend = spec, temperature, buffer_bytes, backend
        self._metric_log = MetricLog()
        if len(args) < 3 and kwargs.get("data_collator") is None:
            self.data_collator = RolloutCollator(spec=spec)
        # The loss takes num_items_in_batch whatever the model's forward accepts, and labels come under this one name.
        self.model_accepts_loss_kwargs = True
        self.label_names = ["labels"]
        self._check_arguments()
        self._check_model()

    def _check_arguments(self) -> None:
        for name, (off, remedy) in _REFUSED.items():
            if getattr(self.args, name, off) != off:
                _refuse(name, getattr(self.args, name), remedy)
        if self.compute_loss_func is not None:
            _refuse("compute_loss_func", self.compute_loss_func, "pass spec, or use transformers.Trainer with it")
        if self.args.n_gpu > 1:
            _refuse("n_gpu", self.args.n_gpu, "start one process per device with torchrun")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            name = "fsdp" if self.is_fsdp_enabled else "deepspeed"
            _refuse(name, True, "start from logits: transformers.Trainer(compute_loss_func=compute_loss_func(spec))")

    def _check_model(self) -> None:
        model = causal_model(self.model)
        if getattr(model.config, "is_encoder_decoder", False):
            _refuse("model", type(model).__name__, "use a decoder-only model")
        # the switch of a model for images and text is in its text config
        inner = getattr(model.config, "get_text_config", None)
        configs = (model.config, inner(decoder=True) if inner else None)
        if any(getattr(config, "output_router_logits", False) for config in configs):
            refuse_router_loss("model")
        backbone(model)
        LMHead.from_model(model)  # refuses a head that it cannot read now, not at the first step

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that `remove_unused_columns` keeps are the collator's."""
        if self._signature_columns is None:
            self._signature_columns = list(ROW_KEYS)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, scaled as `Trainer.compute_loss` scales it."""
        out, loss = self._fused(model, inputs, num_items_in_batch)
        self._metric_log.add(out.metrics)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"logps": out.logps}) if return_outputs else loss

    def _fused(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[LossOutput, Tensor]:
        """The loss, computed inside the wrapped model's forward, and as it came out of the wrappers."""
        labels = inputs.get("labels")
        spec = spec_at(self.spec, self.state.global_step)
        rollouts = rollouts_from_labels(labels, spec)
        normalizer = normalizer_of(labels, spec, num_items_in_batch)
        inner = causal_model(self.accelerator.unwrap_model(model))
        seen: list[LossOutput] = []

        def forward(**features: Any) -> Tensor:
            given = {name: value for name, value in features.items() if value is not None}
            with self.accelerator.autocast():
                hidden = backbone(inner)(**given, use_cache=False).last_hidden_state
                out = policy_loss_from_hidden(
                    hidden[:, :-1],
                    LMHead.from_model(inner),
                    rollouts,
                    spec,
                    temperature=self.temperature,
                    normalizer=normalizer,
                    buffer_bytes=self.buffer_bytes,
                    backend=self.backend,
                )
            seen.append(out)
            return out.loss

        with forward_replaced(inner, forward):
            loss = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return seen[0], loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with the metrics of the micro-batches since the last one."""
        if "loss" in logs:
            several = self.accelerator.num_processes > 1
            held = self._metric_log.pop(all_ranks=several)
            logs |= {f"fastrl/{name}": value for name, value in held.items()}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop, with fastrl's metrics over the whole dataset."""
        self._metric_log.pop(training=False)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        held = self._metric_log.pop(training=False, all_ranks=self.accelerator.num_processes > 1)
        output.metrics.update({f"{metric_key_prefix}_fastrl/{name}": value for name, value in held.items()})
        return output
