"""Suite `logits`: GRPO with KL from logits, forward and backward; log-probs and entropies without gradient."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastrl
from bench import plain
from bench.batches import SEQUENCE_SPEC, SPEC, oracle_from_logits, rollouts
from bench.case import Case, Inputs, Provider, Run, Shape, Unavailable
from bench.inputs import logits_inputs, scoring_inputs
from fastrl import reference

SCORED_VOCAB = 151936
"""The vocabulary of the target for scoring."""


def loss_bytes(shape: Shape) -> float:
    """2·N·V·itemsize: the logits read once and their gradient written once, whatever the implementation. Reading the
    logits twice, as a softmax gradient of a long row must unless the row stays in the cache, makes it 3·N·V."""
    return 2 * shape.rows * shape.vocab * shape.itemsize


def sequence_bytes(shape: Shape) -> float:
    """3·N·V·itemsize: read once more, because a whole sequence is scored before its first gradient. On a CPU, whose
    last cache may hold a sequence, the same as `loss_bytes`."""
    return loss_bytes(shape) * (1.0 if shape.device == "cpu" else 1.5)


def score_bytes(shape: Shape) -> float:
    """N·V·itemsize: the logits read once; outputs are 2 numbers per row of V."""
    return shape.rows * shape.vocab * shape.itemsize


def _eager(shape: Shape, upcast: bool = False, sequence: bool = False) -> Run:
    def run(inputs: Inputs) -> Inputs:
        logits = inputs["logits"].float() if upcast else inputs["logits"]
        return {"loss": plain.grpo(plain.token_logps(logits, inputs["ids"]), inputs, sequence)}

    return run


def _compiled(shape: Shape, sequence: bool = False) -> Run:
    return plain.compiled(_eager(shape, sequence=sequence), shape)


def _fastrl(shape: Shape, inplace: bool = False, sequence: bool = False) -> Run:
    spec = SEQUENCE_SPEC if sequence else SPEC

    def run(inputs: Inputs) -> Inputs:
        logits = inputs["logits"]
        if inplace:  # a model's logits are not a leaf, and only those may be overwritten
            logits = logits.view_as(logits)
        return {"loss": fastrl.policy_loss_from_logits(logits, rollouts(inputs), spec, inplace=inplace).loss}

    return run


def _tickets(shape: Shape) -> Run:
    """fastrl with the kernel that reads each logit once, wherever it can run."""
    if shape.device == "cpu":
        raise Unavailable("its programs wait for each other, which needs a GPU")
    from fastrl_kernels.ticket import tickets

    run = _fastrl(shape)

    def by_ticket(inputs: Inputs) -> Inputs:
        with tickets(True):  # the gradient is computed in forward
            return run(inputs)

    return by_ticket


def _liger(shape: Shape, sequence: bool = False) -> Run:
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
            importance_sampling_level="sequence" if sequence else "token", reduce=True,
        )  # fmt: skip
        return {"loss": loss}

    return run


def _one_more_position(inputs: Inputs) -> Inputs:
    """Liger takes (B, T + 1, V) logits and ignores the last position."""
    logits = inputs["logits"].detach()
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    return inputs | {"logits": padded.requires_grad_()}


def _trl(shape: Shape, sequence: bool = False) -> Run:
    try:
        from trl.trainer.utils import selective_log_softmax_and_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from None

    def run(inputs: Inputs) -> Inputs:
        # As in GRPOTrainer: the entropy is always computed, for its metric.
        logps, _ = selective_log_softmax_and_entropy(inputs["logits"], inputs["ids"], entropy_requires_grad=False)
        return {"loss": plain.grpo(logps, inputs, sequence)}

    return run


def _copy(shape: Shape, sequence: bool = False) -> Run:
    """The floor: as many bytes as the logits and their gradient, read once and written once. With `sequence` half of
    them again, as many as the second read that a ratio per sequence needs."""
    again = shape.batch // 2 if sequence else 0

    def run(inputs: Inputs) -> Inputs:
        logits = inputs["logits"].detach()
        return {"copy": logits.clone(), "again": logits[:again].clone()}

    return run


def _oracle(inputs: Inputs, sequence: bool = False) -> Inputs:
    return oracle_from_logits(inputs, inputs["logits"], SEQUENCE_SPEC if sequence else SPEC)


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


def loss_case(shape: Shape, sequence: bool = False, only: tuple[str, ...] = (), **more: Any) -> Case:
    """GRPO with KL from logits, or GSPO with `sequence`; `only` some providers; `more` changes fields of the case."""
    providers = {"eager": Provider(partial(_eager, sequence=sequence))}
    if shape.dtype != "fp32":  # in fp32 it is the same as eager
        providers["eager-fp32"] = Provider(partial(_eager, upcast=True, sequence=sequence))
    providers |= {
        "torch.compile": Provider(partial(_compiled, sequence=sequence)),
        "fastrl": Provider(partial(_fastrl, sequence=sequence)),
        "fastrl-inplace": Provider(partial(_fastrl, inplace=True, sequence=sequence)),
        "liger": Provider(partial(_liger, sequence=sequence), _one_more_position),
        "trl": Provider(partial(_trl, sequence=sequence)),
        "floor": Provider(partial(_copy, sequence=sequence), floor=True),
    }
    case = Case(
        name=f"logits-{'gspo' if sequence else 'grpo'}-N{shape.rows}-V{shape.vocab}-{shape.dtype}",
        suite="logits",
        shape=shape,
        make_inputs=logits_inputs,
        providers={name: provider for name, provider in providers.items() if not only or name in only},
        oracle=partial(_oracle, sequence=sequence),
        least_bytes=sequence_bytes if sequence else loss_bytes,
        target="logits-sequence" if sequence else "logits",
        first_call=shape.vocab == SCORED_VOCAB,
    )
    return dataclasses.replace(case, **more)


def _ticket_case(shape: Shape) -> Case:
    """The kernel whose programs wait for each other, apart from all whose figures a hang would take with it."""
    case = loss_case(shape, only=("eager", "fastrl", "floor"), target=None, first_call=False, waits=True)
    providers = {**case.providers, "fastrl-tickets": Provider(_tickets)}
    return dataclasses.replace(case, name=case.name.replace("grpo", "grpo-tickets"), providers=providers)


def _score_case(shape: Shape) -> Case:
    providers = {"eager": Provider(_score_eager)}
    if shape.dtype != "fp32":
        providers["eager-fp32"] = Provider(partial(_score_eager, upcast=True))
    providers |= {
        "torch.compile": Provider(_score_compiled),
        "fastrl": Provider(_score_fastrl),
        "liger": Provider(_score_liger),
        "trl": Provider(_score_trl),
    }
    return Case(
        name=f"logits-score-N{shape.rows}-V{shape.vocab}-{shape.dtype}",
        suite="logits",
        shape=shape,
        make_inputs=scoring_inputs,
        providers=providers,
        oracle=_score_oracle,
        least_bytes=score_bytes,
        target="score" if shape.vocab == SCORED_VOCAB else None,
        first_call=shape.vocab == SCORED_VOCAB,
    )


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        shapes = [Shape(4, 16, 512, dtype="fp32", device=device)]
    elif device == "cpu":
        shapes = [Shape(8, 128, 32000, dtype="fp32", device=device)]
    else:
        shapes = [Shape(8, 1024, vocab, dtype="bf16", device=device) for vocab in (32000, 128256, 151936, 262144)]
    made = [case for s in shapes for case in (loss_case(s), loss_case(s, sequence=True), _score_case(s))]
    return made + [_ticket_case(s) for s in shapes if quick or (device != "cpu" and s.vocab == SCORED_VOCAB)]
