"""Liger 0.8.5: its Triton GRPO loss from logits over loss types and options, and the `LossSpec` of each.

Its kernels compute in float32 and run in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from parity.batches import B, Batch, Case, Result, T
from parity.trl_cases import LOSS_TYPES
from torch import Tensor

import fastrl

V = 5
SINGLE = 2e-6


def token_ids() -> Tensor:
    return torch.arange(B * T).view(B, T) % V


def logits(batch: Batch, temperature: float, dtype: torch.dtype) -> Tensor:
    """(B, T, V) whose log-softmax at the sampled ids is the batch's log-probs."""
    rest = torch.log(-torch.expm1(batch.logps) / (V - 1))
    every = rest[..., None].expand(B, T, V).scatter(-1, token_ids()[..., None], batch.logps[..., None])
    return (every * temperature).to(dtype)


def liger_loss(*, sampler: float | None = None, temperature: float = 1.0, **options: Any) -> Callable[[Batch], Result]:
    """`triton_grpo_loss`, reduced; `sampler`: the cap of the token ratio that its caller hands in."""

    def run(batch: Batch) -> Result:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Its last position is ignored.
        leaf = torch.nn.functional.pad(logits(batch, temperature, torch.float32), (0, 0, 0, 1)).to(device)
        leaf.requires_grad_()
        ratio = (
            None
            if sampler is None
            else ((batch.old - batch.rollout) * batch.mask).exp().clamp(max=sampler).float().to(device)
        )
        tensors = (None if batch.old is None else batch.old, batch.ref, token_ids(), batch.advantages, batch.mask)
        old, ref, ids, advantages, mask = (
            None if x is None else x.float().to(device) if x.is_floating_point() else x.to(device) for x in tensors
        )
        loss, _ = triton_grpo_loss(
            leaf, old, ref, ids, advantages, mask.int(), temperature=temperature, inplace=False, reduce=True,
            max_completion_length=T, vllm_is_ratio=ratio, **{"eps_high": 0.2, "beta": 0.0, **options},
        )  # fmt: skip
        loss.backward()
        gradient = leaf.grad[:, :-1].cpu().double()
        return Result(loss.detach(), gradient, torch.zeros_like(gradient))

    return run


@dataclass(frozen=True)
class FromLogits(Case):
    """`Case` with both sides at the logits."""

    temperature: float = 1.0
    rtol: float = SINGLE

    def ours(self, batch: Batch, engine: tuple[str, str] = ("torch", "cpu"), spec: fastrl.LossSpec | None = None):
        backend, device = engine
        spec = self.loss_spec() if spec is None else spec
        dtype = torch.float64 if backend == "torch" else torch.float32
        valid = batch.mask.bool()
        leaf = logits(batch, self.temperature, dtype)
        leaf = torch.where(valid[..., None], leaf, torch.nan).to(device).requires_grad_()
        rollouts = self.rollouts(batch, spec, dtype, token_ids()).to(device)
        divisor = None if self.normalizer is None else self.normalizer(batch)
        out = fastrl.policy_loss_from_logits(
            leaf, rollouts, spec, temperature=self.temperature, normalizer=divisor, backend=backend
        )
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return Result(out.loss.detach(), gradient, torch.zeros_like(gradient))


_SEQUENCE = {"importance_sampling_level": "sequence"}, {"ratio_level": "sequence"}
_BIAS = {"beta": 0.3, "use_bias_correction_kl": True}, {"kl_coef": 0.3, "kl_gradient": "importance_weighted"}
_DELTA = {"delta": 1.5}, {"delta": 1.5}
_KL = {"beta": 0.3}, {"kl_coef": 0.3}
_CAP = {"sampler": 1.3}, {"rollout": {"level": "token", "upper": 1.3}}


def _both(one: tuple[dict, dict], other: tuple[dict, dict]) -> tuple[dict, dict]:
    return {**one[0], **other[0]}, {**one[1], **other[1]}


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # theirs, ours, the batch
    "plain": ({}, {}, {}),
    "on-policy": ({}, {}, {"old": False}),
    "sequence": (*_SEQUENCE, {}),
    "delta": (*_DELTA, {}),
    "kl": (*_KL, {}),
    "bias-corrected-kl": (*_BIAS, {}),
    "sequence-bias-corrected-kl": (*_both(_SEQUENCE, _BIAS), {}),
    "sampler": (*_CAP, {}),
    "sequence-sampler": (*_both(_SEQUENCE, _CAP), {}),
}
CASES: dict[str, FromLogits] = {}
for loss_type, (spec, normalizer) in LOSS_TYPES.items():
    if loss_type == "luspo":  # not TRL's: see test_liger.py
        continue
    unclipped = loss_type in ("cispo", "sapo", "vespo")
    given = {"cispo": {"eps_high": 1.1}, "sapo": {"sapo_temperature_neg": 1.25}}.get(loss_type, {})
    if normalizer is not None and loss_type in ("dapo", "cispo", "vespo"):
        given = {**given, "num_items_in_batch": 29.0}
    for option, (theirs, ours, batch) in OPTIONS.items():
        if not (unclipped and ("sequence" in option or "delta" in option)):
            CASES[f"{loss_type}-{option}"] = FromLogits(
                liger_loss(loss_type=loss_type, **given, **theirs),
                {"log_ratio_clamp": None, **spec, **ours},
                normalizer=normalizer,
                batch=batch,
                sampler="sampler" in option,
            )
CASES["temperature"] = FromLogits(
    liger_loss(loss_type="bnpo", temperature=0.7, beta=0.1), {"log_ratio_clamp": None, "kl_coef": 0.1}, temperature=0.7
)


def is_representative(name: str) -> bool:
    """Where each case costs a second: every loss type, and every option of one."""
    return name.endswith("-plain") or name.startswith(("grpo", "temperature"))
