"""SkyRL's, AReaL's and torchtitan's own code and ours on the same batch: loss, gradient, the metrics that both have."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from frameworks import real
from frameworks import test_areal as areal_cases
from frameworks import test_torchtitan as torchtitan_cases
from frameworks.batches import scored, value_and_gradient

from fastrl.adapters import areal, skyrl, torchtitan

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own
LOSSES = {
    "regular": "ppo_policy_loss", "dual_clip": "ppo_policy_loss", "gspo": "gspo_policy_loss", "sapo": "sapo_policy_loss",
    "cispo": "compute_policy_loss_cispo", "rollout_is": "rollout_is_policy_loss", "dppo": "dppo_policy_loss",
    "importance_sampling": "importance_sampling_loss", "clip_cov": "compute_policy_loss_clip_cov",
    "kl_cov": "compute_policy_loss_kl_cov",
}  # fmt: skip
CORRECTIONS = {
    "off": {},
    "token": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.1},
    "sequence": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.2},
    "geometric": {"sequence_mask_metric": "geometric", "geo_mask_low": 0.9, "geo_mask_high": 1.03},
    "product": {"tis_ratio_type": "token", "sequence_mask_metric": "product", "product_mask_low": 0.6},
    "token-mask": {"token_mask_is_threshold_low": 0.85, "token_mask_is_threshold_high": 1.3},
    "outlier": {"tis_ratio_type": "sequence", "outlier_token_is_threshold_low": 0.75},
}


def same(ours, theirs, logps, *, value=True, rtol=1e-9, atol=1e-12):
    (got, gradient), (want, want_gradient) = value_and_gradient(ours, logps), value_and_gradient(theirs, logps)
    assert want_gradient.abs().max() > 1e-4
    if value:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient, want_gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_skyrl(loss_type, correction):
    """With SkyRL's own config object; what we refuse is named."""
    theirs = real.skyrl()
    b = scored(seed=1)
    cfg = theirs.config.AlgorithmConfig(policy_loss_type=loss_type, eps_clip_low=0.1, eps_clip_high=0.15)
    cfg.loss_reduction = "sequence_mean"  # any other makes SkyRL warn
    cfg.off_policy_correction = theirs.config.OffPolicyCorrectionConfig(**CORRECTIONS[correction])
    cfg.clip_cov = theirs.config.ClipCovConfig(clip_ratio=1.0, clip_cov_lb=0.05, clip_cov_ub=0.6)
    cfg.dppo = theirs.config.DPPOConfig(delta_low=0.05, delta_high=0.1)
    args = (b.old, b.advantages, cfg, b.mask.double(), b.rollout)
    fn = getattr(theirs, LOSSES[loss_type])
    ours = lambda x: skyrl.policy_loss_fn(x, *args, loss_type=loss_type)[0]  # noqa: E731
    corrected = loss_type in ("regular", "dual_clip", "gspo", "sapo", "cispo")
    if correction != "off" and not corrected:
        with pytest.raises(ValueError, match="^off_policy_correction: "):
            ours(b.logps)
        return
    # SkyRL takes every exponential in float32
    same(ours, lambda x: fn(x, *args)[0], b.logps, value=loss_type != "dppo", rtol=2e-6, atol=1e-6)
    want, got = fn(b.logps, *args)[1], skyrl.policy_loss_fn(b.logps, *args, loss_type=loss_type)[1]
    for name in set(want) & set(got):
        assert got[name] == pytest.approx(want[name], rel=1e-5), name
    assert loss_type in ("sapo", "importance_sampling", "clip_cov", "kl_cov") or set(want) & set(got)


