"""Promise 14: every misuse raises ValueError or TypeError with the argument, what was expected, what came, and what to
do. One row per misuse."""

from __future__ import annotations

import re

import pytest
import torch
from common import make_batch

import fastrl
from fastrl import LMHead, LossSpec, RolloutCorrection, Rollouts

IDS = torch.zeros(2, 3, dtype=torch.long)
LOGPS = -torch.ones(2, 3)
ADV = torch.ones(2)
LOGITS = torch.zeros(2, 3, 5)
HIDDEN = torch.zeros(2, 3, 4)
HEAD = LMHead(torch.zeros(5, 4))
GOOD = Rollouts(IDS, advantages=ADV)
CU = torch.tensor([0, 2, 3])
SAMPLED = Rollouts(IDS, advantages=ADV, rollout_logps=LOGPS)
WEIGHTED = Rollouts(IDS, advantages=ADV, old_logps=LOGPS, rollout_logps=LOGPS, rollout_weights=-LOGPS)


def corrected(**fields):
    return fastrl.PPO.replace(rollout=RolloutCorrection(**fields))


def grad(x):
    return x.clone().requires_grad_()


MISUSES = [
    # what is done, exception, the argument it must name, words of expectation and remedy
    ("unknown objective", lambda: LossSpec(objective="grpo"), ValueError, "objective", "'ppo_clip'", "function"),
    ("unknown preset", lambda: LossSpec.preset("dap"), ValueError, "preset", "'dapo'", ""),
    ("unknown level", lambda: LossSpec(ratio_level="word"), ValueError, "ratio_level", "'sequence'", ""),
    ("unknown estimator", lambda: LossSpec(kl_coef=1, kl_estimator="k4"), ValueError, "kl_estimator", "'k3'", ""),
    ("unknown aggregation", lambda: LossSpec(aggregation="mean"), ValueError, "aggregation", "'token-mean'", ""),
    ("negative epsilon", lambda: LossSpec(epsilon_low=-0.1), ValueError, "epsilon_low", "≥ 0", ""),
    ("epsilon_low over 1", lambda: LossSpec(epsilon_low=1.2), ValueError, "epsilon_low", "at most 1", "None"),
    ("epsilon as text", lambda: LossSpec(epsilon_high="0.2"), TypeError, "epsilon_high", "number", ""),
    ("infinite epsilon", lambda: LossSpec(epsilon_high=float("inf")), ValueError, "epsilon_high", "finite", ""),
    ("delta inside the range", lambda: LossSpec(delta=1.1), ValueError, "delta", "1 + epsilon_high", ""),
    ("dual clip of 1", lambda: LossSpec(dual_clip=1.0), ValueError, "dual_clip", "> 1", ""),
    ("clamp that overflows", lambda: LossSpec(log_ratio_clamp=100), ValueError, "log_ratio_clamp", "80", "None"),
    ("negative KL", lambda: LossSpec(kl_coef=-1.0), ValueError, "kl_coef", "≥ 0", ""),
    ("estimator without KL", lambda: LossSpec(kl_estimator="k1"), ValueError, "kl_estimator", "kl_coef", "set kl_coef"),
    ("norm without length", lambda: LossSpec(aggregation="seq-mean-token-sum-norm"), ValueError, "max_length", "int", ""),
    ("length without norm", lambda: LossSpec(max_length=4), ValueError, "max_length", "only", "leave it None"),
    (
        "clip of a custom objective",
        lambda: LossSpec(objective=lambda d, a: d, epsilon_low=0.1),
        ValueError,
        "epsilon_low",
        "custom",
        "clip inside",
    ),
    ("unknown field", lambda: LossSpec(epsilon=0.2), TypeError, "epsilon", "", ""),
    ("ids of floats", lambda: Rollouts(LOGPS, advantages=ADV), TypeError, "token_ids", "integer", "long"),
    ("ids as a list", lambda: Rollouts([[1]], advantages=ADV), TypeError, "token_ids", "torch.Tensor", ""),
    ("flat ids unpacked", lambda: Rollouts(IDS[0], advantages=ADV), ValueError, "token_ids", "(B, T)", "cu_seqlens"),
    ("mask of another shape", lambda: Rollouts(IDS, torch.ones(2, 4), ADV), ValueError, "mask", "(2, 3)", "align"),
    ("mask of weights", lambda: Rollouts(IDS, torch.full((2, 3), 0.5), ADV), ValueError, "mask", "0 and 1", "advantages"),
    ("no advantages", lambda: Rollouts(IDS), ValueError, "advantages", "either", ""),
    (
        "both",
        lambda: Rollouts(IDS, advantages=ADV, rewards=ADV, group_size=2),
        ValueError,
        "advantages",
        "either",
        "",
    ),
    ("advantages of another shape", lambda: Rollouts(IDS, advantages=torch.ones(3)), ValueError, "advantages", "(B, T)", ""),
    ("advantages with gradient", lambda: Rollouts(IDS, advantages=grad(ADV)), ValueError, "advantages", "data", "detach"),
    ("rewards without group", lambda: Rollouts(IDS, rewards=ADV), ValueError, "group_size", "exactly one", ""),
    ("group that does not divide", lambda: Rollouts(IDS, rewards=ADV, group_size=3), ValueError, "group_size", "2", "ids"),
    ("group of advantages", lambda: Rollouts(IDS, advantages=ADV, group_size=2), ValueError, "group_size", "None", "rew"),
    ("rewards per token", lambda: Rollouts(IDS, rewards=LOGPS, group_size=2), ValueError, "rewards", "(2,)", "sum"),
    (
        "group ids of floats",
        lambda: Rollouts(IDS, rewards=ADV, group_ids=ADV),
        TypeError,
        "group_ids",
        "integer",
        "long",
    ),
    ("old of another shape", lambda: Rollouts(IDS, advantages=ADV, old_logps=ADV), ValueError, "old_logps", "(2, 3)", ""),
    ("old with gradient", lambda: Rollouts(IDS, advantages=ADV, old_logps=grad(LOGPS)), ValueError, "old_logps", "", "detach"),
    ("padded ids with cu_seqlens", lambda: Rollouts(IDS, advantages=ADV, cu_seqlens=CU), ValueError, "token_ids", "(N,)", ""),
    (
        "cu_seqlens that end early",
        lambda: Rollouts(IDS.view(-1), advantages=ADV, cu_seqlens=CU),
        ValueError,
        "cu_seqlens",
        "N = 6",
        "",
    ),
    ("wrong row counts", lambda: Rollouts(IDS, advantages=ADV, row_counts=(3, 4)), ValueError, "row_counts", "", ""),
    ("split in too many", lambda: GOOD.split(3), ValueError, "n", "2", ""),
    ("pack twice", lambda: GOOD.pack()[0].pack(), ValueError, "rollouts", "padded", ""),
    ("shift of packed rows", lambda: fastrl.shift_for_next_token(HIDDEN[0], IDS[0]), ValueError, "scores", "(B, T", ""),
    ("rollouts of a dict", lambda: fastrl.policy_loss(LOGPS, {}, fastrl.PPO), TypeError, "rollouts", "Rollouts", ""),
    ("spec as a name", lambda: fastrl.policy_loss(LOGPS, GOOD, "dapo"), TypeError, "spec", "LossSpec", "preset"),
    ("logps of another shape", lambda: fastrl.policy_loss(LOGPS[:, :2], GOOD), ValueError, "logps", "(2, 3)", "shift"),
    ("logps of ints", lambda: fastrl.policy_loss(IDS, GOOD), TypeError, "logps", "floating", "float"),
    ("KL without reference", lambda: fastrl.policy_loss(LOGPS, GOOD, fastrl.PPO.replace(kl_coef=1)), ValueError, "ref_logps", "kl_coef", "kl_coef=0"),
    ("bonus without entropy", lambda: fastrl.policy_loss(LOGPS, GOOD, fastrl.PPO.replace(entropy_coef=1)), ValueError, "entropy", "entropy_coef", "logprobs_from_logits"),
    ("quantile without entropy", lambda: fastrl.policy_loss(LOGPS, GOOD, fastrl.PPO.replace(top_entropy_quantile=0.5)), ValueError, "entropy", "top_entropy_quantile", "logprobs_from_logits"),
    ("correction without a sampler", lambda: fastrl.policy_loss(LOGPS, GOOD, corrected()), ValueError, "rollout_logps", "corrects", "rollout=None"),
    ("correction beside weights", lambda: fastrl.policy_loss(LOGPS, WEIGHTED, corrected()), ValueError, "rollout_weights", "None", "rollout=None"),
    ("normalised on-policy", lambda: fastrl.policy_loss(LOGPS, SAMPLED, corrected(normalize=True)), ValueError, "old_logps", "before the loss", "no_grad"),
    ("second moment on-policy", lambda: fastrl.policy_loss(LOGPS, SAMPLED, corrected(second_moment=1.0)), ValueError, "old_logps", "before the loss", "no_grad"),
    ("excluded on-policy", lambda: fastrl.policy_loss(LOGPS, SAMPLED, corrected(mode="mask", upper=2.0, rejected_in_denominator=False)), ValueError, "old_logps", "before the loss", "no_grad"),
    ("weights of another shape", lambda: Rollouts(IDS, advantages=ADV, rollout_weights=ADV), ValueError, "rollout_weights", "(2, 3)", ""),
    ("sampler with gradient", lambda: Rollouts(IDS, advantages=ADV, rollout_logps=grad(LOGPS)), ValueError, "rollout_logps", "", "detach"),
    ("normalizer of zero", lambda: fastrl.policy_loss(LOGPS, GOOD, normalizer=0), ValueError, "normalizer", "above 0", ""),
    ("normalizer in half precision", lambda: fastrl.policy_loss(LOGPS, GOOD, normalizer=torch.tensor(3.0).bfloat16()), ValueError, "normalizer", "integer", "MixedPrecisionPolicy"),
    ("normalizer per token", lambda: fastrl.policy_loss(LOGPS, GOOD, normalizer=LOGPS), ValueError, "normalizer", "0-d", ""),
    ("normalizer of token-sum", lambda: fastrl.policy_loss(LOGPS, GOOD, fastrl.PPO.replace(aggregation="token-sum"), normalizer=3), ValueError, "normalizer", "token-sum", "token-mean"),
    ("unknown backend", lambda: fastrl.policy_loss(LOGPS, GOOD, backend="cuda"), ValueError, "backend", "'triton'", ""),
    ("triton in float64", lambda: fastrl.policy_loss(LOGPS.double(), GOOD, backend="triton"), ValueError, "backend", "float64", "auto"),
    ("logits of another batch", lambda: fastrl.policy_loss_from_logits(LOGITS[:1], GOOD), ValueError, "logits", "(B, T, V)", "shift"),
    ("logits of ints", lambda: fastrl.logprobs_from_logits(IDS[..., None], IDS), TypeError, "logits", "floating", "float"),
    ("empty vocabulary", lambda: fastrl.logprobs_from_logits(LOGITS[..., :0], IDS), ValueError, "logits", "vocabulary", ""),
    ("id over the vocabulary", lambda: fastrl.logprobs_from_logits(LOGITS, IDS + 5), ValueError, "token_ids", "[0, 5)", "mask"),
    ("id under zero", lambda: fastrl.policy_loss_from_logits(LOGITS, Rollouts(IDS - 100, advantages=ADV)), ValueError, "token_ids", "-100", "mask"),
    ("temperature of zero", lambda: fastrl.logprobs_from_logits(LOGITS, IDS, temperature=0.0), ValueError, "temperature", "above 0", ""),
    ("temperature as text", lambda: fastrl.logprobs_from_logits(LOGITS, IDS, temperature="1"), TypeError, "temperature", "number", ""),
    ("temperature per sequence", lambda: fastrl.logprobs_from_logits(LOGITS, IDS, temperature=ADV), ValueError, "temperature", "(2, 3)", "number"),
    ("trainable temperature", lambda: fastrl.logprobs_from_logits(LOGITS, IDS, temperature=grad(-LOGPS)), ValueError, "temperature", "data", "detach"),
    ("in place on a leaf", lambda: fastrl.policy_loss_from_logits(grad(LOGITS), GOOD, inplace=True), ValueError, "inplace", "leaf", ""),
    ("in place on expanded", lambda: fastrl.policy_loss_from_logits(grad(LOGITS[:1]).expand(2, 3, 5), GOOD, inplace=True), ValueError, "inplace", "expanded", ""),
    ("in place in float16", lambda: fastrl.policy_loss_from_logits(grad(LOGITS.half()) * 1, GOOD, inplace=True), ValueError, "inplace", "float16", "backward"),
    ("temperature under zero at a token", lambda: fastrl.logprobs_from_logits(LOGITS, IDS, temperature=LOGPS), ValueError, "temperature", "above 0", ""),
    ("head as a matrix", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD.weight, GOOD), TypeError, "head", "LMHead", "from_model"),
    ("hidden of another width", lambda: fastrl.policy_loss_from_hidden(LOGITS, HEAD, GOOD), ValueError, "hidden", "H = 4", ""),
    ("hidden of another dtype", lambda: fastrl.policy_loss_from_hidden(HIDDEN.bfloat16(), HEAD, GOOD), TypeError, "hidden", "float32", "autocast"),
    ("buffer of nothing", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, buffer_bytes=0), ValueError, "buffer_bytes", "positive", ""),
    ("sparse_eps of 1", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, sparse_eps=1.0), ValueError, "sparse_eps", "[0, 1)", ""),
    ("negative sparse_eps", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, sparse_eps=-1e-3), ValueError, "sparse_eps", "[0, 1)", ""),
    ("sparse_eps of NaN", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, sparse_eps=float("nan")), ValueError, "sparse_eps", "[0, 1)", ""),
    ("sparse_eps as a flag", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, sparse_eps=True), TypeError, "sparse_eps", "[0, 1)", ""),
    ("places that are no power of two", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, sparse_eps=0.1, sparse_capacity=3), ValueError, "sparse_capacity", "power of two", ""),
    ("places without a sparse gradient", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, sparse_capacity=4), ValueError, "sparse_capacity", "None without sparse_eps", "set sparse_eps"),
    ("logits in bf16 of fp32", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, out_dtype=torch.bfloat16), ValueError, "out_dtype", "torch.float32", "cast"),
    ("fp32 logits of fp64", lambda: fastrl.logprobs_from_hidden(HIDDEN.double(), LMHead(HEAD.weight.double()), IDS, out_dtype=torch.float32), ValueError, "out_dtype", "torch.float64", "cast"),
    ("overlap as a number", lambda: fastrl.policy_loss_from_hidden(HIDDEN, HEAD, GOOD, overlap=1), TypeError, "overlap", "True or False", ""),
    ("flat weight", lambda: LMHead(torch.zeros(5)), ValueError, "weight", "(V, H)", ""),
    ("bias of another length", lambda: LMHead(torch.zeros(5, 4), torch.zeros(4)), ValueError, "bias", "(5,)", ""),
    ("softcap of zero", lambda: LMHead(torch.zeros(5, 4), softcap=0.0), ValueError, "softcap", "above 0", ""),
    ("negative scale", lambda: LMHead(torch.zeros(5, 4), logit_scale=-1.0), ValueError, "logit_scale", "above 0", ""),
    ("meta weight", lambda: LMHead(torch.zeros(5, 4, device="meta")), ValueError, "weight", "materialised", ""),
    ("integer weight", lambda: LMHead(torch.zeros(5, 4, dtype=torch.int8)), TypeError, "weight", "floating", ""),
    ("model without a head", lambda: LMHead.from_model(torch.nn.Linear(2, 2)), ValueError, "model", "output embedding", "by hand"),
    ("custom that reduces", lambda: fastrl.policy_loss(LOGPS, GOOD, LossSpec(objective=lambda d, a: (d * a).sum())), ValueError, "objective", "per token", "without reducing"),
    ("custom that returns a float", lambda: fastrl.policy_loss(LOGPS, GOOD, LossSpec(objective=lambda d, a: 1.0)), ValueError, "objective", "per token", ""),
    ("baseline of another name", lambda: fastrl.group_advantages(ADV, group_size=2, baseline="median"), ValueError, "baseline", "'mean'", ""),
    ("rewards of two dimensions", lambda: fastrl.group_advantages(LOGPS, group_size=3), ValueError, "rewards", "(S,)", ""),
    ("metric of another name", lambda: fastrl.policy_loss(LOGPS, GOOD).metrics["kl"], KeyError, "kl", "approx_kl", ""),
    ("merge of different specs", lambda: fastrl.policy_loss(LOGPS, GOOD).metrics.merge(fastrl.policy_loss(LOGPS, GOOD, entropy=LOGPS).metrics), ValueError, "other", "entropy", ""),
]  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES, ids=[row[0] for row in MISUSES])
def test_promise_14(misuse):
    _, call, error, argument, expected, remedy = misuse
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    for words in (argument, expected, remedy):
        assert words in message, f"{words!r} not in {message!r}"
    if error is not KeyError and argument != "epsilon":
        assert re.match(rf"'?{argument}", message), f"the message does not begin with the argument: {message!r}"
    if not isinstance(caught.value, KeyError) and argument != "epsilon":
        assert "got" in message or "no effect" in message or "only" in message, message


def test_triton_never_falls_back_silently(monkeypatch):
    """backend="triton" on CPU tensors without the interpreter is refused with the reason."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend: .*TRITON_INTERPRET"):
        fastrl.policy_loss(LOGPS, GOOD, backend="triton")


def test_auto_says_why():
    from fastrl.backend import choose

    assert choose(torch.device("cpu"), torch.float32) == ("torch", "tensors are on cpu, not on an accelerator")
    backends = fastrl.info()["backends"]
    assert backends["cpu float32"].startswith("torch: ") and fastrl.info()["versions"]["torch"] == torch.__version__


def test_masked_ids_may_be_anything_but_valid_ones_not():
    batch = make_batch()
    assert (batch.rollouts.token_ids == -100).any()
    fastrl.policy_loss_from_logits(torch.zeros(4, 6, 37), batch.rollouts)
    with pytest.raises(ValueError, match="token_ids"):
        fastrl.policy_loss_from_logits(torch.zeros(4, 6, 3), batch.rollouts)


def test_no_assert_guards_user_input():
    """`python -O` removes asserts; the public modules raise instead."""
    import ast
    from pathlib import Path

    package = Path(fastrl.__file__).parent
    found = [
        f"{path.name}:{node.lineno}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []
