"""The operators hold what `torch.library` asks of them, and a whole training step compiles into one graph, once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from common import BACKENDS, clean_logits, close, make_batch
from torch import Tensor, nn

import fastrl
from fastrl import ops

# How many leading inputs of an operator are differentiable.
OPERATORS = {
    "score_logits": 1, "score_hidden": 3, "token_loss": 2, "logits_loss": 1, "hidden_loss": 3,
    "score_logits_grad": 1, "score_hidden_grad": 3,
}  # fmt: skip
GRADIENTS = ("score_logits_grad", "score_hidden_grad")
DATA = {"lambda_returns", "group_advantages"}  # of rewards, without a gradient

SPECS = {
    "token": fastrl.GRPO.replace(kl_coef=0.1, entropy_coef=0.02),
    "sequence": fastrl.GSPO.replace(rollout=fastrl.RolloutCorrection(upper=1.1)),
    "batch": fastrl.DAPO.replace(top_entropy_quantile=0.5),
    "custom": fastrl.LossSpec(objective=lambda log_ratio, advantages: -advantages * log_ratio.tanh()),
}


def test_every_operator_is_checked_here():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrl::")}
    assert defined == OPERATORS.keys() | DATA


def sample_calls(
    name: str, device: str, spec: fastrl.LossSpec, dtype: torch.dtype, patch: Any
) -> list[tuple[Any, ...]]:
    """Every operator's arguments in one forward and backward through all levels: (operator, arguments)."""
    calls = []

    def recorded(operator):
        function = getattr(ops, operator)

        def call(*args):
            calls.append((operator, [x.detach().clone() if isinstance(x, Tensor) else x for x in args]))
            return function(*args)

        return call

    for operator in OPERATORS:
        patch.setattr(ops, operator, recorded(operator))
    batch = make_batch(B=4, T=3, V=19, H=4, garbage=False, dtype=dtype, device=device)
    r, mask = batch.rollouts, batch.rollouts.mask
    logits = clean_logits(batch).to(dtype).requires_grad_()
    hidden, weight, bias = (x.requires_grad_() for x in (batch.hidden, batch.weight, batch.bias))
    head = fastrl.LMHead(weight, bias, softcap=3.0)
    options: dict[str, Any] = {"temperature": 0.7, "backend": name}
    fastrl.policy_loss_from_logits(logits, r, spec, **options).loss.backward()
    fastrl.policy_loss_from_hidden(hidden, head, r, spec, buffer_bytes=900, **options).loss.backward()
    scores = fastrl.logprobs_from_hidden(hidden, head, r.token_ids, mask=mask, buffer_bytes=900, **options)
    fastrl.policy_loss(scores.logps, r, spec, entropy=scores.entropy, backend=name).loss.backward()
    fastrl.logprobs_from_logits(logits, r.token_ids, mask=mask, **options).logps.sum().backward()
    patch.undo()
    return calls


# Which specs, in which dtype: another dtype or spec takes another way through the same operators.
SAMPLES = {
    "torch": [("token", "float32"), ("token", "float16"), ("sequence", "float32"), ("batch", "float32"), ("custom", "float32")],
    "triton": [("token", "float16"), ("sequence", "float32")],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # AOTAutograd warns of its own internals
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, monkeypatch):
    """Schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes: forward, and backward where the
    operator has one. float16 leaves the gradient of the logits to backward."""
    name, device = backend
    for spec, dtype in SAMPLES[name]:
        calls = sample_calls(name, device, SPECS[spec], getattr(torch, dtype), monkeypatch)
        assert {operator for operator, _ in calls} == OPERATORS.keys()
        for operator, args in calls:
            check(getattr(torch.ops.fastrl, operator).default, args, OPERATORS[operator], operator in GRADIENTS)


