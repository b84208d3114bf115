"""Bugs that reviews found in the losses, each with the case that showed it."""

from __future__ import annotations

import pytest
import torch
from common import BACKENDS, ON_CPU

import fastrl
from fastrl import LossSpec, RolloutCorrection, Rollouts

INF, NAN = float("inf"), float("nan")


def loss_and_grad(logps, rollouts, spec, backend="torch", **options):
    leaf = logps.clone().requires_grad_()
    out = fastrl.policy_loss(leaf, rollouts, spec, backend=backend, **options)
    return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0], out.metrics


def row(*values):
    return torch.tensor([values])


def rollouts(n, mask=None, advantages=1.0, device="cpu", **more):
    ids = torch.zeros(1, n, dtype=torch.long)
    return Rollouts(ids, mask, torch.tensor([advantages]), **more).to(device)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13 instantiates autograd functions itself
def test_one_compiled_function_takes_many_specs():
    """The key of the second spec is a symbol under torch.compile; another seed compiles nothing."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    batch = rollouts(3, old_logps=row(-1.0, -2.0, -1.1))
    logps = row(-1.0, -2.1, -1.0)
    compiled = torch.compile(lambda x, spec: fastrl.policy_loss(x, batch, spec).loss, backend=count, fullgraph=True)
    for spec in (fastrl.GRPO, fastrl.DAPO, fastrl.CISPO, fastrl.GRPO.replace(entropy_coef=0.0)):
        assert compiled(logps, spec) == fastrl.policy_loss(logps, batch, spec).loss
    before = len(graphs)
    for seed in range(12):
        compiled(logps, fastrl.CLIP_COV.replace(seed=seed))
    assert len(graphs) <= before + 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_do_not_depend_on_the_current_policy(backend):
    """ρ = π_old/π_rollout is 1 to the bit where the two agree, however far the current log-prob is."""
    name, device = backend
    old = row(-0.013, -0.0271, -0.11, -0.0007)
    batch = rollouts(4, device=device, old_logps=old, rollout_logps=old)
    spec = fastrl.REINFORCE.replace(rollout=RolloutCorrection(mode="mask", lower=1.0, upper=1.0))
    logps = row(-25.3, -17.7, -31.1, -9.9).to(device)
    metrics = loss_and_grad(logps, batch, spec, name)[2]
    assert metrics["rollout_rejected_fraction"] == 0 and metrics["rollout_chi2"] == 0
    exact = fastrl.REINFORCE.replace(rollout=RolloutCorrection(reject="k1", reject_lower=0.0, reject_upper=0.0))
    assert loss_and_grad(logps, batch, exact, name)[2]["rollout_rejected_fraction"] == 0


@pytest.mark.parametrize("objective", ["ppo_clip", "vespo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_long_sequences(backend, objective):
    """Exponents are sums over the sequence: in fp32 65,536 terms cost four digits of the weight."""
    name, device = backend
    T = 65536
    g = torch.Generator().manual_seed(0)
    old = -0.3 - torch.rand(1, T, generator=g)
    sampler = old + 0.05 * torch.randn(1, T, generator=g)
    sampler -= (sampler - old).double().mean().float()
    logps = old - 20 if objective == "ppo_clip" else old + 0.01 * torch.randn(1, T, generator=g)
    batch = rollouts(T, old_logps=old, rollout_logps=sampler)
    spec = LossSpec(objective=objective, rollout=RolloutCorrection(level="sequence"))
    truth = loss_and_grad(logps.double(), batch, spec)[0]
    got = loss_and_grad(logps.to(device), batch.to(device), spec, name)[0].cpu()
    # the weight inherits the rounding of the differences old − sampler, the same for every backend
    plain = loss_and_grad(logps, batch, spec)[0]
    assert abs(got - truth) <= 2 * abs(plain - truth) + 2e-6 * abs(truth)


@pytest.mark.parametrize("spec", [
    fastrl.PPO.replace(rollout=RolloutCorrection(upper=2.0)),
    fastrl.GSPO,
    fastrl.GMPO,
    fastrl.GSPO.replace(rollout=RolloutCorrection(level="sequence")),
], ids=["tis", "gspo", "gmpo", "sequence-weight"])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_token_does_not_kill_the_step(backend, spec):
    """A vocabulary mask may set the sampled token's logit to -inf: ratio 0 at that token, finite loss and gradient."""
    name, device = backend
    old = row(-1.0, -1.2, -0.7)
    batch = rollouts(3, device=device, old_logps=old, rollout_logps=old - 0.1)
    logps = row(-INF, -1.1, -0.8).to(device)
    loss, gradient, _ = loss_and_grad(logps, batch, spec, name)
    want, slopes, _ = loss_and_grad(logps.cpu(), batch.to("cpu"), spec, "torch")
    torch.testing.assert_close(loss.cpu(), want)
    torch.testing.assert_close(gradient.cpu(), slopes)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rejected_token_with_an_infinite_loss(backend):
    name, device = backend
    batch = rollouts(3, device=device, old_logps=row(-9.0, -1.0, -1.0), rollout_logps=row(-1.0, -1.0, -1.0))
    spec = fastrl.CISPO.replace(rollout=RolloutCorrection(mode="mask", lower=0.5, upper=2.0))
    loss, gradient, _ = loss_and_grad(row(-INF, -1.0, -1.0).to(device), batch, spec, name)
    assert loss.isfinite() and gradient.isfinite().all() and gradient[0, 0] == 0
    assert loss_and_grad(row(NAN, -1.0, -1.0).to(device), batch, spec, name)[0].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbounded_ratios_that_do_not_count(backend):
    """log_ratio_clamp=None: an infinite ratio that is clipped, or rejected, has gradient 0, not 0·inf."""
    name, device = backend
    far = row(-120.0, -1.0)
    clipped = rollouts(2, device=device, old_logps=far)
    logps = row(-1.0, -1.0).to(device)
    gradient = loss_and_grad(logps, clipped, LossSpec(log_ratio_clamp=None), name)[1]
    assert gradient.isfinite().all() and gradient[0, 0] == 0
    spec = LossSpec(
        objective="importance_sampling", log_ratio_clamp=None, rollout=RolloutCorrection(mode="mask", lower=0.5)
    )
    rejected = rollouts(2, device=device, old_logps=far, rollout_logps=row(-1.0, -1.0))
    loss, gradient, _ = loss_and_grad(logps, rejected, spec, name)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_custom_sequence_objective_under_the_mask(backend):
    """A/|A| is 0/0 at a masked token, whose advantage is 0; its sequence must not hear of it."""
    name, device = backend
    spec = LossSpec(objective=lambda x, a: -(a / a.abs()) * x.exp(), ratio_level="sequence")
    batch = rollouts(3, torch.tensor([[1, 1, 0]]), device=device, old_logps=row(-1.0, -1.0, -1.0))
    loss, gradient, _ = loss_and_grad(row(-1.1, -0.9, -5.0).to(device), batch, spec, name)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_with_larger_entropy_weights(backend):
    """float16 gradients are stored times a power of two: the weights of the entropy bonus count for it."""
    name, device = backend
    N, V = 128, 16
    hidden = torch.randn(1, N, 8, device=device).half().requires_grad_()
    weight = torch.randn(V, 8, device=device).half().requires_grad_()
    batch = Rollouts(torch.randint(0, V, (1, N)), advantages=torch.tensor([1e-3])).to(device)
    spec = LossSpec(entropy_coef=64.0, entropy_aggregation="token-sum")
    out = fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(weight), batch, spec, normalizer=1e7, backend=name)
    (out.loss * 1e-6).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13 instantiates autograd functions itself
