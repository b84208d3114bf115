"""Returns and advantages of token-level rewards: discounted, n-step, TD(λ) and GAE, with holes in the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import _checks, whitening
from fastrl.dtypes import wide
from fastrl.lambda_returns import Decay, Steps, estimate


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
    decay = Decay(
        gamma=float(gamma),
        lam=_lambda("lam", lam, rewards),
        lam_returns=None if lam_returns is None else _lambda("lam_returns", lam_returns, rewards),
        carry_masked=bool(carry_masked),
    )
    advantages, returns = estimate(steps, decay, backend)
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
    return estimate(steps, Decay(float(gamma), 1.0, None, True), backend)[1]


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


def _checked(rewards: Tensor, values: Tensor | None, mask: Tensor | None, bootstrap: Tensor | None) -> Steps:
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
    dtype = wide(*(x.dtype for x in given))

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype)

    return Steps(rewards.detach().to(dtype), cast(values), keep, cast(bootstrap))


def _lambda(name: str, lam: float | Tensor, rewards: Tensor) -> float | Tensor:
    if not isinstance(lam, Tensor):
        _checks.fraction(name, lam)
        return float(lam)
    _checks.floating(name, lam)
    _checks.shape(name, lam, tuple(rewards.shape[:1]), "one λ per sequence (or pass a number)")
    _checks.same_device(name, lam, rewards.device, "rewards")
    return lam.detach()