def test_skyrls_registry_takes_our_losses(monkeypatch):
    """Under their names, once, and in a form that SkyRL can send to its workers."""
    registry = real.skyrl().PolicyLossRegistry
    module = ModuleType("ppo_utils")
    module.PolicyLossRegistry = registry
    monkeypatch.setitem(sys.modules, "skyrl.backends.skyrl_train.utils.ppo_utils", module)
    cfg = real.skyrl().config.AlgorithmConfig(policy_loss_type="fastrl_sapo")
    trainer = SimpleNamespace(algorithm=cfg, fully_async=real.skyrl().config.FullyAsyncConfig())
    names = skyrl.register(SimpleNamespace(trainer=trainer))
    assert set(names) <= set(registry.list_available())
    with pytest.raises(ValueError, match="already registered"):
        skyrl.register(SimpleNamespace(trainer=trainer))
    b = scored()
    sent = pickle.loads(pickle.dumps(registry.get("fastrl_sapo")))
    want = skyrl.policy_loss_fn(b.logps, b.old, b.advantages, cfg, b.mask, b.rollout, loss_type="sapo")[0]
    assert torch.equal(sent(b.logps, b.old, b.advantages, cfg, b.mask, b.rollout)[0], want)
    for name in names:
        registry.unregister(name)


def test_skyrls_fully_async_trainer_refuses_the_same_losses():
    """Those in its set of names; of cispo it looks at the anchor, as the test of `register` does."""
    from fastrl.adapters._skyrl_config import mapped

    theirs = real.skyrl()
    reads_old = {t for t in skyrl.TYPES if mapped(t, theirs.config.AlgorithmConfig()).anchor == "old"}
    assert reads_old == {str(t) for t in theirs.LOSSES_WITH_OLD_LOGPROBS} - {"cross_entropy"}
    assert {str(t) for t in theirs.LOSSES_WITHOUT_OLD_LOGPROBS} == set(skyrl.TYPES) - reads_old
    assert theirs.config.FullyAsyncConfig().enabled is False


def test_every_field_of_skyrls_config_is_known():
    """Nothing of SkyRL 0.4.0's AlgorithmConfig is unknown to us, and every default that we repeat is its."""
    from fastrl.adapters import _skyrl_config as ours

    config = real.skyrl().config
    fields = {f.name for f in dataclasses.fields(config.AlgorithmConfig)}
    options = ours.ALGORITHM
    assert fields == {*options.honoured, *options.elsewhere, *options.refused}
    for name, default in options.honoured.items():
        assert default is None or getattr(config.AlgorithmConfig(), name) == default, name
    correction = config.OffPolicyCorrectionConfig()
    assert {f.name for f in dataclasses.fields(correction)} == {*ours._CORRECTION.honoured, *ours._CORRECTION.refused}
    for name, default in ours._CORRECTION.honoured.items():
        assert getattr(correction, name) == default, name
    for key, defaults in ours._OWN.items():
        own = getattr(config.AlgorithmConfig(), key)
        assert {f.name: getattr(own, f.name) for f in dataclasses.fields(own)} == defaults, key


@pytest.mark.parametrize("name", [name for name in areal_cases.CASES if "on-policy" not in name])
def test_areal(name):
    """AReaL's grpo_loss_fn as a whole, on packed batches, with its own config object."""
    theirs = real.areal()
    arguments = {"eps_clip": 0.2, "eps_clip_higher": None, "c_clip": None, **areal_cases.CASES[name]}
    if arguments.get("rejection_sampling"):
        arguments["rejection_sampling"] = theirs.RejectionSamplingConfig(**arguments["rejection_sampling"])
    data, logps = areal_cases.packed(scored(seed=1))
    data["loss_mask"] = data["loss_mask"].bool()
    entropy = torch.ones_like(logps)
    # AReaL takes the weights of rejection_sampling in float32
    rtol = 1e-6 if arguments.get("rejection_sampling") else 1e-9
    ours = lambda x: areal.grpo_loss_fn(x, entropy, data, **arguments)  # noqa: E731
    same(ours, lambda x: theirs.grpo_loss_fn(x, entropy, data, **arguments), logps, rtol=rtol)


