"""Triton kernels for policy-gradient losses. Tensors in, tensors out: no autograd, no trainer, no import of `fastrl`.

Launchers allocate nothing that they do not return or that the caller did not hand in, never wait for the device, and
launch rows on grid x with 64-bit offsets.
"""

from .fused import fused_loss_grad
from .groups import group_advantages
from .logprob import logprob_bwd, logprob_fwd
from .objective_fns import OBJECTIVES
from .policy import STATISTICS, policy_loss_fwd
from .scale import scale_

__all__ = [
    "OBJECTIVES",
    "STATISTICS",
    "fused_loss_grad",
    "group_advantages",
    "logprob_bwd",
    "logprob_fwd",
    "policy_loss_fwd",
    "scale_",
]
