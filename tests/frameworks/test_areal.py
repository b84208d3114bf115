"""AReaL's actor losses against transcriptions, on packed 1-D batches whose log-probs are those of the next token."""

from __future__ import annotations

import functools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from frameworks.batches import assert_same, scored, sequence_mean

from fastrl.adapters.areal import grpo_loss_fn


def packed(b, prompts=(2, 1, 3, 1)):
    """AReaL's batch: prompt and answer end to end, everything rolled by −1, so that the last place of each sequence and
    all but one of its prompt hold nothing that counts."""
    parts = {"loss_mask": b.mask, "advantages": b.advantages, "logprobs": b.rollout, "prox_logp": b.old, "x": b.logps}
    out = {name: [] for name in parts}
    ends = [0]
    for i, prompt in enumerate(prompts):
        for name, value in parts.items():
            row = torch.full((prompt + 7,), 0.0 if name in ("loss_mask", "advantages") else -3.0, dtype=torch.float64)
            row[prompt - 1 : prompt + 6] = value[i].double()
            out[name].append(row)
        ends.append(ends[-1] + prompt + 7)
    data = {name: torch.cat(rows) for name, rows in out.items()}
    logps = data.pop("x")
    return {**data, "cu_seqlens": torch.tensor(ends, dtype=torch.int32), "input_ids": torch.zeros(ends[-1])}, logps


def per_sequence(values, mask, cu):
    """(N,) mean over each sequence's tokens that count."""
    rows = [
        sequence_mean(v[None], m[None])[0].expand(len(v))
        for v, m in zip(_parts(values, cu), _parts(mask, cu), strict=True)
    ]
    return torch.cat(rows)


def _parts(values, cu):
    return values.split((cu[1:] - cu[:-1]).tolist())


def transcribed(x, data, **a):
    """AReaL 1.0.4: M2PO mask, rejection sampling, ratio, clip, dual clip, weight; mean over the tokens before
    rejection."""
    cu, mask, adv = data["cu_seqlens"], data["loss_mask"].bool(), data["advantages"]
    behave, prox = data["logprobs"], data["prox_logp"]
    if a.get("prox_logp_method") == "reuse_train_logp":
        prox = x.detach()
    if a.get("m2_threshold") is not None:
        mask = m2po(prox, behave, mask, a["m2_threshold"])
    count = mask.sum()
    weight = torch.ones_like(x)
    if a.get("rejection_sampling") is not None:
        weight, mask = rejection(prox, behave, mask, cu, a["rejection_sampling"])
    by_sequence = a.get("importance_sampling_level") == "sequence"
    sapo = a.get("use_sapo_loss")
    d = x - (behave if sapo else prox)
    if by_sequence:
        d, adv = per_sequence(d, mask, cu), per_sequence(adv, mask, cu)
    ratio = torch.where(mask, d, 0.0).exp()
    if sapo:
        tau = torch.where(adv > 0, a.get("sapo_tau_pos", 1.0), torch.full_like(adv, a.get("sapo_tau_neg", 1.05)))
        loss = -adv * 4 / tau * torch.sigmoid(tau * (ratio - 1))
    else:
        low, high = a.get("eps_clip", 0.2), a.get("eps_clip_higher") or a.get("eps_clip", 0.2)
        loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - low, 1 + high))
        if a.get("c_clip") is not None:
            loss = torch.minimum(loss, adv.sign() * a["c_clip"] * adv)
    return torch.where(mask, loss * weight, 0.0).sum() / count


def m2po(prox, behave, mask, threshold):
    """Drop the largest squared log-ratios until the mean of the rest is below the threshold; one token stays."""
    square = (behave - prox) ** 2
    order = torch.where(mask, square, -1.0).argsort(descending=True)[: int(mask.sum())]
    for dropped in range(len(order)):
        if square[order[dropped:]].mean() < threshold or dropped == len(order) - 1:
            kept = torch.zeros_like(mask)
            kept[order[dropped:]] = True
            return kept


def rejection(prox, behave, mask, cu, r):
    d = prox - behave
    r = {"level": "token", "action": "mask", "metric": "ratio", "agg": "mean", "upper": 5.0, "lower": None, **r}
    low = -torch.inf if r["lower"] is None else r["lower"]
    values = {"ratio": d, "kl_k1": d, "kl_k2": d**2 / 2}[r["metric"]]
    weight = d.exp()
    if r["level"] == "sequence":
        counts = per_sequence(torch.ones_like(d), mask, cu) * torch.cat(
            [m.sum().expand(len(m)) for m in _parts(mask, cu)]
        )
        if r["metric"] == "ratio":
            weight = per_sequence(d, mask, cu).exp()
        mean = per_sequence(values, mask, cu)
        top = torch.cat(
            [
                torch.where(m, v, -torch.inf).amax().expand(len(v))
                for v, m in zip(_parts(values, cu), _parts(mask, cu), strict=True)
            ]
        )
        values = {"mean": mean, "sum": mean * counts, "max": top}[r["agg"]]
    if r["metric"] == "ratio":
        values = values.exp()
    inside = (values >= low) & (values <= r["upper"])
    if r["action"] == "mask":
        return torch.where(mask & inside, weight, 0.0), mask & inside
    return weight.clamp(max(low, 0.0), r["upper"]), mask


GSPO = {"importance_sampling_level": "sequence", "eps_clip": 0.03}


def rs(**fields):
    return {"rejection_sampling": fields, "use_decoupled_loss": True}


