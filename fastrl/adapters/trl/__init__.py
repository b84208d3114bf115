"""TRL: `GRPOTrainer` and `RLOOTrainer`, drop-in subclasses of TRL 1.16's with fastrl's loss, fused from hidden states.

    from fastrl.adapters.trl import GRPOTrainer   # instead of: from trl import GRPOTrainer

or, for a trainer that exists already, `use_fastrl(trainer)`, and `.restore()` on what it returns. The adapter maps
TRL's options to a `LossSpec` and a scored batch to `Rollouts`; it holds no math. An option that it does not honour, and
a field that it does not know, raise before training starts.
"""

from fastrl.adapters.trl.batch import rloo_rollouts_from_batch, rollouts_from_batch
from fastrl.adapters.trl.config import spec_from_config
from fastrl.adapters.trl.plugin import Plugin, use_fastrl
from fastrl.adapters.trl.trainers import GRPOTrainer, RLOOTrainer

__all__ = [
    "GRPOTrainer",
    "Plugin",
    "RLOOTrainer",
    "rloo_rollouts_from_batch",
    "rollouts_from_batch",
    "spec_from_config",
    "use_fastrl",
]
