"""One scored batch for every peer, and the comparison."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from common import ACCELERATOR, BACKENDS
from torch import Tensor

import fastrl

B, T = 6, 8
SEED = 591
LENGTHS = (8, 6, 5, 3, 1, 0)  # the last completion is empty


@dataclass(frozen=True)
class Batch:
    """float64 (B, T) tensors, finite everywhere: peers multiply by the mask. Every value is a float32 number."""

    logps: Tensor
    entropy: Tensor
    old: Tensor | None
    ref: Tensor
    rollout: Tensor
    completion: Tensor  # (B, T) int64 0/1: inside the completion
    tools: Tensor  # (B, T) int64 0/1: 0 = written by a tool
    advantages: Tensor  # (B,) or (B, T)

    @property
    def mask(self) -> Tensor:
        """(B, T) int64: what counts."""
        return self.completion * self.tools

    @property
    def token_advantages(self) -> Tensor:
        """(B, T)"""
        return self.advantages if self.advantages.ndim == 2 else self.advantages[:, None].expand(B, T)

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies to differentiate."""
        return self.logps.clone().requires_grad_(), self.entropy.clone().requires_grad_()


def make_batch(
    *,
    tools: bool = True,
    old: bool | str = True,
    empty: bool = True,
    token_advantages: bool = False,
    extreme: str | None = None,
    nan: bool = False,
) -> Batch:
    """`extreme`: some log-ratios to the "ratio"'s, "kl"'s or "rollout"'s other policy beyond ±20. `nan`: two tokens that the sampler did not score.
    `empty`: whether the last completion is. `old`: "policy" = the log-probs themselves, "rollout" = the sampler's."""
    g = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def below_zero(x: Tensor) -> Tensor:
        return x.clamp(max=-0.01)

    logps = below_zero(-1.2 * normal(B, T).abs())
    before = below_zero(logps + 0.5 * normal(B, T))
    ref = below_zero(logps + 0.7 * normal(B, T))
    rollout = below_zero(before + 0.4 * normal(B, T))
    entropy = 2 * torch.rand(B, T, generator=g)
    completion = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    if not empty:
        completion[-1, :2] = 1
    holes = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]]).repeat(B // 2, 1)
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.9, 2.0, 0.6])
    if token_advantages:
        advantages = normal(B, T)
    if extreme == "ratio":
        before[0, 2], before[1, 3], logps[0, 3], logps[1, 1] = -27.0, -25.0, -30.0, -26.0
    elif extreme == "kl":
        ref[0, 0], ref[1, 0], ref[2, 0], ref[2, 2] = -24.0, -29.0, logps[2, 0] + 5, logps[2, 2] - 13
        logps[0, 3], ref[0, 3] = -30.0, -4.0
        before[0, 3] = -30.2
    elif extreme == "rollout":
        rollout[0, 5], rollout[1, 5] = before[0, 5] - 23, before[1, 5] - 2
    if nan:
        rollout[0, 0] = rollout[1, 1] = torch.nan
    return Batch(
        logps=logps.double(),
        entropy=entropy.double(),
        old={False: None, "policy": logps.double(), "rollout": rollout.double()}.get(old, before.double()),
        ref=ref.double(),
        rollout=rollout.double(),
        completion=completion,
        tools=holes if tools else torch.ones_like(completion),
        advantages=advantages.double(),
    )


def everywhere(cases: dict[str, Case], in_interpreter: Callable[[str], bool] = lambda name: True):
    """Parameters (case, engine): every case in float64 and on every GPU, and some in Triton's slow interpreter."""
    return [
        pytest.param(case, *engine.values, id=f"{name}-{engine.id}", marks=engine.marks)
        for name, case in cases.items()
        for engine in BACKENDS
        if engine.id != "triton" or ACCELERATOR != "cpu" or in_interpreter(name)
    ]