def test_a_mask_is_taken_as_it_was():
    """A bool mask was kept as the caller's tensor: changed afterwards it disagreed with the counts, and made in
    inference mode it could not be saved for backward."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    logps = -torch.rand(2, 3)
    rollouts = Rollouts(torch.zeros(2, 3).long(), mask, advantages=torch.tensor([1.0, 2.0]))
    before = fastrl.policy_loss(logps, rollouts, fastrl.GRPO).loss
    mask[1] = False
    assert torch.equal(fastrl.policy_loss(logps, rollouts, fastrl.GRPO).loss, before)
    logits = torch.randn(2, 3, 7, requires_grad=True)
    with torch.inference_mode():
        mask = torch.ones(2, 3, dtype=torch.bool)
    scores = fastrl.logprobs_from_logits(logits, torch.zeros(2, 3).long(), mask=mask)
    scores.logps.sum().backward()


def test_wrong_row_counts_still_score_every_token_at_its_own_row():
    """Counts that say that every row counts made the order of the rows stand for their places."""
    hidden, head = torch.randn(1, 6, 4), fastrl.LMHead(torch.randn(16, 4))
    ids, mask = torch.randint(0, 16, (1, 6)), torch.tensor([[0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    given = {"advantages": torch.ones(1), "old_logps": torch.zeros(1, 6)}
    wrong = fastrl.policy_loss_from_hidden(hidden, head, Rollouts(ids, mask, **given, row_counts=(6, 6)), fastrl.GRPO)
    right = fastrl.policy_loss_from_hidden(hidden, head, Rollouts(ids, mask, **given), fastrl.GRPO)
    assert wrong.loss.isnan()
    assert torch.allclose(wrong.logps[mask], right.logps[mask], rtol=0, atol=1e-6)


def test_row_counts_under_compile_with_a_sequence_ratio():
    torch._dynamo.reset()
    batch = Rollouts(torch.zeros(2, 4, dtype=torch.long), advantages=torch.tensor([1.0, -1.0]), row_counts=(8, 8))
    hidden, weight = torch.randn(2, 4, 3, requires_grad=True), torch.randn(5, 3)

    def run(hidden):
        return fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(weight), batch, fastrl.GSPO).loss

    (want,) = torch.autograd.grad(run(hidden), hidden)
    (got,) = torch.autograd.grad(torch.compile(run, backend="eager", fullgraph=True)(hidden), hidden)
    torch.testing.assert_close(got, want)


class TestCorrected:
    SPEC = fastrl.PPO.replace(rollout=RolloutCorrection(mode="mask", upper=1.05, rejected_in_denominator=False))

    def batch(self, **more):
        old = row(-1.0, -1.2, -0.7)
        return rollouts(3, old_logps=old, rollout_logps=old - row(0.0, 0.1, -0.1), **more)

    def test_same_loss_as_directly(self):
        logps = row(-1.1, -1.0, -0.9)
        want = loss_and_grad(logps, self.batch(), self.SPEC)[0]
        corrected = self.batch(row_counts=(3, 3)).corrected(self.SPEC)
        assert corrected.row_counts is None
        assert loss_and_grad(logps, corrected, self.SPEC.replace(rollout=None))[0] == want

    def test_what_it_refuses(self):
        with pytest.raises(ValueError, match="^rollout_weights: "):
            self.batch(rollout_weights=torch.ones(1, 3)).corrected(self.SPEC)
        with pytest.raises(ValueError, match="^old_logps: "):
            rollouts(3).normalizer(self.SPEC)
        with pytest.raises(ValueError, match="^row_counts: "):
            loss_and_grad(row(-1.0, -1.0, -1.0), self.batch(row_counts=(3, 3)), self.SPEC)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_no_outlier_and_no_maximum(backend):
    """A NaN log-prob of a valid token stays visible behind the second moment and a sequence's maximum."""
    name, device = backend
    old = row(NAN, -1.0, -3.1)
    batch = rollouts(3, device=device, old_logps=old, rollout_logps=row(-1.0, -1.0, -1.0))
    for how in (
        RolloutCorrection(level=None, second_moment=0.04),
        RolloutCorrection(level=None, second_moment=0.04, rejected_in_denominator=False),
        RolloutCorrection(reject="k3", reject_level="sequence-max", reject_upper=0.1),
    ):
        loss = loss_and_grad(row(-1.0, -1.0, -1.0).to(device), batch, LossSpec(rollout=how), name)[0]
        assert loss.isnan(), how


