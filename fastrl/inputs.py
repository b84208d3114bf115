"""What the public functions check of a call, and the form they hand it on in: flat rows, targets, a denominator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import _checks
from fastrl.correction import correct_batch
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.head import LMHead
from fastrl.projection import HiddenOptions
from fastrl.rollouts import Rollouts
from fastrl.rows import Scoring
from fastrl.spec import Aggregation, LossSpec


def check_spec(spec: LossSpec, rollouts: Rollouts, has_entropy: bool) -> None:
    """What a spec needs from a batch."""
    if not isinstance(spec, LossSpec):
        _checks.refuse("spec", "a LossSpec", spec, 'e.g. fastrl.GRPO or LossSpec.preset("dapo")', TypeError)
    if not isinstance(rollouts, Rollouts):
        _checks.refuse("rollouts", "a fastrl.Rollouts", rollouts, "Rollouts(token_ids, mask, advantages)", TypeError)
    if spec.kl_coef and rollouts.ref_logps is None:
        remedy = "pass Rollouts(..., ref_logps=...) or set kl_coef=0"
        _checks.refuse("ref_logps", f"reference log-probs, as kl_coef is {spec.kl_coef}", "None", remedy)
    if spec.entropy_coef and not has_entropy:
        remedy = "pass entropy=..., e.g. from logprobs_from_logits, or set entropy_coef=0"
        _checks.refuse("entropy", f"entropies, as entropy_coef is {spec.entropy_coef}", "None", remedy)
    if spec.top_entropy_quantile < 1 and not has_entropy and rollouts.selected is None:
        remedy = "pass entropy=..., e.g. from logprobs_from_logits, or set top_entropy_quantile=1"
        expected = f"entropies, as top_entropy_quantile is {spec.top_entropy_quantile}"
        _checks.refuse("entropy", expected, "None", remedy)
    if rollouts.selected is not None and spec.top_entropy_quantile == 1:
        remedy = "set top_entropy_quantile to the fraction that was picked, or leave selected None"
        _checks.refuse("selected", "None, as top_entropy_quantile is 1", rollouts.selected, remedy)
    if spec.rollout is not None:
        _check_rollout(spec, rollouts)


def _check_rollout(spec: LossSpec, rollouts: Rollouts) -> None:
    if rollouts.rollout_weights is not None:
        remedy = "set rollout=None in the spec, or pass rollout_logps alone"
        _checks.refuse("rollout_weights", "None with a spec that computes them", rollouts.rollout_weights, remedy)
    if rollouts.rollout_logps is None:
        remedy = "pass Rollouts(..., rollout_logps=...), what the sampler reported, or set rollout=None in the spec"
        _checks.refuse("rollout_logps", "the sampler's log-probs, as the spec corrects for them", "None", remedy)
    if not spec.rollout.rejected_in_denominator and rollouts.row_counts is not None:
        remedy = "leave row_counts None: how many tokens stay is not known on the host"
        _checks.refuse("row_counts", "None with rejected_in_denominator=False", repr(rollouts.row_counts), remedy)
    if spec.rollout.by_batch and rollouts.old_logps is None:
        remedy = "pass old_logps, e.g. from logprobs_from_logits under no_grad"
        expected = "log-probs, as normalize, second_moment and rejected_in_denominator=False need them before the loss"
        _checks.refuse("old_logps", expected, "None", remedy)


def flat(rollouts: Rollouts, spec: LossSpec, dtype: torch.dtype) -> Flat:
    """The flat rows after the corrections of the whole batch, in fp32 unless the loss itself is computed in fp64."""
    flat = correct_batch(rollouts.flat, spec)
    if dtype == torch.float64:
        return flat
    narrow: dict[str, Any] = {
        name: value.float()
        for name, value in zip(Flat._fields, flat, strict=True)
        if isinstance(value, Tensor) and value.dtype == torch.float64
    }
    return flat._replace(**narrow) if narrow else flat


def aligned(name: str, value: Tensor, rollouts: Rollouts) -> None:
    remedy = "position t must score token t: see shift_for_next_token"
    _checks.shape(name, value, tuple(rollouts.shape), "the shape of rollouts.token_ids", remedy)
    _checks.same_device(name, value, rollouts.token_ids.device, "rollouts.token_ids")


def check_ids_and_mask(token_ids: Tensor, mask: Tensor | None) -> None:
    _checks.integer("token_ids", token_ids)
    if mask is not None:
        _checks.tensor("mask", mask)
        _checks.shape("mask", mask, tuple(token_ids.shape), "the shape of token_ids")
        _checks.same_device("mask", mask, token_ids.device, "token_ids")


def flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask.reshape(-1) != 0).contiguous()


def check_logits(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The logits, copied only if their inner stride is not 1."""
    _checks.floating("logits", logits)
    check_rows("logits", logits, token_ids, "V")
    if logits.shape[-1] == 0:
        _checks.refuse("logits", "a vocabulary of at least one token", logits)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def check_rows(name: str, value: Tensor, token_ids: Tensor, last: str) -> None:
    layout = {1: "(N,", 2: "(B, T,"}.get(token_ids.ndim)
    if layout is None:
        _checks.refuse("token_ids", "shape (B, T) or (N,)", token_ids)
    if value.ndim != token_ids.ndim + 1 or value.shape[:-1] != token_ids.shape:
        _checks.refuse(
            name,
            f"shape {layout} {last}) with {tuple(token_ids.shape)} as token_ids",
            value,
            f"{name}[..., t, :] must score token_ids[..., t]: see shift_for_next_token",
        )
    _checks.same_device(name, value, token_ids.device, "token_ids")


