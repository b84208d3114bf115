"""Suite `hidden`: GRPO with KL from hidden states and the language-model head, trainable or frozen."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial
from typing import Any

import torch

import fastrl
from bench import peers, plain
from bench.batches import SPEC, WITHOUT_KL, oracle_from_logits, rollouts
from bench.case import Case, Inputs, Provider, Run, Shape, Unavailable
from bench.inputs import dense, hidden_inputs, realistic_inputs, realistic_layout

TRL_CHUNK = 32768
"""Vocabulary columns per tile, as in TRL's own call."""


FIRST_CALL = (4096, 4096, 151936)
"""N, H and V of the case that times a first call, and in the targets the options still to be chosen."""


def trainable_flops(shape: Shape) -> float:
    """6·N·H·V: three products of 2·N·H·V (logits, dhidden, dweight); computing the logits again makes it 8."""
    return 6 * shape.rows * shape.hidden * shape.vocab


def frozen_flops(shape: Shape) -> float:
    """4·N·H·V: logits and dhidden; computing the logits again makes it 6."""
    return 4 * shape.rows * shape.hidden * shape.vocab


def realistic_flops(shape: Shape) -> float:
    """6·H·V per token that counts, 2·H·V where its sequence has advantage zero: it is scored for the metrics only."""
    tokens = sum(length * (2 if zero else 6) for length, zero in zip(*realistic_layout(shape), strict=True))
    return tokens * shape.hidden * shape.vocab


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


