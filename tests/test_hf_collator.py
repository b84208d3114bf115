"""The collator for logged rollouts: where every value goes, what is counted, and what is refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers 5.23")

import fastrl
from fastrl.adapters.hf import RolloutCollator, RolloutLabels, add_advantages

pytestmark = pytest.mark.filterwarnings("ignore")


def row(**changes):
    given = {
        "prompt_ids": [5, 6],
        "completion_ids": [7, 8, 9],
        "completion_mask": [1, 0, 1],
        "advantages": 0.5,
        "old_logps": [-1.0, -2.0, -3.0],
    }
    return {key: value for key, value in (given | changes).items() if value != "absent"}


SHORT = row(prompt_ids=[4], completion_ids=[3], completion_mask=[1], advantages=-1.0, old_logps=[-4.0])


def test_every_value_stands_where_the_logits_score_it():
    batch = RolloutCollator(pad_token_id=0)([row(), SHORT])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    labels = batch["labels"]
    assert torch.equal(labels["token_ids"], batch["input_ids"][:, 1:])
    assert labels["mask"].tolist() == [[False, True, False, True], [True, False, False, False]]
    assert labels["old_logps"].tolist() == [[0, -1, -2, -3], [-4, 0, 0, 0]]
    assert labels["advantages"].tolist() == [0.5, -1.0]
    assert set(labels) == {"token_ids", "mask", "old_logps", "advantages", "counted_sequences"}


def test_token_advantages_tensors_and_padding():
    rows = [row(advantages=[1.0, 2.0, 3.0], prompt_ids=torch.tensor([5, 6])), SHORT | {"advantages": [4.0]}]
    batch = RolloutCollator(pad_token_id=2, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].shape == (2, 8) and batch["input_ids"][1].tolist() == [4, 3, 2, 2, 2, 2, 2, 2]
    assert batch["labels"]["advantages"].tolist() == [[0, 1, 2, 3, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0]]
    assert RolloutCollator()([row(completion_mask=None)])["labels"]["mask"].tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(("spec", "count"), [(fastrl.DAPO, 3), (fastrl.GRPO, 2), (fastrl.CISPO, 3)])
@pytest.mark.parametrize("shifts", [True, False])
def test_what_the_trainer_counts_is_the_denominator(spec, count, shifts):
    """With `labels[..., 1:]` or without the slice; an empty row is no sequence."""
    empty = SHORT | {"completion_mask": [0]}
    labels = RolloutCollator(spec=spec)([row(), SHORT, empty])["labels"]
    counted = (labels[..., 1:] if shifts else labels).ne(-100).sum()
    assert counted == count == labels.count()
    given = {name: value for name, value in labels.items() if not name.startswith("counted_")}
    assert fastrl.Rollouts(**given).normalizer(spec) == count


def test_labels_survive_what_loaders_do_to_them():
    labels = RolloutCollator()([row()])["labels"]
    rebuilt = type(labels)({name: value.clone() for name, value in labels.items()})
    for other in (rebuilt, copy.copy(labels), pickle.loads(pickle.dumps(labels))):
        assert isinstance(other, RolloutLabels) and other.count() == 1 and other.counted == "sequences"


def test_rewards_of_whole_groups():
    rows = [
        row(advantages="absent", rewards=float(i % 3), group_ids=i // 2, prompt_ids=[5, i], old_logps=[-1.0, -1.0, i])
        for i in range(4)
    ]
    labels = RolloutCollator(group_size=2)(rows)["labels"]
    assert labels["rewards"].tolist() == [0, 1, 2, 0] and labels["group_ids"].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="^group_ids: expected whole groups of 2 rows .* 1 rows of group 1.*add_adv"):
        RolloutCollator(group_size=2)(rows[:3])
    with pytest.raises(ValueError, match="^rewards: expected group_ids in the rows and a group_size"):
        RolloutCollator()(rows)


def test_advantages_over_the_whole_log():
    rows = [row(advantages="absent", rewards=float(i), group_ids="ab"[i % 2]) for i in range(6)]
    for spec in (fastrl.GRPO, fastrl.RLOO):
        with_advantages = add_advantages(rows, spec)
        want = fastrl.group_advantages(
            torch.arange(6.0), group_ids=torch.tensor([0, 1] * 3), baseline=spec.advantage_baseline,
            scale=spec.advantage_scale, eps=spec.advantage_eps,
        )  # fmt: skip
        assert [r["advantages"] for r in with_advantages] == want.tolist()
    assert set(with_advantages[0]) == set(row())
    with pytest.raises(ValueError, match="^group_ids: "):
        add_advantages([*rows, row(rewards=1.0)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(temperature=0.7)], "^rows: expected keys among .* got 'temperature'"),
        ([row(ref_logp=[0.0] * 3)], "^rows: .*'ref_logp'"),
        ([row(), SHORT | {"ref_logps": [0.0]}], "^rows: expected ref_logps in every row or in none"),
        ([row(completion_ids="absent")], "^rows: expected completion_ids in every row.*remove_unused_columns"),
        ([row(advantages="absent")], "^rows: expected either advantages or rewards, got neither"),
        ([row(rewards=1.0)], "^rows: expected either advantages or rewards, got both"),
        ([row(group_ids=1)], "^group_ids: "),
        ([row(prompt_ids=[])], "^prompt_ids: expected at least one token"),
        ([row(old_logps=[0.0] * 5)], "^old_logps: expected 3 values, one per completion token, got 5 values"),
        ([row(old_logps=-1.0)], "^old_logps: expected 3 values"),
        ([row(advantages=[0.0] * 2)], "^advantages: expected 3 values"),
        ([row(completion_mask=[1, 2, 1])], "^completion_mask: expected only 0 and 1"),
        ([], "^rows: expected at least one row"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(rows, message):
    with pytest.raises(ValueError, match=message):
        RolloutCollator()(rows)


def test_group_size_without_rewards_is_refused():
    with pytest.raises(ValueError, match="^group_size: "):
        RolloutCollator(group_size=2)([row()])