@pytest.mark.parametrize(("n", "fraction"), [(11, 0.7), (1001, 0.7), (21, 0.35)])
def test_entropy_quantile_is_the_same_in_every_dtype(n, fraction):
    entropy = torch.rand(n, generator=torch.Generator().manual_seed(0))
    kept = [fastrl.selection.high_entropy(entropy.to(d), torch.ones(n, dtype=torch.bool), fraction).sum()
            for d in (torch.float32, torch.float64)]  # fmt: skip
    assert kept[0] == kept[1] == n - round((n - 1) * (1 - fraction))


def test_messages():
    with pytest.raises(ValueError, match="^objective: "):
        LossSpec(objective=["ppo_clip"])
    # a step on its own samples, without old log-probs, is on-policy by definition: nothing is dropped (TRL)
    loss_and_grad(row(-1.0), rollouts(1, advantages=-1.0), LossSpec(off_policy_threshold=0.1))


@pytest.mark.parametrize("backend", ON_CPU)
def test_straight_through_keeps_the_value(backend):
    """The value is the estimator's to the bit, however large the surrogate whose gradient it borrows."""
    ref, logps = row(-75.0, -1.0), row(-2.0, -1.5)
    batch = rollouts(2, advantages=0.0, ref_logps=ref)
    spec = LossSpec(kl_coef=1.0, kl_estimator="abs", kl_gradient="straight_through", aggregation="token-sum")
    loss, gradient, _ = loss_and_grad(logps, batch, spec, backend)
    assert loss == (logps - ref).abs().sum() and torch.equal(gradient, logps - ref)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_weight_of_a_sequence_under_the_mask(backend):
    """Its masked token has that weight too, and an advantage of 0: the loss stays what it is without the token."""
    name, device = backend
    spec = fastrl.REINFORCE.replace(log_ratio_clamp=None, rollout=RolloutCorrection(level="sequence"))
    old, behaviour, logps = row(-1.0, -1.0, -1.0), row(-101.0, -1.0, -1.0), row(-1.1, -0.9, -1.0)
    batch = rollouts(3, torch.tensor([[1, 1, 0]]), device=device, old_logps=old, rollout_logps=behaviour)
    short = rollouts(2, device=device, old_logps=old[:, :2], rollout_logps=behaviour[:, :2])
    loss, gradient, _ = loss_and_grad(logps.to(device), batch, spec, name)
    want, _, _ = loss_and_grad(logps[:, :2].to(device), short, spec, name)
    assert loss == want == INF
    assert gradient[0, 2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_objective_that_is_infinite_at_an_advantage_of_zero(backend):
    """vespo's weight takes the constants of A >= 0 at a masked token, whose advantage is 0, and overflows there."""
    name, device = backend
    spec = fastrl.VESPO.replace(vespo_lambda_positive=100.0)
    batch = rollouts(2, row(1, 0), -1.0, device, old_logps=row(3.0, -1.0))
    loss, gradient, _ = loss_and_grad(row(-1.0, -1.0).to(device), batch, spec, name)
    assert loss.isfinite() and gradient[0, 0] != 0 and gradient[0, 1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_advantage_is_seen_in_the_gradient(backend):
    """Inside the clip range both terms of the minimum are infinite: an infinite gradient, not NaN."""
    name, device = backend
    batch = rollouts(1, advantages=INF, device=device, old_logps=row(-1.0))
    loss, gradient, _ = loss_and_grad(row(-1.0).to(device), batch, LossSpec(), name)
    assert loss == gradient == -INF


def test_the_token_level_asks_nothing_of_its_data():
    """Under FakeTensorMode a branch on a value raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logps = torch.randn(2, 3, requires_grad=True)
        batch = Rollouts(torch.zeros(2, 3, dtype=torch.long), advantages=torch.randn(2), old_logps=torch.randn(2, 3))
        assert fastrl.policy_loss(logps, batch, fastrl.GRPO, backend="torch").loss.shape == ()
