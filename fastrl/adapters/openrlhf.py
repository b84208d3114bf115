"""OpenRLHF 0.11.2: `PolicyLoss`, `ValueLoss`, `PairWiseLoss` and `LogExpLoss` with its signatures, values and outputs.

    from fastrl.adapters.openrlhf import PolicyLoss     # instead of: from openrlhf.models import PolicyLoss
    trainer.actor_loss_fn = PolicyLoss(...)             # or on a trainer that is there already
    fastrl.adapters.openrlhf.install()                  # or wherever OpenRLHF builds one, until restore()

It maps the constructor's options to a `LossSpec` and the arguments of forward to `Rollouts`; it holds no math. An
option that is unknown or without a meaning raises at construction.
"""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastrl import _checks
from fastrl.adapters._measures import dropped, token_mean
from fastrl.adapters._spec import lower_bound, named_spec
from fastrl.adapters._versions import warn_outside
from fastrl.critic import value_loss
from fastrl.dtypes import wide
from fastrl.functional import policy_loss
from fastrl.options import Aggregation
from fastrl.reward_model import reward_model_loss
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec

TESTED = ("0.11.2", "0.12")
"""Before it the actor builds its loss with another argument, and unpacks four values of it."""

_CHOICES = {
    "policy_loss_type": ("ppo", "gspo"),
    "is_correction_level": ("off", "token", "seq"),
    "is_correction_mode": ("mask", "clip"),
    "is_correction_gating": ("ratio", "binary_kl", "tv"),
}
_NAMES = {
    "epsilon_low": "clip_eps_low",
    "epsilon_high": "clip_eps_high",
    "rollout.lower": "is_correction_threshold",
    "rollout.upper": "is_correction_threshold",
    "rollout.mode": "is_correction_threshold",
    "rollout.reject": "is_correction_threshold",
    "rollout.reject_lower": "is_correction_threshold",
    "rollout.reject_upper": "is_correction_threshold",
}


