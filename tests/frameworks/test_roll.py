"""ROLL's actor loss against a transcription, on its full-width batches and its counts of the whole step."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from frameworks.batches import assert_same, scored, sequence_mean

from fastrl.adapters import roll


class Strategy:
    """What ROLL's strategy does for the loss; here the "logits" are the log-probs and entropies themselves."""

    def op_compute_log_probs(self, logits, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape == (logits[0].shape[0], 8)
        return logits[0]

    def op_compute_entropy(self, logits, attention_mask):
        return logits[1]


class Worker:
    """The part of ROLL's ActorWorker that `loss_func` uses."""

    def __init__(self, pipeline, worker=None):
        self.pipeline_config = SimpleNamespace(rollout_batch_size=8, init_kl_coef=0.0, **pipeline)
        self.worker_config = SimpleNamespace(infer_batch_size=2, **(worker or {}))
        self.strategy = Strategy()

    def get_old_log_probs_with_cache(self, data, log_probs):
        return data.batch["old_log_probs"] if "old_log_probs" in data.batch else log_probs.detach()

    loss_func = roll.loss_func


def data_of(b, counts=(29, 6), **more):
    first = torch.zeros(len(b.mask), 1)
    batch = {
        "input_ids": torch.zeros(len(b.mask), 8, dtype=torch.long),
        "response_mask": torch.cat([first, b.mask], 1).long(),
        "old_log_probs": b.old,
        "infer_logprobs": b.rollout,
        "ref_log_probs": b.ref,
        "advantages": torch.where(b.mask, b.advantages, 0.0),
        **more,
    }
    keys = ["response_mask", *(["final_response_mask"] if "final_response_mask" in more else [])]
    meta = {
        "batch_num_tokens": dict.fromkeys(keys, counts[0]),
        "global_valid_samples": dict.fromkeys(keys, counts[1]),
    }
    return SimpleNamespace(batch={k: v for k, v in batch.items() if v is not None}, meta_info=meta)


def transcribed(x, b, data, pipeline, worker, entropy):
    """ROLL's rlvr and agentic losses, with the masked tokens left out of token-mean."""
    p = {"pg_clip": 0.2, "loss_agg_mode": "seq-mean-token-mean", **pipeline}
    final = data.batch.get("final_response_mask", b.mask).bool()
    old = data.batch.get("old_log_probs", x.detach())
    weight = torch.ones_like(x)
    correction = p.get("train_infer_correction") or {}
    if p.get("enable_old_logprobs_recompute"):
        if correction.get("is_weight", {}).get("enabled"):
            weight = data.batch["train_infer_is_weight"]
    else:
        weight, keep = train_infer(old - b.rollout, old.exp() - b.rollout.exp(), b.mask, correction)
        final = final & keep
    d = x - old
    if p.get("importance_sampling") == "seq":
        d = sequence_mean(d, final).expand(d.shape)
    loss = pg_loss(d, x, old, data.batch["advantages"], p, worker) * weight

    def agg(values):
        tokens, samples = data.meta_info["batch_num_tokens"], data.meta_info["global_valid_samples"]
        key = "final_response_mask" if "final_response_mask" in tokens else "response_mask"
        per_sample = torch.where(final, values, 0.0).sum(-1)
        mode = p["loss_agg_mode"]
        if mode == "token-mean":
            return per_sample.sum() / tokens[key]
        if mode == "seq-mean-token-sum-norm":
            return per_sample.sum() / values.shape[-1]
        if mode == "seq-mean-token-mean":
            per_sample = per_sample / final.sum(-1).clamp(min=1)
        return per_sample.sum() / samples[key]

    total = agg(loss)
    if p.get("use_kl_loss"):
        kl = ((b.ref - x).exp() - (b.ref - x) - 1).clamp(-10, 10)
        total = total + p.get("kl_loss_coef", 0.0) * agg(kl)
    return total - p.get("entropy_loss_coef", 0.0) * agg(entropy)


def pg_loss(d, x, old, adv, p, worker):
    ratio, kind = d.exp(), worker.get("pg_variant", "ppo")
    if kind == "vanilla":
        return -x * adv
    if kind == "tis":
        return -ratio.clamp(worker.get("tis_lower_bound", 0.0), worker.get("tis_upper_bound", 1.0)).detach() * adv * x
    if kind == "cispo":
        low, high = worker.get("cispo_epsilon_low", 0.1), worker.get("cispo_epsilon_high", 0.1)
        return -ratio.clamp(1 - low, 1 + high).detach() * adv * x
    if kind == "kimi15":
        return -adv * x + worker.get("kimi15_tau", 0.1) * 0.5 * (x - old) ** 2
    low, high = (p["pg_clip_low"], p["pg_clip_high"]) if p.get("use_pg_clip_range") else (p["pg_clip"], p["pg_clip"])
    loss = -torch.minimum(ratio * adv, ratio.clamp(1 - low, 1 + high) * adv)
    if p.get("dual_clip_loss"):
        loss = torch.where(adv < 0, -torch.maximum(-loss, (1 + 2 * p["pg_clip"]) * adv), loss)
    return loss


def train_infer(d, difference, mask, c):
    """The weight and the mask of filters, both over the unfiltered response."""
    mean = sequence_mean(d, mask)
    levels = {
        "token": d,
        "geometric": mean.expand(d.shape),
        "sequence": (mean * mask.sum(-1, keepdim=True)).expand(d.shape),
    }
    weight, keep, w = torch.ones_like(d), torch.ones_like(mask), c.get("is_weight", {})
    if w.get("enabled"):
        weight = levels[w.get("weight_type", "token")].exp().clamp(0, w.get("upper_bound", 1.2))
    for f in c.get("filters", []):
        if f.get("enabled") and f.get("ratio_enabled", True):
            ratio = levels[f.get("agg_type", "token")].exp()
            keep = keep & (ratio >= f.get("ratio_low", 0.8)) & (ratio <= f.get("ratio_high", 1.2))
        if f.get("enabled") and f.get("diff_enabled"):
            keep = keep & (difference >= f.get("diff_low", -0.2)) & (difference <= f.get("diff_high", 0.2))
    return weight, keep


def correct(weight=None, *filters):
    is_weight = {"enabled": weight is not None, **(weight or {})}
    return {"train_infer_correction": {"is_weight": is_weight, "filters": [{"enabled": True, **f} for f in filters]}}


SEQ = {"importance_sampling": "seq", "pg_clip": 0.02}
CASES = {
    "ppo": ({}, {}),
    "clip-range": ({"use_pg_clip_range": True, "pg_clip_low": 0.1, "pg_clip_high": 0.5}, {}),
    "dual-clip": ({"dual_clip_loss": True}, {}),
    "seq": (SEQ, {}),
    "kl": ({"use_kl_loss": True, "kl_loss_coef": 0.3}, {}),
    "entropy": ({"entropy_loss_coef": 0.1}, {}),
    "vanilla": ({}, {"pg_variant": "vanilla"}),
    "tis": ({}, {"pg_variant": "tis"}),
    "tis-bounds": ({}, {"pg_variant": "tis", "tis_lower_bound": 0.5, "tis_upper_bound": 1.5}),
    "cispo": ({}, {"pg_variant": "cispo", "cispo_epsilon_high": 0.4, "topr_positive_weight": 1.0}),
    "kimi15": ({}, {"pg_variant": "kimi15", "kimi15_tau": 0.5}),
    "weight-token": (correct({"weight_type": "token"}), {}),
    "weight-geometric": (correct({"weight_type": "geometric", "upper_bound": 1.01, "detach": False}), {}),
    "weight-sequence": (correct({"weight_type": "sequence", "upper_bound": None}), {}),
    "filter-token": (correct(None, {"ratio_low": 0.9, "ratio_high": 1.1}), {}),
    "filter-geometric": (correct({}, {"agg_type": "geometric", "ratio_low": 0.9}), {}),
    "filter-sequence": (correct({}, {"agg_type": "sequence", "ratio_low": 0.6}), {}),
    "filter-difference": (
        correct(None, {"ratio_enabled": False, "diff_enabled": True, "diff_low": -0.05, "diff_high": 0.05}),
        {},
    ),
    "filter-seq-kl": (
        {**correct({}, {"ratio_low": 0.9}), **SEQ, "use_kl_loss": True, "kl_loss_coef": 0.3},
        {},
    ),
}  # fmt: skip
MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def both(b, data, pipeline, worker):
    """Our loss and ROLL's, as functions of the log-probs."""
    entropy = b.ref.exp() + 1
    ours = lambda x: Worker(pipeline, worker).loss_func(data, (x, entropy))[0]  # noqa: E731
    return ours, lambda x: transcribed(x, b, data, pipeline, worker, entropy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient(name, mode):
    pipeline, worker = CASES[name]
    pipeline = {**pipeline, "loss_agg_mode": mode}
    b = scored(seed=1)
    data = data_of(b)
    ours, theirs = both(b, data, pipeline, worker)
    assert_same(ours, theirs, b.logps)


def test_sample_masks_have_their_own_counts():
    b = scored(seed=1)
    final = b.mask.clone()
    final[1] = False
    data = data_of(b, final_response_mask=final.long())
    data.meta_info["batch_num_tokens"]["final_response_mask"] = 17
    data.meta_info["global_valid_samples"]["final_response_mask"] = 4
    for mode in MODES:
        ours, theirs = both(b, data, {"loss_agg_mode": mode, "use_kl_loss": True, "kl_loss_coef": 0.2}, {})
        assert_same(ours, theirs, b.logps)
    with pytest.raises(ValueError, match="^entropy_loss_coef: "):
        both(b, data, {"entropy_loss_coef": 0.1}, {})[0](b.logps)


def test_weights_that_the_pipeline_has_computed():
    b = scored(seed=1)
    data = data_of(b, train_infer_is_weight=(b.old - b.rollout).exp().clamp(max=1.1))
    pipeline = {**correct({}, {"ratio_low": 0.99}), "enable_old_logprobs_recompute": True}
    ours, theirs = both(b, data, pipeline, {})
    assert_same(ours, theirs, b.logps)


def test_without_old_log_probs_the_ratio_is_one():
    b = scored(seed=1)
    data = data_of(b, old_log_probs=None, infer_logprobs=torch.empty(0))
    ours, theirs = both(b, data, {}, {})
    assert_same(ours, theirs, b.logps)


@pytest.mark.parametrize("mode", MODES)
def test_unequal_micro_batches_add_up(mode):
    b = scored(seed=1)
    pipeline = {"loss_agg_mode": mode, "use_kl_loss": True, "kl_loss_coef": 0.2}
    counts = (int(b.mask.sum()), int(b.mask.any(-1).sum()))
    rows = [slice(0, 1), slice(1, 4)]
    split = lambda x: sum(  # noqa: E731
        both(b.rows(s), data_of(b.rows(s), counts), pipeline, {})[0](x[s]) for s in rows
    )
    assert_same(split, both(b, data_of(b, counts), pipeline, {})[1], b.logps)


def test_metrics():
    b = scored(seed=1)
    loss, metrics = Worker({}).loss_func(data_of(b), (b.logps, None))
    ratio = (b.logps - b.old).exp()[b.mask]
    assert metrics["actor/ratio_max@max"] == pytest.approx(float(ratio.max()), rel=1e-6)
    assert metrics["actor/ratio_min@min"] == pytest.approx(float(ratio.min()), rel=1e-6)
    assert metrics["actor/total_loss@sum"] == pytest.approx(float(loss))
    assert all(isinstance(value, float) and "@" in name for name, value in metrics.items())


def test_the_worker_class(monkeypatch):
    """`fastrl.adapters.roll.ActorWorker` is ROLL's, with this loss."""

    class ActorWorker:
        worker_config = SimpleNamespace(pg_variant="cispo")

        def initialize(self, pipeline_config):
            self.pipeline_config = pipeline_config

        initialize.dispatched = "ONE_TO_ALL"  # as ROLL's decorator marks it

        def train_step(self):
            return "ROLL's"

    module = ModuleType("actor_worker")
    module.ActorWorker = ActorWorker
    monkeypatch.setitem(sys.modules, "roll.pipeline.rlvr.actor_worker", module)
    ours = roll.ActorWorker
    try:
        assert issubclass(ours, ActorWorker) and ours.loss_func is roll.loss_func
        assert ours.train_step(None) == "ROLL's" and ours.__module__ == "fastrl.adapters.roll"
        assert ours.initialize.dispatched == "ONE_TO_ALL"
        worker = ours()
        worker.initialize({"pg_clip": 0.1})
        assert worker.pipeline_config == {"pg_clip": 0.1}
        with pytest.raises(ValueError, match="^rl_loss_coef: "):
            ours().initialize({"rl_loss_coef": 0.5})
    finally:
        del roll.__dict__["ActorWorker"]
    with pytest.raises(AttributeError, match="CriticWorker"):
        roll.CriticWorker  # noqa: B018