CASES = {
    "ppo": {},
    "clip-higher": {"eps_clip": 0.1, "eps_clip_higher": 0.4},
    "dual-clip": {"c_clip": 1.3},
    "gspo": GSPO,
    "gspo-dual": {**GSPO, "c_clip": 1.01},
    "sapo": {"use_sapo_loss": True, "sapo_tau_pos": 1.5},
    "sapo-sequence": {"use_sapo_loss": True, "importance_sampling_level": "sequence"},
    "on-policy": {"prox_logp_method": "reuse_train_logp"},
    "m2po": {"m2_threshold": 0.01},
    "m2po-gspo": {**GSPO, "m2_threshold": 0.01},
    "mask": rs(lower=0.9, upper=1.2),
    "mask-upper": rs(upper=1.1),
    "clamp": rs(action="clamp", lower=0.9, upper=1.1),
    "sequence-mask": rs(level="sequence", lower=0.95, upper=1.2),
    "sequence-clamp": rs(level="sequence", action="clamp", lower=0.95, upper=1.01),
    "sequence-sum": rs(level="sequence", agg="sum", lower=0.6, upper=1.2),
    "k1": rs(metric="kl_k1", lower=-0.1, upper=0.2),
    "k1-sequence": rs(metric="kl_k1", level="sequence", agg="sum", lower=-0.5, upper=0.2),
    "k2": rs(metric="kl_k2", upper=0.01),
    "k2-max": rs(metric="kl_k2", level="sequence", agg="max", upper=0.06),
    "gspo-sequence-mask": {**GSPO, **rs(level="sequence", lower=0.7, upper=1.05)},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient(name):
    arguments = CASES[name]
    data, logps = packed(scored(seed=1))
    entropy = torch.ones_like(logps)
    theirs = {**arguments, "rejection_sampling": arguments.get("rejection_sampling")}
    assert_same(
        lambda x: grpo_loss_fn(x, entropy, data, current_version=3, **arguments),
        lambda x: transcribed(x, data, **theirs),
        logps,
    )


def test_a_padded_batch():
    b = scored(seed=1)
    data = {"loss_mask": b.mask, "advantages": b.advantages, "logprobs": b.rollout, "prox_logp": b.old}
    rows, logps = packed(b)
    whole = grpo_loss_fn(b.logps, b.logps, data, **GSPO)
    torch.testing.assert_close(whole, grpo_loss_fn(logps, logps, rows, **GSPO), rtol=1e-9, atol=0)


def test_the_engines_weights_make_unequal_micro_batches_add_up():
    """AReaL weighs each micro-batch's mean by its loss_mask.count_nonzero(): together, the mean over all tokens."""
    b = scored(seed=1)
    whole, _ = packed(b)
    rows = [slice(0, 1), slice(1, 4)]
    parts = [packed(b.rows(s), prompts)[0] for s, prompts in zip(rows, ((2,), (1, 3, 1)), strict=True)]
    weights = [part["loss_mask"].count_nonzero() for part in parts]
    assert weights[0] != weights[1]
    step = functools.partial(grpo_loss_fn, eps_clip=0.2, eps_clip_higher=None, c_clip=None)
    _, logps = packed(b)
    cut = int(whole["cu_seqlens"][1])

    def split(x):
        means = [step(x[:cut], x[:cut], parts[0]), step(x[cut:], x[cut:], parts[1])]
        return sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)

    assert_same(split, lambda x: transcribed(x, whole), logps)


def test_metrics_go_to_areals_tracker(monkeypatch):
    seen = {}
    module = ModuleType("stats_tracker")
    module.scalar = lambda **values: seen.update(values)
    monkeypatch.setitem(sys.modules, "areal.utils.stats_tracker", module)
    data, logps = packed(scored())
    grpo_loss_fn(logps, logps, data)
    assert seen["fastrl/tokens"] == int(data["loss_mask"].sum()) and 0 < seen["fastrl/clip_fraction"] < 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"use_cispo_loss": True}, "use_cispo_loss"),
        ({"behave_imp_weight_cap": 5.0}, "behave_imp_weight_cap"),
        ({"trust_region": 1}, "trust_region"),
        ({"prox_logp_method": "loglinear"}, "prox_logp_method"),
        ({"importance_sampling_level": "segment"}, "importance_sampling_level"),
        ({"use_sapo_loss": True, "use_decoupled_loss": True}, "use_decoupled_loss"),
        (rs(metric="kl_k3", upper=1.0), "rejection_sampling.metric"),
        (rs(level="sequence", agg="max"), "rejection_sampling.agg"),
        (rs(level="sequence", agg="sum", action="clamp"), "rejection_sampling.action"),
        (rs(level="step"), "rejection_sampling.level"),
        (rs(veto=1), "veto"),
        ({**GSPO, **rs(upper=2.0)}, "rejection_sampling.level"),
        ({**rs(upper=2.0), "m2_threshold": 0.04}, "m2_threshold"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(arguments, named):
    data, logps = packed(scored())
    with pytest.raises(ValueError, match=f"^{named}: "):
        grpo_loss_fn(logps, logps, data, **arguments)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher_logp": torch.zeros(3)}, "teacher_logp"),
        ({"episode_loss_weights": torch.zeros(3)}, "episode_loss_weights"),
        ({"prox_logp": None}, "prox_logp"),
    ],
)
def test_refused_input(change, named):
    data, logps = packed(scored())
    with pytest.raises(ValueError, match=f"^{named}: "):
        grpo_loss_fn(logps, logps, data | change)


def test_reads_areals_config_object():
    """`RejectionSamplingConfig` is a dataclass in AReaL."""
    data, logps = packed(scored(seed=1))
    fields = {"level": "token", "action": "mask", "metric": "ratio", "agg": "mean", "upper": 1.1, "lower": None}
    with_object = grpo_loss_fn(logps, logps, data, rejection_sampling=SimpleNamespace(**fields))
    torch.testing.assert_close(with_object, grpo_loss_fn(logps, logps, data, **rs(upper=1.1)))
