"""What was sampled: `Rollouts`, validated once, padded or packed; it becomes flat rows here and nowhere else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.correction import correct_batch
from fastrl.flat import Flat, segment_sum
from fastrl.reduction import denominator
from fastrl.rollout_checks import FLAGS, PER_TOKEN, check
from fastrl.spec import LossSpec


class _Place(NamedTuple):
    """Where a micro-batch stands in the batch it was split from."""

    first_sequence: int = 0
    rows: tuple[int, int] | None = None
    """Rows of dim 0 of the batch it was split from; None = it was not split."""
    token_advantages: bool | None = None
    """Whether advantages are one per token, remembered where the shape could no longer tell (N == S)."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Sampled sequences and what is known of them. Padded: per-token tensors (B, T). Packed: (N,) with `cu_seqlens`.

    `logits[..., t, :]` and `hidden[..., t, :]` score `token_ids[..., t]`: nothing is shifted here
    (`shift_for_next_token` does it for whole-sequence inputs).

    Args:
        token_ids: (B, T) or (N,) ints, the sampled tokens; anything may stand under a masked position, -100 included.
        mask: same shape, bool or 0/1, the tokens that count, any pattern; None = all.
        advantages: (B,), (B, 1) or (B, T); packed (S,) or (N,), read as (S,) when N == S. Or instead of them:
        rewards: (B,) or (S,) floats with `group_size` (consecutive sequences share a prompt) or `group_ids` (B,) ints;
            the group-normalised advantages are then computed inside the loss.
        old_logps: as token_ids, the policy that the ratio is against; None = on-policy: the ratio is exactly 1, its
            gradient alive.
        ref_logps: as token_ids, the reference policy; needed when `kl_coef != 0`, else only measured (`ref_kl`).
        rollout_logps: as token_ids, what the sampler reported; NaN = not scored. Read by the spec's `rollout`
            correction and `off_policy_threshold`, else only measured.
        rollout_weights: as token_ids, detached factors of the policy term that the trainer has computed itself, instead
            of a correction by the spec; 0 rejects (vespo takes them into its w instead). Where the loss is one number
            per sequence (gmpo, ratio level sequence_sum) they weigh each token's share of it.
        selected: as token_ids, bool or 0/1: the tokens that the spec's `top_entropy_quantile` keeps, if the caller has
            picked them over all micro-batches or ranks; None = picked within the call.
        cu_seqlens: (S + 1,) ints, 0 first and N last: the packed layout.
        row_counts: optional host ints (tokens that count, of them those that can carry a gradient); with them the
            hidden level never waits for the device (a sequence-level ratio still reads its lengths, once). Wrong counts
            turn the loss into NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and what to do.
    """

    token_ids: Tensor
    mask: Tensor | None = None
    advantages: Tensor | None = None
    rewards: Tensor | None = None
    group_size: int | None = None
    group_ids: Tensor | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    rollout_logps: Tensor | None = None
    rollout_weights: Tensor | None = None
    selected: Tensor | None = None
    cu_seqlens: Tensor | None = None
    row_counts: tuple[int, int] | None = None
    _place: _Place = field(default=_Place(), repr=False)
    flat: Flat = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "flat", self._flatten())

    @property
    def shape(self) -> torch.Size:
        """(B, T) or (N,)."""
        return self.token_ids.shape

    @property
    def num_sequences(self) -> int:
        """B or S."""
        return self.token_ids.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def token_slice(self) -> slice:
        """Rows of dim 0 of the split batch (sequences when padded, tokens when packed) that this micro-batch covers."""
        return slice(*self._place.rows) if self._place.rows else slice(None)

    def normalizer(self, spec: LossSpec) -> Tensor | None:
        """The denominator D of this batch under the spec's aggregation, 0-d; pass it with every micro-batch."""
        return denominator(self._corrected_flat(spec).counts, None, spec)

    def to(self, device: torch.device | str) -> Rollouts:
        """The same rollouts on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def corrected(self, spec: LossSpec) -> Rollouts:
        """These rollouts with the correction of `spec` that depends on the whole batch applied: its weights as
        `rollout_weights`, excluded tokens out of the mask.

        Split the result instead of the batch itself, and use it with `spec.replace(rollout=None)`: micro-batches then
        share the normalised weights and the second moment of all of them.

        Raises:
            ValueError: the spec has no such correction, or old_logps or rollout_logps are missing.
        """
        if spec.rollout is None or not spec.rollout.by_batch:
            expected = "a spec with normalize, second_moment or rejected_in_denominator=False"
            _checks.refuse("spec", expected, repr(spec.rollout), "other corrections need no whole batch")
        if self.rollout_weights is not None:
            _checks.refuse("rollout_weights", "None with a spec that computes them", self.rollout_weights)
        flat = self._corrected_flat(spec)
        mask = None if flat.mask is None else flat.mask.view(self.shape)
        weights = flat.policy_weights.view(self.shape)
        return dataclasses.replace(self, mask=mask, rollout_weights=weights, row_counts=None)

    def _corrected_flat(self, spec: LossSpec) -> Flat:
        """The flat rows after the correction of the whole batch, if the spec has one."""
        if spec.rollout is not None and spec.rollout.by_batch:
            for name in ("old_logps", "rollout_logps"):
                if getattr(self, name) is None:
                    _checks.refuse(name, "log-probs, to correct the whole batch from", "None", f"pass {name}")
        return correct_batch(self.flat, spec)

    def split(self, n: int) -> list[Rollouts]:
        """`n` micro-batches of consecutive sequences, as equal as possible.

        Rewards and groups stay those of the whole batch, so the advantages are the same as before the split. Give each
        call `normalizer=rollouts.normalizer(spec)` and the sum of losses and gradients is that of one call, except for
        what a spec takes from all tokens of a call: a correction of the whole batch (use `corrected` before the split),
        top_entropy_quantile (pass `selected`), clip_cov, kl_cov and entropy_aggregation, which are local to the
        micro-batch. Packed rollouts read `cu_seqlens` once on the host.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= max(self.num_sequences, 1):
            _checks.refuse("n", f"an int from 1 to the number of sequences, {self.num_sequences}", str(n))
        size, more = divmod(self.num_sequences, n)
        starts = [i * size + min(i, more) for i in range(n + 1)]
        ends = starts
        if self.cu_seqlens is not None:
            every = self.cu_seqlens.tolist()
            ends = [every[start] for start in starts]
        return [self._part(starts[i], starts[i + 1], ends[i], ends[i + 1]) for i in range(n)]

    def _part(self, first: int, last: int, start: int, stop: int) -> Rollouts:
        """Sequences first:last, which are rows start:stop of dim 0."""
        changes: dict[str, Any] = {name: getattr(self, name) for name in ("token_ids", *FLAGS, *PER_TOKEN)}
        changes = {name: value[start:stop] for name, value in changes.items() if value is not None}
        if self.advantages is not None:
            packed_tokens = self.cu_seqlens is not None and self._has_token_advantages()
            changes["advantages"] = self.advantages[start:stop] if packed_tokens else self.advantages[first:last]
        if self.cu_seqlens is not None:
            changes["cu_seqlens"] = self.cu_seqlens[first : last + 1] - start
        place = _Place(
            first_sequence=self._place.first_sequence + first,
            rows=(start, stop),
            token_advantages=self._has_token_advantages(),
        )
        return dataclasses.replace(self, **changes, row_counts=None, _place=place)

    def pack(self) -> tuple[Rollouts, Tensor]:
        """Padded to packed without the masked tokens: the packed rollouts, and (N,) rows to gather.

        Row i of the packed batch is row `rows[i]` of the flattened padded one, so
        `hidden.flatten(0, 1)[rows]` goes with it. Waits for the device once, to learn how many tokens count.
        """
        if self.cu_seqlens is not None:
            _checks.refuse("rollouts", "a padded batch", "a packed one", "it is packed already")
        rows = self.flat.valid().nonzero().squeeze(-1)
        picked: dict[str, Any] = {
            name: value.reshape(-1)[rows]
            for name in ("token_ids", *FLAGS, *PER_TOKEN)
            if (value := getattr(self, name)) is not None
        }
        if self.advantages is not None:
            values = self.advantages.reshape(-1)
            picked["advantages"] = values[rows] if self._has_token_advantages() else values
        ends = self.flat.lengths.long().cumsum(0)
        picked["cu_seqlens"] = torch.cat([ends.new_zeros(1), ends])
        place = self._place._replace(token_advantages=self._has_token_advantages())
        return dataclasses.replace(self, **picked, _place=place), rows

    def _flatten(self) -> Flat:
        ids = self.token_ids.reshape(-1).long()
        mask = None if self.mask is None else (self.mask.reshape(-1) != 0)
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        cu, sequence_ids = None, None
        if self.cu_seqlens is None:
            width = self.token_ids.shape[1]
            lengths = valid.view(self.token_ids.shape).sum(-1, dtype=torch.float32)
        else:
            width, cu = 0, self.cu_seqlens.long().contiguous()
            positions = torch.arange(ids.shape[0], device=ids.device)
            sequence_ids = torch.searchsorted(cu, positions, right=True).int() - 1
            sequence_ids = sequence_ids.clamp(0, max(self.num_sequences - 1, 0))
            lengths = segment_sum(valid.float(), sequence_ids.long(), self.num_sequences)
        tokens = lengths.sum()
        counts = torch.stack([tokens, (lengths > 0).sum().float(), torch.zeros_like(tokens)])
        if cu is not None:  # off the CPU, offsets that do not cover the tokens are only visible to the device
            counts = torch.where((cu[0] == 0) & (cu[-1] == ids.shape[0]), counts, torch.nan)
        return Flat(
            token_ids=ids.contiguous(),
            mask=None if mask is None else mask.contiguous(),
            advantages=_floats(self.advantages),
            rewards=_floats(self.rewards),
            group_ids=None if self.group_ids is None else self.group_ids.long().contiguous(),
            old_logps=_floats(self.old_logps),
            ref_logps=_floats(self.ref_logps),
            rollout_logps=_floats(self.rollout_logps),
            policy_weights=_floats(self.rollout_weights),
            selected=None if self.selected is None else (self.selected.reshape(-1) != 0).float().contiguous(),
            sequence_ids=sequence_ids,
            cu_seqlens=cu,
            lengths=lengths,
            counts=counts,
            width=width,
            group_size=self.group_size or 0,
            first_sequence=self._place.first_sequence,
            per_token_advantages=int(self._has_token_advantages()),
        )

    def _has_token_advantages(self) -> bool:
        """Whether the advantages are one per token; a packed batch with N == S has them per sequence."""
        if self._place.token_advantages is not None:
            return self._place.token_advantages
        if self.advantages is None or self.advantages.shape != self.token_ids.shape:
            return False
        return self.cu_seqlens is None or self.token_ids.shape[0] != self.num_sequences


def _floats(values: Tensor | None) -> Tensor | None:
    """Flat, detached, contiguous, in at least fp32."""
    if values is None:
        return None
    keep = values.dtype in _checks.WIDE_FLOATS
    return values.detach().reshape(-1).to(values.dtype if keep else torch.float32).contiguous()


def shift_for_next_token(
    scores: Tensor, token_ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Align whole-sequence inputs: position t of a causal model scores token t + 1.

    Args:
        scores: (B, T, V) logits or (B, T, H) hidden states.
        token_ids, mask: (B, T).

    Returns:
        scores[:, :-1], token_ids[:, 1:], mask[:, 1:]: views, nothing is copied.
    """
    _checks.tensor("scores", scores)
    if scores.ndim != 3:
        _checks.refuse("scores", "shape (B, T, V) or (B, T, H)", scores, "packed rows have no next token to shift to")
    _checks.integer("token_ids", token_ids)
    _checks.shape("token_ids", token_ids, tuple(scores.shape[:2]), "the first two dimensions of scores")
    if mask is not None:
        _checks.shape("mask", mask, tuple(token_ids.shape), "the shape of token_ids")
    return scores[:, :-1], token_ids[:, 1:], None if mask is None else mask[:, 1:]
