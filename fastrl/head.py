"""The language-model head that turns hidden states into logits, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastrl import _checks, head_adapters, head_model
from fastrl.head_weights import LowRank, check_matrix, whole, whole_shape, with_low_rank


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = softcap(logit_scale · (hidden @ weightᵀ + bias)), softcap(z) = softcap·tanh(z / softcap).

    The temperature of the call comes last. Scale, softcap and temperature are computed in fp32 after the matmul.

    Weight and bias may be sharded: a DTensor (FSDP2, tensor parallelism) or a partitioned ZeRO-3 parameter is gathered
    by every call that takes the head, all ranks together, and its gradient averaged over them (`head_weights.whole`).

    Args:
        weight: (V, H), dtype of the hidden states; gets a gradient if it requires one.
        bias: (V,) or None.
        logit_scale: a positive number.
        softcap: a positive number, or None for no softcap.
        adapters: LoRA adapters on the weight, which becomes weight + Σ scaling · b @ a; their gradients cost as much as
            that of the whole weight, frozen or not.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    adapters: tuple[LowRank, ...] = ()

    def __post_init__(self) -> None:
        check_matrix("weight", self.weight)
        shape = whole_shape(self.weight)
        if len(shape) != 2 or shape[0] == 0:
            remedy = "a linear layer's .weight has this shape; FSDP 1 keeps it only inside its own forward, use FSDP2"
            _checks.refuse("weight", "shape (V, H) with V > 0", self.weight, remedy)
        if self.bias is not None:
            check_matrix("bias", self.bias)
            if whole_shape(self.bias) != shape[:1]:
                _checks.refuse("bias", f"shape {shape[:1]}, (V,) as weight", self.bias)
            _checks.same_device("bias", self.bias, self.weight.device, "weight")
            if self.bias.dtype != self.weight.dtype:
                _checks.refuse("bias", f"dtype {self.weight.dtype} as weight", self.bias, "cast it", TypeError)
        _checks.number("logit_scale", self.logit_scale)
        if self.softcap is not None:
            _checks.number("softcap", self.softcap)
        for adapter in self.adapters:
            self._check_adapter(adapter)

    def _check_adapter(self, adapter: LowRank) -> None:
        V, H = whole_shape(self.weight)
        check_matrix("adapters", adapter.a)
        check_matrix("adapters", adapter.b)
        a, b = whole_shape(adapter.a), whole_shape(adapter.b)
        if len(a) != 2 or len(b) != 2 or a[1] != H or b != (V, a[0]):
            _checks.refuse("adapters", f"a of shape (r, {H}) and b of shape ({V}, r)", f"{a} and {b}")

    @property
    def hidden_size(self) -> int:
        """H."""
        return whole_shape(self.weight)[1]

    def projection(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and weight whose product are the head's, adapters included."""
        return with_low_rank(hidden, weight, self.adapters)

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, gathered if they are sharded: a collective call then."""
        return whole(self.weight), None if self.bias is None else whole(self.bias)

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """The head of a Hugging Face causal language model, with the logit transform that its config asks for.

        Under PEFT, LoRA on the head becomes `adapters`, and a head in `modules_to_save` is the active copy.

        The head is read now: call it again after the parameters were replaced or an adapter switched (an in-place
        optimiser step is fine). Under FSDP2, inside the wrapped forward, that is every step.

        Raises:
            ValueError: the head is missing, quantised, under an adapter that is no plain LoRA, or the model changes its
                logits in a way that this class does not know.
        """
        base = head_adapters.base_model(head_model.unwrapped(model))
        layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        if layer is None or not hasattr(layer, "weight"):
            remedy = "build LMHead(weight) by hand"
            _checks.refuse("model", "a model with an output embedding", type(model).__name__, remedy)
        layer, adapters = head_adapters.plain_layer(layer)
        scale, softcap = head_model.logit_transform(base)
        return cls(layer.weight, getattr(layer, "bias", None), scale, softcap, adapters)
