"""Suite `hidden`: GRPO with KL from hidden states and the language-model head, trainable or frozen."""

from __future__ import annotations

from functools import partial

import fastrl
from bench import plain
from bench.batches import SPEC, oracle_from_logits, rollouts
from bench.case import Case, Inputs, Provider, Run, Shape, Unavailable
from bench.inputs import hidden_inputs

TRL_CHUNK = 32768
"""Vocabulary columns per tile, as in TRL's own call."""


def trainable_flops(shape: Shape) -> float:
    """6·N·H·V: three products of 2·N·H·V (logits, dhidden, dweight); computing the logits again makes it 8."""
    return 6 * shape.rows * shape.hidden * shape.vocab


def frozen_flops(shape: Shape) -> float:
    """4·N·H·V: logits and dhidden; computing the logits again makes it 6."""
    return 4 * shape.rows * shape.hidden * shape.vocab


def _eager(shape: Shape, upcast: bool = False) -> Run:
    def run(inputs: Inputs) -> Inputs:
        logits = inputs["hidden"] @ inputs["weight"].t()
        logps = plain.token_logps(logits.float() if upcast else logits, inputs["ids"])
        return {"loss": plain.grpo(logps, inputs)}

    return run


def _compiled(shape: Shape) -> Run:
    return plain.compiled(_eager(shape), shape)


def _native(shape: Shape) -> Run:
    """torch's own chunked head: cross entropy without reduction is −logp."""
    try:
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError:
        raise Unavailable("torch.nn.functional.linear_cross_entropy needs torch 2.13") from None

    def run(inputs: Inputs) -> Inputs:
        ids = inputs["ids"]
        nll = linear_cross_entropy(
            inputs["hidden"].flatten(0, 1),
            inputs["weight"],
            ids.flatten(),
            reduction="none",
            options=LinearCrossEntropyOptions(),
        )
        return {"loss": plain.grpo(-nll.view(ids.shape), inputs)}

    return run


def _fastrl(shape: Shape) -> Run:
    def run(inputs: Inputs) -> Inputs:
        head = fastrl.LMHead(inputs["weight"])
        return {"loss": fastrl.policy_loss_from_hidden(inputs["hidden"], head, rollouts(inputs), SPEC).loss}

    return run


def _liger(shape: Shape) -> Run:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError as error:
        raise Unavailable(str(error)) from None
    loss = LigerFusedLinearGRPOLoss(
        beta=plain.KL_COEF, epsilon_low=plain.EPSILON, epsilon_high=plain.EPSILON, loss_type="grpo"
    )

    def run(inputs: Inputs) -> Inputs:
        value, _ = loss(
            inputs["hidden"],
            inputs["weight"],
            inputs["ids"],
            inputs["mask"],
            inputs["advantages"],
            ref_per_token_logps=inputs["ref"],
            old_per_token_logps=inputs["old"],
        )
        return {"loss": value}

    return run


def _trl(shape: Shape) -> Run:
    try:
        from trl.trainer.utils import _ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable(str(error)) from None

    def run(inputs: Inputs) -> Inputs:
        # As in GRPOTrainer: the entropy is always computed, for its metric.
        logps = _ChunkedLogProbFunction.apply(
            inputs["hidden"].flatten(0, 1),
            inputs["weight"],
            None,
            inputs["ids"].flatten(),
            1.0,
            TRL_CHUNK,
            None,
            1.0,
            ("log_probs", "entropy"),
        )[0]
        return {"loss": plain.grpo(logps.view(inputs["ids"].shape), inputs)}

    return run


def _oracle(inputs: Inputs) -> Inputs:
    return oracle_from_logits(inputs, inputs["hidden"] @ inputs["weight"].t())


def _case(shape: Shape, frozen: bool, only: tuple[str, ...] = ()) -> Case:
    providers = {"eager": Provider(_eager)}
    if shape.dtype != "fp32":  # in fp32 it is the same as eager
        providers["eager-fp32"] = Provider(partial(_eager, upcast=True))
    providers |= {
        "torch.compile": Provider(_compiled),
        "torch-native": Provider(_native),
        "fastrl": Provider(_fastrl),
        "liger": Provider(_liger),
        "trl": Provider(_trl),
    }
    head = "frozen" if frozen else "trainable"
    return Case(
        name=f"hidden-{head}-N{shape.rows}-H{shape.hidden}-V{shape.vocab}-{shape.dtype}",
        suite="hidden",
        shape=shape,
        make_inputs=partial(hidden_inputs, frozen=frozen),
        providers={name: provider for name, provider in providers.items() if not only or name in only},
        oracle=_oracle,
        least_flops=frozen_flops if frozen else trainable_flops,
    )


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        shape = Shape(4, 16, 512, 32, device=device)
        return [_case(shape, frozen=False), _case(shape, frozen=True)]
    if device == "cpu":
        # Logits of 1 GiB: where holding them, or not, is felt. The other providers take too long here.
        large = _case(Shape(8, 512, 65536, 256), frozen=False, only=("eager", "fastrl", "trl"))
        return [large, _case(Shape(8, 64, 32000, 256), frozen=True)]
    shapes = [
        Shape(8, length, vocab, hidden, "bf16", device)
        for hidden in (1536, 4096, 8192)
        for vocab in (128256, 151936)
        for length in (512, 1024)
    ]
    return [_case(shape, frozen) for shape in shapes for frozen in (False, True)]