@dataclass
class Result:
    """A loss and its derivatives by log-prob and entropy."""

    loss: Tensor
    dlogps: Tensor
    dentropy: Tensor

    @classmethod
    def of(cls, loss: Tensor, logps: Tensor, entropy: Tensor) -> Result:
        gradients = torch.autograd.grad(loss, (logps, entropy), allow_unused=True)
        filled = (torch.zeros_like(logps) if gradient is None else gradient for gradient in gradients)
        return cls(loss.detach(), *filled)

    def distance(self, other: Result) -> float:
        """The largest relative error of the three, each against its own largest entry (the loss, whose terms cancel,
        against that of the gradient if it is larger); infinite if any is NaN."""
        errors = []
        for name in ("loss", "dlogps", "dentropy"):
            mine, theirs = (getattr(x, name).detach().double().cpu() for x in (self, other))
            scale = max(theirs.abs().max().item(), 1e-3)
            if name == "loss":
                scale = max(scale, other.dlogps.abs().max().item())
            errors.append((mine - theirs).abs().max().item() / scale)
        return max(errors) if all(error == error for error in errors) else float("inf")


@dataclass(frozen=True)
class Case:
    """One configuration of a peer, and the `LossSpec` that says the same."""

    theirs: Callable[[Batch], Result]
    spec: dict[str, Any]
    normalizer: Callable[[Batch], float] | None = None
    batch: dict[str, Any] = field(default_factory=dict)
    sampler: bool = False
    """Whether the sampler's log-probs are given."""
    rtol: float = 1e-10

    def make_batch(self) -> Batch:
        return make_batch(**self.batch)

    @functools.cached_property
    def expected(self) -> Result:
        """The peer's result, computed once."""
        return self.theirs(self.make_batch())

    def check(self, engine: tuple[str, str]) -> None:
        """Assert that both agree, to rounding in the engine's dtype."""
        distance = self.ours(self.make_batch(), engine).distance(self.expected)
        bar = self.rtol if engine[0] == "torch" else max(self.rtol, 2e-5)
        assert distance <= bar, f"{distance:.3g}"

    def loss_spec(self) -> fastrl.LossSpec:
        options = dict(self.spec)
        if "rollout" in options:
            options["rollout"] = fastrl.RolloutCorrection(**options["rollout"])
        return fastrl.LossSpec(**options)

    def ours(self, batch: Batch, engine: tuple[str, str] = ("torch", "cpu"), spec: fastrl.LossSpec | None = None):
        """fastrl's result, in float64 on the torch backend and float32 on Triton, with garbage under the mask."""
        backend, device = engine
        spec = self.loss_spec() if spec is None else spec
        dtype = torch.float64 if backend == "torch" else torch.float32
        logps, entropy = (
            torch.where(batch.mask.bool(), x, torch.nan).to(device, dtype).requires_grad_()
            for x in (batch.logps, batch.entropy)
        )
        out = fastrl.policy_loss(
            logps,
            self.rollouts(batch, spec, dtype, torch.arange(B * T).view(B, T)).to(device),
            spec,
            entropy=entropy,
            normalizer=None if self.normalizer is None else self.normalizer(batch),
            backend=backend,
        )
        return Result.of(out.loss, logps, entropy)

    def rollouts(self, batch: Batch, spec: fastrl.LossSpec, dtype: torch.dtype, ids: Tensor) -> fastrl.Rollouts:
        """The batch with garbage under the mask, and without what this case does not use."""
        valid = batch.mask.bool()

        def put(x: Tensor, garbage: float) -> Tensor:
            return (torch.where(valid, x, garbage) if x.ndim == 2 else x).to(dtype)

        return fastrl.Rollouts(
            ids.masked_fill(~valid, -100),
            valid,
            put(batch.advantages, torch.inf),
            old_logps=None if batch.old is None else put(batch.old, torch.nan),
            ref_logps=put(batch.ref, -torch.inf) if spec.kl_coef else None,
            rollout_logps=put(batch.rollout, 1e30) if self.sampler else None,
        )
