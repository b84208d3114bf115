"""Triton kernels for policy-gradient losses. Tensors in, tensors out: no autograd, no trainer, no import of `fastrl`.

Launchers allocate nothing that they do not return or that the caller did not hand in, never wait for the device, and
launch rows on grid x with 64-bit offsets.
"""

from .batch_groups import batch_advantages
from .fused import fused_loss_grad
from .groups import group_advantages
from .logprob import logprob_bwd, logprob_fwd
from .objective_fns import OBJECTIVES
from .policy import STATISTICS, policy_loss_fwd
from .ranking import ranked_reward
from .scale import scale_
from .scan import lambda_returns
from .sparse import sparsify
from .sparse_sums import gather_columns, sum_by_column

__all__ = [
    "OBJECTIVES",
    "STATISTICS",
    "batch_advantages",
    "fused_loss_grad",
    "gather_columns",
    "group_advantages",
    "lambda_returns",
    "logprob_bwd",
    "logprob_fwd",
    "policy_loss_fwd",
    "ranked_reward",
    "scale_",
    "sparsify",
    "sum_by_column",
]
