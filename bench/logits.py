"""Suite `logits`: GRPO with KL from logits, forward and backward; log-probs and entropies without gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastrl
from bench import plain
from bench.batches import SPEC, oracle_from_logits, rollouts
from bench.case import Case, Inputs, Provider, Run, Shape, Unavailable
from bench.inputs import logits_inputs, scoring_inputs
from fastrl import reference


def loss_bytes(shape: Shape) -> float:
    """2·N·V·itemsize: the logits read once and their gradient written once, whatever the implementation. Reading the
    logits twice, as a softmax gradient of a long row must unless the row stays in the cache, makes it 3·N·V."""
    return 2 * shape.rows * shape.vocab * shape.itemsize


def score_bytes(shape: Shape) -> float:
    """N·V·itemsize: the logits read once; outputs are 2 numbers per row of V."""
    return shape.rows * shape.vocab * shape.itemsize


def _eager(shape: Shape, upcast: bool = False) -> Run:
    def run(inputs: Inputs) -> Inputs:
        logits = inputs["logits"].float() if upcast else inputs["logits"]
        return {"loss": plain.grpo(plain.token_logps(logits, inputs["ids"]), inputs)}

    return run


def _compiled(shape: Shape) -> Run:
    return plain.compiled(_eager(shape), shape)


def _fastrl(shape: Shape, inplace: bool = False) -> Run:
    def run(inputs: Inputs) -> Inputs:
        logits = inputs["logits"]
        if inplace:  # a model's logits are not a leaf, and only those may be overwritten
            logits = logits.view_as(logits)
        return {"loss": fastrl.policy_loss_from_logits(logits, rollouts(inputs), SPEC, inplace=inplace).loss}

    return run


def _liger(shape: Shape) -> Run:
    if shape.device == "cpu":
        raise Unavailable("its Triton kernels need a GPU")
    try:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    except ImportError as error:
        raise Unavailable(str(error)) from None

    def run(inputs: Inputs) -> Inputs:
        mask = inputs["mask"].int()
        loss, _ = triton_grpo_loss(
            inputs["logits"], inputs["old"], inputs["ref"], inputs["ids"], inputs["advantages"], mask,
            temperature=1.0, beta=plain.KL_COEF, eps_low=plain.EPSILON, eps_high=plain.EPSILON, loss_type="grpo",
            reduce=True,
        )  # fmt: skip
        return {"loss": loss}

    return run


def _one_more_position(inputs: Inputs) -> Inputs:
    """Liger takes (B, T + 1, V) logits and ignores the last position."""
    logits = inputs["logits"].detach()
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    return inputs | {"logits": padded.requires_grad_()}


def _trl(shape: Shape) -> Run:
    try:
        from trl.trainer.utils import selective_log_softmax_and_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from None

    def run(inputs: Inputs) -> Inputs:
        # As in GRPOTrainer: the entropy is always computed, for its metric.
        logps, _ = selective_log_softmax_and_entropy(inputs["logits"], inputs["ids"], entropy_requires_grad=False)
        return {"loss": plain.grpo(logps, inputs)}

    return run


def _oracle(inputs: Inputs) -> Inputs:
    return oracle_from_logits(inputs, inputs["logits"])


def _score_eager(shape: Shape, upcast: bool = False) -> Run:
    def run(inputs: Inputs) -> Inputs:
        logits = inputs["logits"].float() if upcast else inputs["logits"]
        with torch.no_grad():
            return {"logps": plain.token_logps(logits, inputs["ids"]), "entropy": plain.entropies(logits)}

    return run


def _score_compiled(shape: Shape) -> Run:
    return plain.compiled(_score_eager(shape), shape)


def _score_fastrl(shape: Shape) -> Run:
    @torch.no_grad()
    def run(inputs: Inputs) -> Inputs:
        return fastrl.logprobs_from_logits(inputs["logits"], inputs["ids"])._asdict()

    return run


def _score_liger(shape: Shape) -> Run:
    raise Unavailable("its scoring kernel returns no entropy")


def _score_trl(shape: Shape) -> Run:
    try:
        from trl.trainer.utils import selective_log_softmax_and_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from None

    @torch.no_grad()
    def run(inputs: Inputs) -> Inputs:
        return _named(*selective_log_softmax_and_entropy(inputs["logits"], inputs["ids"]))

    return run


def _named(logps: Tensor, entropy: Tensor) -> Inputs:
    return {"logps": logps, "entropy": entropy}


def _score_oracle(inputs: Inputs) -> Inputs:
    return _named(*reference.logprobs(inputs["logits"], inputs["ids"]))


def _case(shape: Shape, kind: str) -> Case:
    half = shape.dtype != "fp32"
    grpo = kind == "grpo"
    providers = {"eager": Provider(_eager if grpo else _score_eager)}
    if half:  # in fp32 it is the same as eager
        providers["eager-fp32"] = Provider(partial(_eager if grpo else _score_eager, upcast=True))
    providers["torch.compile"] = Provider(_compiled if grpo else _score_compiled)
    providers["fastrl"] = Provider(_fastrl if grpo else _score_fastrl)
    if grpo:
        providers["fastrl-inplace"] = Provider(partial(_fastrl, inplace=True))
    providers["liger"] = Provider(_liger, _one_more_position) if grpo else Provider(_score_liger)
    providers["trl"] = Provider(_trl if grpo else _score_trl)
    return Case(
        name=f"logits-{kind}-N{shape.rows}-V{shape.vocab}-{shape.dtype}",
        suite="logits",
        shape=shape,
        make_inputs=logits_inputs if grpo else scoring_inputs,
        providers=providers,
        oracle=_oracle if grpo else _score_oracle,
        least_bytes=loss_bytes if grpo else score_bytes,
    )


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        shapes = [Shape(4, 16, 512, dtype="fp32", device=device)]
    elif device == "cpu":
        shapes = [Shape(8, 128, 32000, dtype="fp32", device=device)]
    else:
        shapes = [Shape(8, 1024, vocab, dtype="bf16", device=device) for vocab in (32000, 128256, 151936, 262144)]
    return [_case(shape, kind) for shape in shapes for kind in ("grpo", "score")]