@pytest.mark.parametrize("name", ["dapo", "clip-higher"])
def test_torchtitan(name):
    """torchtitan 0.3.0 has (B, L) batches; it works in float32."""
    theirs = real.torchtitan()
    batch = torchtitan_cases.microbatch()
    fields = {"dapo": {}, "clip-higher": {"ratio_clip_low": 0.1, "ratio_clip_high": 0.5}}[name]
    batch.logits = batch.logits.float()
    batch.generator_logprobs = batch.generator_logprobs.float()
    batch.advantages = batch.advantages.float()
    peer, own = theirs.DAPOLoss(theirs.DAPOLoss.Config(**fields)), torchtitan.DAPOLoss.Config(**fields).build()
    call = torchtitan_cases.call
    same(lambda x: call(own, batch, x, 17)[0], lambda x: call(peer, batch, x, 17)[0], batch.logits, rtol=2e-5)
    want, got = call(peer, batch, batch.logits, 17)[1], call(own, batch, batch.logits, 17)[1]
    assert set(got) == {*want, "fastrl/clip_frac", "fastrl/clamped_frac"}
    for metric in want:
        assert float(want[metric]) != 0, metric
        assert math.isclose(float(got[metric]), float(want[metric]), rel_tol=2e-5, abs_tol=1e-7), metric
    config = {f.name: f.default for f in dataclasses.fields(theirs.GRPOLoss.Config)}
    assert config == {"clip_eps": torchtitan.GRPOLoss.Config().clip_eps}


def _chunked(loss_config, batch, chunks):
    """torchtitan's wrapper around a loss, from hidden states: loss, their gradient, the head's, metrics."""
    wrapper = real.torchtitan().ChunkedLossWrapper
    head = torch.nn.Linear(5, 11, bias=False)
    g = torch.Generator().manual_seed(7)
    torch.nn.init.normal_(head.weight, generator=g)
    hidden = torch.randn(3, 6, 5, generator=g).requires_grad_()
    loss = wrapper(wrapper.Config(num_chunks=chunks, loss_fn=loss_config))
    loss.set_lm_head(head)
    value, metrics = torchtitan_cases.call(loss, batch, hidden, 17)
    value.backward()
    return value.detach(), hidden.grad, head.weight.grad, metrics


@pytest.mark.parametrize("chunks", [2, 3])
def test_torchtitans_chunked_wrapper(chunks):
    """Chunks add up to one call, and a chunk's loss, gradients and metrics are those of torchtitan's own loss."""
    batch = torchtitan_cases.microbatch()
    for name in ("generator_logprobs", "advantages"):
        setattr(batch, name, getattr(batch, name).float())
    theirs = real.torchtitan().DAPOLoss

    runs = [_chunked(torchtitan.DAPOLoss.Config(), batch, n) for n in (chunks, 1)]
    runs.append(_chunked(SimpleNamespace(build=functools.partial(theirs, theirs.Config())), batch, chunks))
    for run in runs[1:]:
        for got, want in zip(runs[0][:3], run[:3], strict=True):
            assert want.abs().max() > 1e-4
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
        shared = set(runs[0][3]) & set(run[3])
        assert len(shared) >= 7
        for metric in shared:
            assert math.isclose(float(runs[0][3][metric]), float(run[3][metric]), rel_tol=2e-5, abs_tol=1e-6), metric


def test_torchtitan_adds_our_metrics_over_micro_batches():
    """By the end of their names: one that it does not know would keep the first micro-batch's value."""
    loss = torchtitan.DAPOLoss(None)
    parts = [
        torchtitan_cases.call(loss, b, b.logits, 30)[1]
        for b in map(torchtitan_cases.microbatch, ("padded",) * 2, (0, 1))
    ]
    parts = [{name: float(value) for name, value in part.items()} for part in parts]
    for name, value in real.torchtitan().combine_microbatch_metrics(parts).items():
        both = [part[name] for part in parts]
        assert value == pytest.approx(max(both) if name.endswith("/max") else sum(both)), name
        assert name.startswith("fastrl/") or min(map(abs, both)) > 0, name


def test_every_argument_of_areals_loss_is_known():
    import inspect

    from fastrl.adapters.areal import _ARGUMENTS as options

    parameters = inspect.signature(real.areal().grpo_loss_fn).parameters
    theirs = {name: p.default for name, p in parameters.items() if name not in ("logprobs", "entropy", "input_data")}
    assert set(theirs) <= {*options.honoured, *options.elsewhere, *options.refused}
    required = inspect.Parameter.empty
    assert all(options.honoured.get(name, x) == x for name, x in theirs.items() if x is not required)
    rejection = real.areal().RejectionSamplingConfig()
    from fastrl.adapters.areal import _REJECTION

    assert {f.name: getattr(rejection, f.name) for f in dataclasses.fields(rejection)} == _REJECTION.honoured