class PolicyLoss(nn.Module):
    """OpenRLHF's `PolicyLoss`: same constructor, attributes, forward and 5-tuple.

    Raises at construction:
        ValueError, TypeError: an option that is unknown or has no meaning, by OpenRLHF's name.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Any = (0.5, 5.0),
    ) -> None:
        super().__init__()
        warn_outside("openrlhf", *TESTED)
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold
        self.spec()

    def spec(self) -> LossSpec:
        """The `LossSpec` of the attributes as they are now; the one mapping of this class."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                _checks.refuse(name, f"one of {', '.join(map(repr, choices))}", repr(getattr(self, name)))
        gspo = self.policy_loss_type == "gspo"
        by_token = self.token_level_loss and not gspo
        return named_spec(
            _NAMES,
            ratio_level="sequence" if gspo else "token",
            epsilon_low=lower_bound(self.clip_eps_low),
            epsilon_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            log_ratio_clamp=None if gspo else 20.0,
            aggregation=Aggregation.TOKEN_MEAN if by_token else Aggregation.SEQ_MEAN_TOKEN_MEAN,
            rollout=self._correction(),
        )

    def _correction(self) -> dict[str, Any] | None:
        """The gate as the fields of a `RolloutCorrection`; None = off, and with gspo, which takes its ratio against
        the sampler instead."""
        by_ratio, by_sequence = self.is_correction_gating == "ratio", self.is_correction_level == "seq"
        if self.is_correction_mode == "clip" and (by_sequence or not by_ratio):
            remedy = "only the ratio of a token is a weight that can be held: level 'token' and gating 'ratio'"
            _checks.refuse("is_correction_mode", "'mask' with this level and gating", "'clip'", remedy)
        if self.is_correction_level == "off":
            return None
        low, high = self._threshold(by_ratio)
        if self.policy_loss_type == "gspo":
            return None
        if high is None and (low is None or low <= 0):  # neither a ratio nor a divergence is below 0
            return {"level": "token"}
        level = "sequence-mean" if by_sequence else "token"
        if not by_ratio:
            reject = {"reject": self.is_correction_gating, "reject_lower": low, "reject_upper": high}
            return {"level": "token", "reject_level": level, **reject}
        positive = low if low is not None and low > 0 else None  # a ratio is never below 0
        if by_sequence:  # of the geometric mean of the ratio: bounds on −log of it
            lower, upper = (None if x is None else -math.log(x) for x in (high, positive))
            return {
                "level": "token",
                "reject": "k1",
                "reject_level": level,
                "reject_lower": lower,
                "reject_upper": upper,
            }
        mode = "mask" if self.is_correction_mode == "mask" else "truncate"
        return {"level": "token", "mode": mode, "lower": positive, "upper": high}

    def _threshold(self, by_ratio: bool) -> tuple[float | None, float | None]:
        """(low, high); None = no bound, where infinity stands."""
        given = self.is_correction_threshold
        if not hasattr(given, "__len__") or len(given) != 2 or not all(isinstance(x, int | float) for x in given):
            _checks.refuse("is_correction_threshold", "two numbers, (low, high)", repr(given))
        low, high = (None if math.isinf(x) else float(x) for x in given)
        if by_ratio and high is not None and high <= 0:
            _checks.refuse("is_correction_threshold", "high above 0, as a ratio is", repr(given))
        if not by_ratio and low is not None and low > 0:
            expected = f"an upper bound only with gating {self.is_correction_gating!r}, (0.0, high)"
            _checks.refuse("is_correction_threshold", expected, repr(given))
        return low, high

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The loss, and what OpenRLHF logs.

        Args:
            log_probs, old_log_probs, advantages: (B, T).
            action_mask: (B, T) bool or 0/1; None = all. Nothing is read where it is 0.
            rollout_log_probs: (B, T), what the sampler reported; needed with a correction.
            dp_size, batch_num_tokens, global_batch_size: the normaliser, as OpenRLHF's `aggregate_loss` takes it.

        Returns:
            (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio), 0-d; the last two are None without a correction, and
            with gspo. All but the loss are detached.
        """
        spec, gated = self.spec(), self.is_correction_level != "off"
        if gated:
            _checks.tensor("rollout_log_probs", rollout_log_probs, "is_correction_level needs the sampler's log-probs")
        keep = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask != 0
        gspo = self.policy_loss_type == "gspo"
        rollouts = Rollouts(
            keep.int(),
            keep,
            advantages.detach(),
            old_logps=(rollout_log_probs if gspo and gated else old_log_probs).detach(),
            rollout_logps=rollout_log_probs.detach() if gated and not gspo else None,
        )
        normalizer = _normalizer(self.token_level_loss and not gspo, dp_size, batch_num_tokens, global_batch_size)
        out = policy_loss(log_probs, rollouts, spec, normalizer=normalizer)
        kl = token_mean((old_log_probs - log_probs).detach(), keep) if gspo else out.metrics["approx_kl"]
        if not gated or gspo:
            return out.loss, out.metrics["clip_fraction"], kl, None, None
        vllm_kl = token_mean((rollout_log_probs - old_log_probs).detach(), keep)
        return out.loss, out.metrics["clip_fraction"], kl, vllm_kl, self._filtered(spec, old_log_probs, rollouts, keep)

    def _filtered(self, spec: LossSpec, old: Tensor, rollouts: Rollouts, keep: Tensor) -> Tensor:
        """The fraction outside the band: of tokens, or of sequences, an empty one counting as outside."""
        outside = dropped(old.to(wide(old.dtype)), rollouts.rollout_logps.to(wide(old.dtype)), keep, spec)
        if self.is_correction_level == "token":
            return token_mean(outside.float(), keep)
        return 1 - (keep & ~outside).any(-1).float().mean()


class ValueLoss(nn.Module):
    """OpenRLHF's `ValueLoss`: 0.5·max of the clipped and the unclipped squared error; `clip_eps` None = unclipped."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        warn_outside("openrlhf", *TESTED)
        if clip_eps is not None:
            _checks.number("clip_eps", clip_eps)
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """0-d loss; arguments as in `PolicyLoss.forward`; old_values is read only where `clip_eps` is set."""
        return value_loss(
            values,
            returns.detach(),
            old_values=None if self.clip_eps is None else old_values.detach(),
            clip=self.clip_eps,
            mask=action_mask,
            aggregation=str(Aggregation.TOKEN_MEAN if self.token_level_loss else Aggregation.SEQ_MEAN_TOKEN_MEAN),
            normalizer=_normalizer(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        )


class PairWiseLoss(nn.Module):
    """OpenRLHF's `PairWiseLoss`: mean(−log σ(chosen − rejected − margin))."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """0-d loss of rewards of any one shape; margin: a number or a tensor of that shape."""
        if isinstance(margin, Tensor):
            margin = margin.detach().expand(chosen_reward.shape).reshape(-1)
        return reward_model_loss(chosen_reward.reshape(-1), reject_reward.reshape(-1), margin=margin)


class LogExpLoss(nn.Module):
    """OpenRLHF's `LogExpLoss`: mean(log(1 + exp(rejected − chosen))), without its overflow. It takes no margin."""

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """0-d loss of rewards of any one shape.

        Raises:
            ValueError: a margin, which OpenRLHF's own does not read.
        """
        if margin is not None:
            _checks.refuse("margin", "None, as LogExpLoss has no margin", margin, "use PairWiseLoss (loss 'sigmoid')")
        return reward_model_loss(chosen_reward.reshape(-1), reject_reward.reshape(-1))


def _normalizer(by_token: bool, ranks: int, tokens: Any, sequences: Any) -> Any:
    """OpenRLHF's global count, per rank; None = the local one, and then whatever dp_size is."""
    count = tokens if by_token else sequences
    return None if count is None else count / ranks


_CLASSES = (PolicyLoss, ValueLoss, PairWiseLoss, LogExpLoss)
_USERS = ("openrlhf.trainer.ray.ppo_actor", "openrlhf.trainer.ray.ppo_critic", "openrlhf.trainer.rm_trainer")
_replaced: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Put these classes in the place of OpenRLHF's own, in this process, until `restore()`.

    `openrlhf.models` is changed, and those of its trainers that are imported already; trainers that were built before
    keep their loss. Every worker process needs the call. A second call changes nothing.

    Raises:
        ModuleNotFoundError: OpenRLHF is not installed.
    """
    warn_outside("openrlhf", *TESTED)
    try:
        models = importlib.import_module("openrlhf.models")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("openrlhf"):
            raise
        span = "openrlhf>={},<{}".format(*TESTED)
        message = f"fastrl.adapters.openrlhf: OpenRLHF is not installed; pip install '{span}'"
        raise ModuleNotFoundError(message, name="openrlhf") from error
    users = [sys.modules[name] for name in _USERS if name in sys.modules]
    for module in (models, importlib.import_module("openrlhf.models.loss"), *users):
        for ours in _CLASSES:
            theirs = getattr(module, ours.__name__, None)
            if theirs is not None and theirs is not ours:
                _replaced.append((module, ours.__name__, theirs))
                setattr(module, ours.__name__, ours)


def restore() -> None:
    """Put back whatever `install` replaced; nothing happens where nothing was."""
    while _replaced:
        module, name, theirs = _replaced.pop()
        setattr(module, name, theirs)
