"""Transformers: the policy loss in `transformers.Trainer` 5.23, on logged rollouts.

    from fastrl.adapters.hf import PolicyTrainer          # fused from hidden states: no logits exist
    trainer = PolicyTrainer(model, args, spec=fastrl.DAPO, train_dataset=rows)

    from fastrl.adapters.hf import RolloutCollator, compute_loss_func   # or from logits, in the plain Trainer
    trainer = Trainer(model, args, RolloutCollator(spec=spec), rows, compute_loss_func=compute_loss_func(spec))

Rows are dicts of prompts, completions, masks, advantages and log-probs, see `RolloutCollator`.
"""

from fastrl.adapters.hf.collator import RolloutCollator, RolloutLabels, add_advantages
from fastrl.adapters.hf.loss import PolicyLossFunction, compute_loss_func
from fastrl.adapters.hf.trainer import PolicyTrainer

__all__ = [
    "PolicyLossFunction",
    "PolicyTrainer",
    "RolloutCollator",
    "RolloutLabels",
    "add_advantages",
    "compute_loss_func",
]