def check_hidden(hidden: Tensor, head: LMHead, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, H) hidden states, weight and bias in one dtype, that of autocast where it is on; with a LoRA adapter on the
    head H grows by its rank."""
    _checks.floating("hidden", hidden)
    if not isinstance(head, LMHead):
        _checks.refuse("head", "a fastrl.LMHead", head, "LMHead(weight, bias) or LMHead.from_model(model)", TypeError)
    check_rows("hidden", hidden, token_ids, "H")
    if hidden.shape[-1] != head.hidden_size:
        _checks.refuse("hidden", f"H = {head.hidden_size} as head.weight", hidden)
    _checks.same_device("head.weight", head.weight, hidden.device, "hidden")
    weight, bias = head.whole()
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        remedy = "cast one of them, or run under torch.autocast"
        _checks.refuse("hidden", f"dtype {weight.dtype} as head.weight", hidden, remedy, TypeError)
    hidden, weight = head.projection(hidden.reshape(-1, hidden.shape[-1]), weight)
    return hidden, weight, bias


def scoring(
    token_ids: Tensor,
    mask: Tensor | None,
    vocab: int,
    temperature: float | Tensor,
    rows: Tensor,
    head: LMHead | None = None,
) -> Scoring:
    """Checked targets and logit transform of a call."""
    ids = token_ids.reshape(-1).long().contiguous()
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (ids < 0) | (ids >= vocab)
        if mask is not None:
            outside &= mask
        if bool(outside.any()):
            bad = ids[outside][0].item()
            _checks.refuse("token_ids", f"ids in [0, {vocab}) where the mask is set", f"{bad}", "mask those positions")
    if isinstance(temperature, Tensor):
        _checks.floating("temperature", temperature)
        _checks.no_grad_needed("temperature", temperature)
        _checks.shape("temperature", temperature, tuple(token_ids.shape), "the shape of token_ids (or pass a number)")
        _checks.same_device("temperature", temperature, rows.device, "the scored rows")
        temperature = temperature.reshape(-1).to(wide(rows.dtype)).contiguous()
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ~(temperature > 0) if mask is None else ~(temperature > 0) & mask
            if bool(wrong.any()):
                _checks.refuse(
                    "temperature", "numbers above 0 where the mask is set", f"{temperature[wrong][0].item()}"
                )
    else:
        _checks.number("temperature", temperature)
    scale, softcap = (1.0, 0.0) if head is None else (head.logit_scale, head.softcap or 0.0)
    return Scoring.of(ids, mask, temperature, float(scale), float(softcap))


def normalizer(normalizer: float | Tensor | None, spec: LossSpec, like: Tensor) -> Tensor | None:
    """The caller's denominator as a 0-d tensor on the device, without a synchronisation."""
    if normalizer is None:
        return None
    if spec.aggregation == Aggregation.TOKEN_SUM:
        remedy = "use 'token-mean' with this normalizer"
        _checks.refuse("normalizer", "None with aggregation 'token-sum', which has no denominator", normalizer, remedy)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            _checks.refuse("normalizer", "a number or a 0-d tensor", normalizer)
        if normalizer.dtype in (torch.bfloat16, torch.float16):
            remedy = "half precision rounds a count of tokens; FSDP2's MixedPrecisionPolicy casts a tensor argument: "
            remedy += "pass a Python number or an integer tensor"
            _checks.refuse("normalizer", "an integer, float32 or float64 dtype", normalizer, remedy)
        _checks.no_grad_needed("normalizer", normalizer)
        if normalizer.device.type == "cpu":  # a copy from pageable memory would wait for the device; a fill does not
            return torch.full((), normalizer.item(), dtype=wide(like.dtype), device=like.device)
        return normalizer.reshape(()).to(like.device, wide(like.dtype))
    _checks.number("normalizer", normalizer)
    return torch.full((), float(normalizer), dtype=wide(like.dtype), device=like.device)