def check(overload: Any, args: list[Any], first: int, is_gradient: bool) -> None:
    wanting = [x if x is None else x.clone().requires_grad_() for x in args[:first]] + args[first:]
    if not is_gradient:
        torch.library.opcheck(overload, tuple(wanting))
        return
    # A gradient is not differentiated again: the operator says so, and holds everything else.
    torch.library.opcheck(overload, tuple(wanting), test_utils="test_autograd_registration")
    torch.library.opcheck(overload, tuple(args))
    outputs = overload(*wanting)
    first_output = outputs if isinstance(outputs, Tensor) else outputs[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first_output.sum().backward()


def test_an_operator_says_when_its_gradient_was_not_asked_for(monkeypatch):
    """`token_loss`, `logits_loss` and `hidden_loss` compute it in forward, if told so; nothing passes as zero."""
    calls = dict(sample_calls("torch", "cpu", SPECS["token"], torch.float32, monkeypatch))
    flags = {"token_loss": {6: False}, "logits_loss": {7: False, 9: False}, "hidden_loss": {9: [False] * 3}}
    for operator, changed in flags.items():
        args = [changed.get(i, value) for i, value in enumerate(calls[operator])]
        args[0] = args[0].clone().requires_grad_()
        loss = getattr(torch.ops.fastrl, operator)(*args)[0]
        with pytest.raises(RuntimeError, match=f"fastrl::{operator}: .*ask for"):
            loss.backward()


def test_eager_steps_load_no_compiler():
    """An operator's wrapper from `torch.library.custom_op` would import dynamo on the first call: 100 MB, a second."""
    code = """
import sys, torch, fastrl
w = torch.randn(5, 3, requires_grad=True)
h = torch.randn(2, 4, 3, requires_grad=True)
r = fastrl.Rollouts(torch.zeros(2, 4).long(), advantages=torch.ones(2))
fastrl.policy_loss_from_hidden(h, fastrl.LMHead(w), r, fastrl.GSPO).loss.backward()
fastrl.policy_loss_from_logits(h @ w.t(), r, fastrl.GRPO).loss.backward()
fastrl.logprobs_from_hidden(h, fastrl.LMHead(w), r.token_ids).logps.sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Tiny(nn.Module):
    """Embedding, causal attention, head: a model with what compiling one takes."""

    def __init__(self, vocab: int = 29, width: int = 8) -> None:
        super().__init__()
        self.embed, self.mix, self.lm_head = (
            nn.Embedding(vocab, width),
            nn.Linear(width, width),
            nn.Linear(width, vocab),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + torch.tanh(self.mix(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)))


def training_loss(
    model: Tiny, ids: Tensor, mask: Tensor, advantages: Tensor, old: Tensor, spec: Any, name: str
) -> Tensor:
    """The model once, and a loss from each level."""
    hidden, ids, mask = fastrl.shift_for_next_token(model(ids), ids, mask)
    rollouts = fastrl.Rollouts(ids, mask, advantages, old_logps=old, ref_logps=old - 0.1, rollout_logps=old + 0.05)
    head = fastrl.LMHead(model.lm_head.weight, model.lm_head.bias)
    logits = model.lm_head(hidden)
    first = fastrl.policy_loss_from_logits(logits, rollouts, spec, temperature=0.9, backend=name).loss
    second = fastrl.policy_loss_from_hidden(hidden, head, rollouts, spec, normalizer=100.0, backend=name).loss
    scores = fastrl.logprobs_from_logits(logits, ids, mask=mask, backend=name)
    third = fastrl.policy_loss(scores.logps, rollouts, spec, entropy=scores.entropy, backend=name).loss
    more = fastrl.logprobs_from_hidden(hidden, head, ids, mask=mask, backend=name)
    return first + 2 * second + 3 * third + (more.logps + more.entropy).mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo warns of its own internals
@pytest.mark.parametrize("spec", ["token", "sequence", "batch"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_promise_12_compile_fullgraph(backend, spec):
    """One graph of model, every level and backward, compiled once for five shapes; the numbers are those of eager."""
    name, device = backend
    if (name, spec) == ("triton", "batch"):
        pytest.skip("needs the torch backend: 'sequence' takes the same operators through Triton")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(training_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    model = Tiny().to(device)
    parameters = list(model.parameters())
    for B, T in ((2, 4), (2, 3), (3, 4), (4, 3), (2, 6)):
        ids, mask = torch.randint(0, 29, (B, T), device=device), torch.rand(B, T, device=device) > 0.2
        batch = (ids, mask, torch.randn(B, device=device), -3 * torch.rand(B, T - 1, device=device))
        loss = compiled(model, *batch, SPECS[spec], name)
        got = torch.autograd.grad(loss, parameters)
        eager = training_loss(model, *batch, SPECS[spec], name if device == "cuda" else "torch")
        close(loss, eager, ulps=64)
        for a, b in zip(got, torch.autograd.grad(eager, parameters), strict=True):
            close(a, b, ulps=400)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, lam: Tensor, name: str) -> list[Tensor]:
    """Everything that comes before the loss, with the arguments that take a way of their own."""
    options: dict[str, Any] = {"mask": mask, "gamma": 0.99, "backend": name}
    scores, last = rewards.sum(1), values[:, 0]
    if name == "triton" and rewards.device.type == "cpu":  # the interpreter is slow: each kernel once
        return [
            *fastrl.gae(rewards, values, lam=lam, lam_returns=1.0, bootstrap=last, whiten=True, **options),
            fastrl.group_advantages(scores, group_size=2, backend=name),
        ]
    return [
        *fastrl.gae(rewards, values, lam=0.95, **options),
        *fastrl.gae(rewards, values, lam=lam, lam_returns=1.0, bootstrap=last, whiten=True, **options),
        *fastrl.gae(rewards, values, lam=lam, carry_masked=False, **options),
        fastrl.discounted_returns(rewards, **options),
        fastrl.reinforce_plus_plus_advantages(rewards, **options),
        fastrl.n_step_returns(rewards, values, n=3, gamma=0.9, mask=mask),
        fastrl.td_errors(rewards, values, mask=mask),
        *fastrl.kl_shaped_rewards(scores, values, values - 0.1, mask=mask, kl_coef=0.1),
        fastrl.group_advantages(scores, group_size=2, backend=name),
        fastrl.group_advantages(scores, group_ids=mask.sum(1), scale="batch", backend=name),
        fastrl.pass_at_k_advantages(scores, group_size=2, backend=name),
        fastrl.remax_advantages(rewards, last, mask=mask),
    ]


@pytest.mark.filterwarnings("ignore")  # dynamo warns of its own internals
@pytest.mark.parametrize("backend", BACKENDS)
def test_returns_and_advantages_compile_fullgraph(backend):
    """One graph for every batch size and length; the numbers are those of eager, to the bit where it is one backend."""
    name, device = backend
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(advantages, fullgraph=True, dynamic=True, backend="aot_eager")
    shapes = ((4, 12), (6, 9), (8, 40), (2, 7))
    for B, T in shapes if (name, device) != ("triton", "cpu") else ((4, 3), (6, 5)):  # the interpreter is slow
        batch = torch.randn(2, B, T, device=device)
        mask, lam = torch.rand(B, T, device=device) > 0.2, torch.rand(B, device=device)
        for got, eager in zip(compiled(*batch, mask, lam, name), advantages(*batch, mask, lam, name), strict=True):
            close(got, eager, ulps=16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")  # AOTAutograd warns of its own internals
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_returns_and_advantages(backend):
    name, device = backend
    rewards, values = torch.randn(2, 4, 6, device=device)
    keep, lam = torch.rand(4, 6, device=device) > 0.3, torch.rand(4, device=device)
    scan, groups = torch.ops.fastrl.lambda_returns.default, torch.ops.fastrl.group_advantages.default
    samples = [
        (rewards, values, keep, values[:, 0], 0.9, None, lam, 1.0, None, False),
        (rewards, None, None, None, 0.9, 1.0, None, None, None, True),
    ]
    if name == "torch":
        samples += [(rewards.double(), values.double(), keep, None, 0.9, 0.5, None, None, lam.double(), True)]
    for sample in samples:
        torch.library.opcheck(scan, (*sample, name))
    ids = torch.tensor([3, 1, 3, 1], device=device)
    for grouping in ((2, None, None), (0, ids, None), (0, ids, torch.ones(4, device=device))):
        baseline = "mean" if grouping[2] is None else "length-weighted"
        torch.library.opcheck(groups, (rewards[:, 0].contiguous(), *grouping, 1e-4, baseline, "group", name))
    if name == "torch":  # nothing to do, yet not the input itself
        torch.library.opcheck(groups, (rewards[:, 0].double(), 2, None, None, 1e-4, "none", "none", name))


@pytest.mark.filterwarnings("ignore")  # dynamo warns of its own internals
def test_the_critic_compiles_fullgraph():
    """The value loss in one graph; an aggregation with a length of its own after one call outside."""

    def critic_loss(values, returns, mask, options):
        return fastrl.value_loss(values, returns, old_values=values.detach() + 0.3, clip=0.2, mask=mask, **options)

    norm = {"aggregation": "seq-mean-token-sum-norm", "max_length": 7}
    for options in ({}, {"aggregation": "seq-mean-token-mean", "normalizer": 3.0}, norm):
        torch._dynamo.reset()
        values, returns, mask = torch.randn(3, 5).requires_grad_(), torch.randn(3, 5), torch.rand(3, 5) > 0.2
        eager = critic_loss(values, returns, mask, options)
        compiled = torch.compile(critic_loss, fullgraph=True, dynamic=True, backend="aot_eager")
        loss = compiled(values, returns, mask, options)
        close(loss, eager, ulps=16)
        close(*(torch.autograd.grad(x, values)[0] for x in (loss, eager)), ulps=16)
