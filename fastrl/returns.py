"""Returns and advantages of token-level rewards: discounted, n-step, TD(λ) and GAE, with holes in the mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import _checks, whitening
from fastrl import backend as backends
from fastrl.reference import wide
from fastrl.scan import reverse_scan

_ELEMENTS = 2**19  # taken at once on the torch backend, so that the temporaries stay in the cache


class _Steps(NamedTuple):
    """The checked inputs, in one dtype and without gradient."""

    rewards: Tensor  # (B, T)
    values: Tensor | None  # (B, T); None = 0
    keep: Tensor | None  # (B, T) bool
    bootstrap: Tensor | None  # (B,); None = 0

    def part(self, rows: slice) -> _Steps:
        return _Steps(*(None if x is None else x[rows] for x in self))


class _Decay(NamedTuple):
    gamma: float
    lam: float | Tensor  # a tensor is (B,)
    lam_returns: float | Tensor | None  # None = as lam
    carry_masked: bool


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    lam_returns: float | Tensor | None = None,
    bootstrap: Tensor | None = None,
    carry_masked: bool = True,
    whiten: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: Aₜ = δₜ + γλ·Aₜ₊₁,  δₜ = rₜ + γ·Vₜ₊₁ − Vₜ, and returns Rₜ = Aₜ + Vₜ.

    A masked step is no step: "t + 1" is the next unmasked one (verl, NeMo-RL, AReaL). With `carry_masked=False` it is a
    step with reward 0 and value 0, discounted as any other: a hole ends what V says beyond it and costs a factor γλ per
    step (OpenRLHF; TRL's PPO with its padding set to 0). Without holes the two differ only by a bootstrap behind
    padding. The plain recursion that also reads rewards and values where the mask is 0 (slime, SkyRL, ROLL) is
    `mask=None`; mask its result.

    Args:
        rewards, values: (B, T) floats; gradients are not followed.
        mask: (B, T) bool or 0/1, the steps that count; None = all. Nothing is read where it is 0.
        gamma: γ in [0, 1].
        lam: λ in [0, 1], or (B,) one per sequence, e.g. `length_adaptive_lambda`.
        lam_returns: another λ for the returns (VAPO: 1 for the critic, `lam` below 1 for the policy).
        bootstrap: (B,) the value after the last step of a sequence that was cut off, 0 where it ended; None = 0. With
            `carry_masked=False` it stands after position T − 1, be that masked or not.
        whiten: whiten the advantages over the unmasked steps (`fastrl.whiten`); the returns come before that.
        backend: "auto", "triton" (one launch, a program per row) or "torch".

    Returns:
        (advantages, returns), (B, T) float32 (float64 for float64 inputs), 0 under the mask.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and what to do.

    Source: arXiv:1506.02438; VAPO: arXiv:2504.05118.
    """
    _checks.floating("values", values)
    steps = _checked(rewards, values, mask, bootstrap)
    _checks.fraction("gamma", gamma)
    decay = _Decay(
        gamma=float(gamma),
        lam=_lambda("lam", lam, rewards),
        lam_returns=None if lam_returns is None else _lambda("lam_returns", lam_returns, rewards),
        carry_masked=bool(carry_masked),
    )
    advantages, returns = _estimate(steps, decay, backend)
    if whiten:
        advantages = whitening.whiten(advantages, steps.keep)
    return advantages, returns


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rₜ = rₜ + γ·Rₜ₊₁ over the unmasked steps, from `bootstrap` on: `gae` with V = 0 and λ = 1.

    Arguments and errors as for `gae`. Returns (B, T) float32 (float64 for float64 rewards), 0 under the mask.
    """
    steps = _checked(rewards, None, mask, bootstrap)
    _checks.fraction("gamma", gamma)
    return _estimate(steps, _Decay(float(gamma), 1.0, None, True), backend)[1]


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    n: int,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Rₜ = Σ_{k<n} γᵏ·rₜ₊ₖ + γⁿ·Vₜ₊ₙ over the unmasked steps; sums that reach the end take `bootstrap` there.

    Arguments and errors as for `gae`; n is a positive int. Plain torch on every device, in O(log n) passes.
    Returns (B, T) float32 (float64 for float64 inputs), 0 under the mask.
    """
    _checks.floating("values", values)
    rewards, values, keep, bootstrap = _checked(rewards, values, mask, bootstrap)
    _checks.fraction("gamma", gamma)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        _checks.refuse("n", "a positive int, the number of rewards before the value", repr(n))
    rows, width = rewards.shape
    if keep is None:
        keep = torch.ones_like(rewards, dtype=torch.bool)
    # The unmasked steps move to the front, their end behind them; column T + 1 takes what does not count.
    place = torch.where(keep, keep.cumsum(1) - 1, width + 1)
    end = keep.sum(1, keepdim=True)
    after = rewards.new_zeros((rows, 1)) if bootstrap is None else bootstrap[:, None]

    def packed(x: Tensor) -> Tensor:
        dense = x.new_zeros((rows, width + 2)).scatter(1, place, torch.where(keep, x, 0))
        return dense.scatter(1, end, after)

    # A bootstrap is the last reward, and the value there for a sum that stops just before it.
    window = _windowed_sum(packed(rewards), n, gamma) + gamma**n * _ahead(packed(values), n)
    return torch.where(keep, window.gather(1, place), 0)