def buffer(buffer_bytes: int | None) -> int:
    """Bytes of logits held at once at the hidden level; 0 = the default of `chunking.rows_per_chunk`."""
    if buffer_bytes is None:
        return 0
    if isinstance(buffer_bytes, bool) or not isinstance(buffer_bytes, int) or buffer_bytes < 1:
        _checks.refuse("buffer_bytes", "a positive int, the bytes of logits held at once", repr(buffer_bytes))
    return buffer_bytes


SPARSE_CAPACITY = 256
"""Places per row of a sparse gradient, unless given: several times what a softmax of language keeps above 1e-4."""


def hidden_options(
    hidden: Tensor,
    buffer_bytes: int | None,
    out_dtype: torch.dtype | None,
    sparse_eps: float | None = None,
    sparse_capacity: int | None = None,
    overlap: bool = False,
) -> HiddenOptions:
    """The checked options of a call at the hidden level; `hidden` in the dtype of the products."""
    if not isinstance(overlap, bool):
        _checks.refuse("overlap", "True or False", repr(overlap), error=TypeError)
    size = buffer(buffer_bytes)
    capacity = 0 if sparse_eps is None else _capacity(sparse_eps, sparse_capacity)
    if sparse_eps is None and sparse_capacity is not None:
        remedy = "set sparse_eps as well, or leave it None"
        _checks.refuse("sparse_capacity", "None without sparse_eps", repr(sparse_capacity), remedy)
    eps = None if sparse_eps is None else float(sparse_eps)
    return HiddenOptions(size, _wide_logits(out_dtype, hidden.dtype), eps, capacity, overlap)


def _wide_logits(out_dtype: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Whether logits are computed in fp32 from operands of half the width."""
    if out_dtype is None or out_dtype == dtype:
        return False
    if out_dtype != torch.float32 or dtype == torch.float64:
        remedy = "leave it None, or cast the operands"
        _checks.refuse("out_dtype", f"None, torch.float32 for half-precision operands, or {dtype}", out_dtype, remedy)
    return True


def _capacity(eps: float, capacity: int | None) -> int:
    """Places per row, the given or the default number. Not from eps: a new eps must not compile a kernel anew."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        _checks.refuse(
            "sparse_eps", "a probability in [0, 1), or None for the exact gradient", repr(eps), error=TypeError
        )
    if not 0 <= eps < 1:
        _checks.refuse("sparse_eps", "a probability in [0, 1), or None for the exact gradient", repr(eps))
    if capacity is None:
        capacity = SPARSE_CAPACITY
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1 or capacity & (capacity - 1):
        _checks.refuse("sparse_capacity", "a power of two, the columns kept per row", repr(capacity))
    return capacity


def check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        _checks.refuse("inplace", "False under torch.compile", "True", "the compiler plans memory itself")
    if logits.dtype == torch.float16:
        remedy = "float16 leaves its gradient to backward, where the loss scale is known"
        _checks.refuse("inplace", "False for float16 logits", "True", remedy)
    if logits.is_leaf:
        _checks.refuse("inplace", "False for leaf logits", "True", "autograd needs a leaf's value to stay")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        _checks.refuse("inplace", "False for expanded logits", "True", "several rows share their memory")
