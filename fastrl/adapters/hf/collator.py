"""Logged rollouts as batches for `transformers.Trainer`: padded, aligned, and counted as the loss is normalised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.advantages import group_advantages
from fastrl.presets import GRPO
from fastrl.reduction import SEQUENCES, weighting
from fastrl.spec import LossSpec

PER_TOKEN = ("old_logps", "ref_logps", "rollout_logps", "rollout_weights")
ROW_KEYS = ("prompt_ids", "completion_ids", "completion_mask", "advantages", "rewards", "group_ids", *PER_TOKEN)
_IGNORED = -100


class RolloutLabels(dict):
    """The `labels` of a batch: everything that the loss needs beside the model's outputs, as named tensors.

    `Trainer` hands nothing but `labels` to a `compute_loss_func`, and counts `num_items_in_batch` as
    `labels[..., 1:].ne(-100).sum()`, without the slice for a model whose loss does not shift. Both are answered here by
    a tensor that has one such entry per token that counts or per sequence with one, whichever the aggregation divides
    by, so that `num_items_in_batch` is the denominator of the loss.
    """

    @property
    def counted(self) -> str:
        """The name of what is counted, "tokens" or "sequences"."""
        return "sequences" if "counted_sequences" in self else "tokens"

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self._counted_entries()[key]

    def ne(self, value: int) -> Tensor:
        """Which entries are counted, when `value` is -100."""
        return self._counted_entries().ne(value)

    def count(self) -> Tensor:
        """How many tokens, or sequences, of this batch count."""
        return self.ne(_IGNORED).sum()

    def _counted_entries(self) -> Tensor:
        return super().__getitem__(f"counted_{self.counted}")


def counts_sequences(spec: LossSpec) -> bool:
    """Whether the spec's aggregation divides by sequences."""
    return weighting(spec).denominator == SEQUENCES


@dataclass(frozen=True, kw_only=True)
class RolloutCollator:
    """Rows of logged rollouts -> {"input_ids", "attention_mask", "labels"}, right-padded, (B, L).

    A row is a dict; every list beside the prompt is as long as completion_ids:
        prompt_ids: token ids, at least one; completion_ids: token ids.
        completion_mask: 0/1, the tokens that count; absent = all.
        advantages: a number, or one per completion token. Or instead, with `group_size`:
        rewards: a number, and group_ids: an int that the answers to one prompt share; the advantages are then computed
            inside the loss, so a batch must hold whole groups (`add_advantages` needs no such batches).
        old_logps, ref_logps, rollout_logps, rollout_weights: as in `fastrl.Rollouts`, one per completion token.

    The per-token tensors of `labels` are (B, L − 1): position t belongs to token t + 1, which `logits[:, t]` scores.

    Args:
        spec: the loss of the batches; its aggregation decides what `num_items_in_batch` counts.
        pad_token_id: any id of the vocabulary; nothing attends to it and nothing scores it.
        group_size: how many rows share a prompt, when and only when rows have rewards.
        pad_to_multiple_of: round L up to a multiple of it.

    Raises:
        ValueError: a key that is not in the list above, one that only some rows have, a length that differs, a group
            that is not whole.
    """

    spec: LossSpec = GRPO
    pad_token_id: int = 0
    group_size: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        keys = _common_keys(rows)
        for row in rows:
            _check_lengths(row, keys)
        width = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
        if self.pad_to_multiple_of is not None:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            start, end = _span(row)
            input_ids[i, :end] = torch.as_tensor([*row["prompt_ids"], *row["completion_ids"]], dtype=torch.long)
            attention_mask[i, :end] = 1
            mask[i, start:end] = torch.as_tensor(_mask_of(row), dtype=torch.bool)
        labels = RolloutLabels(token_ids=input_ids[:, 1:], mask=mask[:, 1:], **self._counted(mask))
        for name in PER_TOKEN:
            if name in keys:
                labels[name] = _spread(rows, name, width)
        labels.update(self._credit(rows, keys, width))
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _counted(self, mask: Tensor) -> dict[str, Tensor]:
        """The tensor that `Trainer` counts; its first column, which the Trainer may cut off, counts nothing."""
        if not counts_sequences(self.spec):
            return {"counted_tokens": torch.where(mask, 1, _IGNORED)}
        flags = torch.stack([torch.zeros(len(mask), dtype=torch.bool), mask.any(1)], 1)
        return {"counted_sequences": torch.where(flags, 1, _IGNORED)}

    def _credit(self, rows: Sequence[Mapping[str, Any]], keys: set[str], width: int) -> dict[str, Tensor]:
        """Advantages, or rewards with their groups."""
        if ("advantages" in keys) == ("rewards" in keys):
            came = "both" if "advantages" in keys else f"neither, but {', '.join(sorted(keys))}"
            remedy = (
                "remove one, or see add_advantages; Trainer itself drops columns unless remove_unused_columns=False"
            )
            _checks.refuse("rows", "either advantages or rewards", came, remedy)
        if "advantages" in keys:
            for name, value in (("group_ids", "group_ids" in keys), ("group_size", self.group_size is not None)):
                if value:
                    _checks.refuse(name, "none with given advantages", "some", "pass rewards, or leave it out")
            if all(_is_number(row["advantages"]) for row in rows):
                return {"advantages": torch.tensor([float(row["advantages"]) for row in rows])}
            return {"advantages": _spread(rows, "advantages", width)}
        remedy = "or compute advantages over the whole log: add_advantages(rows)"
        if "group_ids" not in keys or self.group_size is None:
            _checks.refuse("rewards", "group_ids in the rows and a group_size", "rewards without them", remedy)
        for group, count in Counter(row["group_ids"] for row in rows).items():
            if count != self.group_size:
                expected = f"whole groups of {self.group_size} rows in a batch"
                came = f"{count} rows of group {group!r}"
                _checks.refuse("group_ids", expected, came, f"keep groups together, {remedy}")
        return {
            "rewards": torch.tensor([float(row["rewards"]) for row in rows]),
            "group_ids": torch.tensor([int(row["group_ids"]) for row in rows]),
        }