def _windowed_sum(x: Tensor, n: int, gamma: float) -> Tensor:
    """(B, W): Σ_{k<n} γᵏ·xₜ₊ₖ with 0 behind the end, by doubling over the binary digits of n."""
    total, covered = torch.zeros_like(x), 0
    power, length = x, 1
    n = min(n, x.shape[1])
    while True:
        if n & length:
            total = total + gamma**covered * _ahead(power, covered)
            covered += length
        if 2 * length > n:
            return total
        power = power + gamma**length * _ahead(power, length)
        length *= 2


def _ahead(x: Tensor, k: int) -> Tensor:
    """xₜ₊ₖ, 0 behind the end."""
    k = min(k, x.shape[1])
    return torch.nn.functional.pad(x[:, k:], (0, k))


def td_errors(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """δₜ = rₜ + γ·Vₜ₊₁ − Vₜ over the unmasked steps: the one-step return less the value; 0 under the mask.

    Arguments, result and errors as for `n_step_returns`.
    """
    returns = n_step_returns(rewards, values, n=1, gamma=gamma, mask=mask, bootstrap=bootstrap)
    errors = returns - values.detach().to(returns.dtype)
    return errors if mask is None else torch.where(mask != 0, errors, 0)


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ = 1 − 1/(α·length), not below 0: (B,) for `gae(lam=...)` from (B,) counts of valid tokens.

    Returns float32 (float64 for float64 lengths). Source: VAPO, arXiv:2504.05118, with α = 0.05.
    """
    _checks.tensor("lengths", lengths)
    _checks.number("alpha", alpha)
    return (1 - 1 / (alpha * lengths.to(wide(lengths.dtype)))).clamp_min(0)


def _checked(rewards: Tensor, values: Tensor | None, mask: Tensor | None, bootstrap: Tensor | None) -> _Steps:
    _checks.floating("rewards", rewards)
    if rewards.ndim != 2:
        _checks.refuse("rewards", "shape (B, T), one reward per token", rewards, "put a score on its last token")
    if values is not None:
        _checks.shape("values", values, tuple(rewards.shape), "the shape of rewards")
        _checks.same_device("values", values, rewards.device, "rewards")
    if bootstrap is not None:
        _checks.floating("bootstrap", bootstrap)
        _checks.shape("bootstrap", bootstrap, tuple(rewards.shape[:1]), "one value per sequence")
        _checks.same_device("bootstrap", bootstrap, rewards.device, "rewards")
    keep = _checks.keep(mask, rewards, "rewards")
    given = [x for x in (rewards, values, bootstrap) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype)

    return _Steps(rewards.detach().to(dtype), cast(values), keep, cast(bootstrap))


def _lambda(name: str, lam: float | Tensor, rewards: Tensor) -> float | Tensor:
    if not isinstance(lam, Tensor):
        _checks.fraction(name, lam)
        return float(lam)
    _checks.floating(name, lam)
    _checks.shape(name, lam, tuple(rewards.shape[:1]), "one λ per sequence (or pass a number)")
    _checks.same_device(name, lam, rewards.device, "rewards")
    return lam.detach()


def _estimate(steps: _Steps, decay: _Decay, backend: str) -> tuple[Tensor, Tensor]:
    """(advantages, returns); without values both are the returns."""
    if backends.of(steps.rewards, backend) == "torch":
        return _by_torch(steps, decay)
    import fastrl_kernels as kernels

    dense = _Steps(*(None if x is None else x.contiguous() for x in steps))
    return kernels.lambda_returns(*dense, **decay._asdict())


def _by_torch(steps: _Steps, decay: _Decay) -> tuple[Tensor, Tensor]:
    """A few rows at a time, so that their temporaries stay in the cache."""
    returns = torch.empty_like(steps.rewards, memory_format=torch.contiguous_format)
    advantages = returns if steps.values is None else torch.empty_like(returns)
    rows, width = returns.shape
    count = max(1, _ELEMENTS // max(width, 1))
    lam, lam_returns = (_per_row(x, returns) for x in (decay.lam, decay.lam_returns))
    for start in range(0, rows, count):
        some = slice(start, start + count)
        part, out = steps.part(some), returns[some]
        bits = None if part.keep is None else part.keep.to(_BITS[returns.dtype]).neg_()
        torch.add(part.rewards, _state(part, decay, lam[some], bits), out=out)
        if part.values is not None:
            _zero_masked_(torch.sub(out, part.values, out=advantages[some]), bits)
        if lam_returns is not None:
            torch.add(part.rewards, _state(part, decay, lam_returns[some], bits), out=out)
        _zero_masked_(out, bits)
    return advantages, returns


def _state(steps: _Steps, decay: _Decay, lam: Tensor, bits: Tensor | None) -> Tensor:
    """(B, T): cₜ₊₁ = γ·(Vₜ₊₁ + λ·Aₜ₊₁), so that Rₜ = rₜ + cₜ₊₁ and Aₜ = Rₜ − Vₜ.

    It follows one affine recursion, cₜ = γλ·cₜ₊₁ + γλ·rₜ + γ(1 − λ)·Vₜ, where two would be needed for Aₜ and for the
    value behind the masked steps.
    """
    rewards, values, _, bootstrap = steps
    factor = decay.gamma * lam
    term = rewards * factor[:, None]
    if values is not None:
        term.addcmul_(values, (decay.gamma - factor)[:, None])
    last = torch.zeros_like(lam) if bootstrap is None else decay.gamma * bootstrap
    return reverse_scan(factor, _zero_masked_(term, bits), last, bits if decay.carry_masked else None)


def _per_row(lam: float | Tensor | None, like: Tensor) -> Tensor | None:
    """(B,) from a number or a tensor."""
    if lam is None:
        return None
    return lam.to(like.dtype) if isinstance(lam, Tensor) else like.new_full(like.shape[:1], lam)


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _zero_masked_(x: Tensor, bits: Tensor | None) -> Tensor:
    """x with 0 where `bits` is 0, whatever stood there; elsewhere `bits` is all ones. On a CPU several times faster
    than where or masked_fill, which torch does not vectorise."""
    if bits is not None:
        x.view(bits.dtype).bitwise_and_(bits)
    return x