def _verl(shape: Shape) -> Run:
    """verl's Triton kernels, as its actor calls them with `use_fused_kernels` and the Triton backend; on a CPU what its
    other backend calls, chunks of plain torch."""
    if shape.device == "cpu":
        return _verl_torch(shape)
    if shape.hidden % 128:
        raise Unavailable("its kernels need H in multiples of 128")
    linear_cross_entropy = peers.verl("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    peers.verl("verl.utils.kernel.kernels")  # otherwise imported inside the first call, when verl is off the path again

    def run(inputs: Inputs) -> Inputs:
        ids = inputs["ids"]
        logps, _ = linear_cross_entropy(
            inputs["hidden"].flatten(0, 1), inputs["weight"], ids.flatten(), 1.0, "none", None
        )
        return {"loss": plain.grpo(logps.view(ids.shape), inputs)}

    return run


def _verl_torch(shape: Shape) -> Run:
    fused = peers.verl("verl.utils.experimental.torch_functional").FusedLinearForPPO()

    def run(inputs: Inputs) -> Inputs:
        logps, _ = fused(inputs["hidden"], inputs["weight"], inputs["ids"])
        return {"loss": plain.grpo(logps, inputs)}

    return run


def _cut_cross_entropy(shape: Shape) -> Run:
    """Its exact variant: the default drops gradients below bf16's epsilon, which is another computation. On a CPU what
    it offers there, plain torch compiled."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(str(error)) from None
    if shape.device == "cpu":
        how: dict[str, Any] = {"impl": "torch_compile"}
    elif shape.dtype == "fp32":
        raise Unavailable("its kernels take bf16 and fp16")
    elif importlib.util.find_spec("cut_cross_entropy.cce_utils"):  # after 25.1.1, the last one on PyPI
        how = {"impl": "cce_exact"}
    else:
        how = {"impl": "cce", "filter_eps": None}

    def run(inputs: Inputs) -> Inputs:
        nll = linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["ids"], reduction="none", **how)
        return {"loss": plain.grpo(-nll, inputs)}

    return run


def _products(shape: Shape, frozen: bool) -> Run:
    """The floor: the products alone, by the vendor's library, with the whole logits in memory."""

    @torch.no_grad()
    def run(inputs: Inputs) -> Inputs:
        hidden, weight = inputs["hidden"].flatten(0, 1), inputs["weight"]
        logits = hidden @ weight.t()
        dhidden = logits @ weight
        return {"dhidden": dhidden} if frozen else {"dhidden": dhidden, "dweight": logits.t() @ hidden}

    return run


def _fastrl(shape: Shape, **more: Any) -> Run:
    """`more`: options of the call, for the providers of a choice still to be made."""

    def run(inputs: Inputs) -> Inputs:
        head = fastrl.LMHead(inputs["weight"])
        spec = SPEC if "ref" in inputs else WITHOUT_KL
        return {"loss": fastrl.policy_loss_from_hidden(inputs["hidden"], head, rollouts(inputs), spec, **more).loss}

    return run


def _liger(shape: Shape, kl_coef: float = plain.KL_COEF) -> Run:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError as error:
        raise Unavailable(str(error)) from None
    loss = LigerFusedLinearGRPOLoss(
        beta=kl_coef,
        epsilon_low=plain.EPSILON,
        epsilon_high=plain.EPSILON,
        loss_type="grpo",
        use_ref_model=kl_coef != 0,
    )

    def run(inputs: Inputs) -> Inputs:
        value, _ = loss(
            inputs["hidden"],
            inputs["weight"],
            inputs["ids"],
            inputs["mask"],
            inputs["advantages"],
            ref_per_token_logps=inputs.get("ref"),
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
    logits = inputs["hidden"] @ inputs["weight"].t()
    return oracle_from_logits(inputs, logits, SPEC if "ref" in inputs else WITHOUT_KL)


def _providers(shape: Shape, frozen: bool, kl_coef: float = plain.KL_COEF) -> dict[str, Provider]:
    providers = {"eager": Provider(_eager)}
    if shape.dtype != "fp32":  # in fp32 these are the same as eager and fastrl
        providers["eager-fp32"] = Provider(partial(_eager, upcast=True))
        providers["fastrl-fp32-logits"] = Provider(partial(_fastrl, out_dtype=torch.float32))
    return providers | {
        "torch.compile": Provider(_compiled),
        "torch-native": Provider(_native),
        "fastrl": Provider(_fastrl),
        "fastrl-overlap": Provider(partial(_fastrl, overlap=True)),
        "liger": Provider(partial(_liger, kl_coef=kl_coef)),
        "trl": Provider(_trl),
        "verl": Provider(_verl),
        "cut-cross-entropy": Provider(_cut_cross_entropy),
        "floor": Provider(partial(_products, frozen=frozen), floor=True),
    }


def _sizes(shape: Shape) -> tuple[int, int, int]:
    return shape.rows, shape.hidden, shape.vocab


def _target(shape: Shape, frozen: bool) -> str:
    if shape.device == "cpu":
        return "cpu-hidden-frozen" if frozen else "cpu-hidden"
    if frozen:
        return "hidden-frozen"
    return "hidden-small" if shape.hidden < 4096 else "hidden"


def loss_case(shape: Shape, frozen: bool, only: tuple[str, ...] = (), **more: Any) -> Case:
    """GRPO with KL from hidden states; `only` some providers; `more` changes fields of the case."""
    head = "frozen" if frozen else "trainable"
    case = Case(
        name=f"hidden-{head}-N{shape.rows}-H{shape.hidden}-V{shape.vocab}-{shape.dtype}",
        suite="hidden",
        shape=shape,
        make_inputs=partial(hidden_inputs, frozen=frozen),
        providers={name: p for name, p in _providers(shape, frozen).items() if not only or name in only},
        oracle=_oracle,
        least_flops=frozen_flops if frozen else trainable_flops,
        target=_target(shape, frozen),
        first_call=_target(shape, frozen) == "hidden" and _sizes(shape) == FIRST_CALL,
    )
    return dataclasses.replace(case, **more)


def _realistic_case(shape: Shape) -> Case:
    """A batch as it comes in training, beside the same one without padding and zero advantages."""
    providers = _providers(shape, frozen=False, kl_coef=0.0)
    del providers["floor"]  # its products would be those of the dense batch
    return Case(
        name=f"hidden-realistic-N{shape.rows}-H{shape.hidden}-V{shape.vocab}-{shape.dtype}",
        suite="hidden",
        shape=shape,
        make_inputs=realistic_inputs,
        providers=providers | {"fastrl-dense": Provider(_fastrl, timed=dense)},
        oracle=_oracle,
        least_flops=realistic_flops,
        target="realistic" if shape.device != "cpu" else None,
    )


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        shape = Shape(4, 16, 512, 32, device=device)
        return [loss_case(shape, frozen=False), loss_case(shape, frozen=True), _realistic_case(shape)]
    if device == "cpu":
        # Logits of 1 GiB: where holding them, or not, is felt. The other providers take too long here.
        large = loss_case(Shape(8, 512, 65536, 256), frozen=False, only=("eager", "fastrl", "trl", "floor"))
        realistic = _realistic_case(Shape(20, 64, 32000, 256))
        return [large, loss_case(Shape(8, 64, 32000, 256), frozen=True), realistic]
    shapes = [
        Shape(8, length, vocab, hidden, "bf16", device)
        for hidden in (1536, 4096, 8192)
        for vocab in (128256, 151936)
        for length in (512, 1024)
    ]
    made = [loss_case(shape, frozen) for shape in shapes for frozen in (False, True)]
    return [*made, _realistic_case(Shape(64, 128, 151936, 4096, "bf16", device))]