def add_advantages(rows: Sequence[Mapping[str, Any]], spec: LossSpec = GRPO) -> list[dict[str, Any]]:
    """The rows with `advantages` in place of `rewards` and `group_ids`, by `fastrl.group_advantages` over all of them.

    Args:
        rows: each with a number `rewards` and any hashable `group_ids` that the answers to one prompt share.
        spec: whose advantage_baseline, advantage_scale and advantage_eps to use.
    """
    for name in ("rewards", "group_ids"):
        if any(row.get(name) is None for row in rows):
            _checks.refuse(name, "one in every row", "a row without it", "add_advantages needs both")
    places: dict[Any, int] = {}
    groups = [places.setdefault(row["group_ids"], len(places)) for row in rows]
    advantages = group_advantages(
        torch.tensor([float(row["rewards"]) for row in rows]),
        group_ids=torch.tensor(groups, dtype=torch.long),
        baseline=spec.advantage_baseline,
        scale=spec.advantage_scale,
        eps=spec.advantage_eps,
    )
    return [
        {key: value for key, value in row.items() if key not in ("rewards", "group_ids")} | {"advantages": advantage}
        for row, advantage in zip(rows, advantages.tolist(), strict=True)
    ]


def _common_keys(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys that all rows have; a value of None counts as absent."""
    given = [{key for key, value in row.items() if value is not None} for row in rows]
    if not given:
        _checks.refuse("rows", "at least one row", "none")
    every = set().union(*given)
    unknown = sorted(every - set(ROW_KEYS))
    if unknown:
        known = ", ".join(ROW_KEYS)
        _checks.refuse("rows", f"keys among {known}", f"{', '.join(map(repr, unknown))}", "rename or remove them")
    for name in ("prompt_ids", "completion_ids"):
        if name not in every:
            remedy = "set TrainingArguments(remove_unused_columns=False) if the dataset has it"
            _checks.refuse("rows", f"{name} in every row", f"only {', '.join(sorted(every))}", remedy)
    for name in sorted(every):
        without = sum(name not in keys for keys in given)
        if without:
            _checks.refuse("rows", f"{name} in every row or in none", f"{without} of {len(rows)} rows without it")
    return every


def _check_lengths(row: Mapping[str, Any], keys: set[str]) -> None:
    length = len(row["completion_ids"])
    if not len(row["prompt_ids"]):
        remedy = "start it with <bos>: no position would score the first completion token"
        _checks.refuse("prompt_ids", "at least one token", "none", remedy)
    for name in ("completion_mask", "advantages", *PER_TOKEN):
        if name not in keys or (name == "advantages" and _is_number(row[name])):
            continue
        if _is_number(row[name]) or len(row[name]) != length:
            came = "one number" if _is_number(row[name]) else f"{len(row[name])} values"
            _checks.refuse(name, f"{length} values, one per completion token", came, "leave the prompt out")
    if any(value not in (0, 1) for value in _mask_of(row)):
        _checks.refuse("completion_mask", "only 0 and 1", "other values", "use advantages to weigh tokens")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _span(row: Mapping[str, Any]) -> tuple[int, int]:
    """Where the completion stands in the sequence."""
    start = len(row["prompt_ids"])
    return start, start + len(row["completion_ids"])


def _mask_of(row: Mapping[str, Any]) -> Any:
    given = row.get("completion_mask")
    return [1] * len(row["completion_ids"]) if given is None else given


def _spread(rows: Sequence[Mapping[str, Any]], name: str, width: int) -> Tensor:
    """(B, L − 1) values of the completion tokens at the positions that score them, 0 elsewhere."""
    values = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        start, end = _span(row)
        values[i, start:end] = torch.as_tensor(row[name], dtype=torch.float32)
    return values[:, 1:]
