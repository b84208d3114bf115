"""The public functions: check, choose the backend, call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import _checks, autograd
from fastrl import backend as backends
from fastrl.flat import Flat
from fastrl.head import LMHead
from fastrl.metrics import Metrics, metric_names
from fastrl.presets import GRPO
from fastrl.reference import wide
from fastrl.rollouts import Rollouts
from fastrl.rows import Scoring
from fastrl.spec import Aggregation, LossSpec

DEFAULT_BUFFER_BYTES = {"cpu": 128 * 2**20}
"""Bytes of logits held at once at the hidden level, by device type; `_ACCELERATOR_BUFFER_BYTES` elsewhere."""
_ACCELERATOR_BUFFER_BYTES = 1280 * 2**20


class TokenLogprobs(NamedTuple):
    """Differentiable float32 log-probs and entropies (nats) in the shape of `token_ids`, 0 under the mask."""

    logps: Tensor
    entropy: Tensor


class LossOutput(NamedTuple):
    """`loss`: a differentiable 0-d float32 tensor (float64 for float64 inputs). The rest is detached."""

    loss: Tensor
    metrics: Metrics
    logps: Tensor
    entropy: Tensor | None


def logprobs_from_logits(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """log softmax(logits / temperature) at each token, and the entropy of each row, in one read of the logits.

    logpₜ = zₜ[token] − log Σ exp zₜ,  Hₜ = log Σ exp zₜ − Σ p·z,  z = logits / temperature in fp32.

    Args:
        logits: (B, T, V) or (N, V), bf16, fp16, fp32 (fp64 in the torch backend); any strides with a unit inner one
            are used without a copy. Must already include any softcap or scale of the model.
        token_ids: (B, T) or (N,) ints; anything may stand under the mask.
        temperature: a positive number, or a tensor shaped as token_ids.
        mask: as token_ids, bool or 0/1: masked rows are not read and give 0, with gradient 0.
        backend: "auto", "triton" or "torch".

    Returns:
        TokenLogprobs(logps, entropy), both differentiable with any upstream gradient; logps <= 0, 0 <= H <= log V.
        An id outside the vocabulary gives NaN (on a CPU: a ValueError). Double backward is not supported.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and what to do.
    """
    _check_ids_and_mask(token_ids, mask)
    logits = _check_logits(logits, token_ids)
    flat_mask = _flat_mask(mask)
    scoring = _scoring(token_ids, flat_mask, logits.shape[-1], temperature, logits)
    params = autograd.ScoreParams(scoring, backends.of(logits, backend))
    logps, entropy = autograd.ScoreLogits.apply(logits, params)
    return TokenLogprobs(logps.view(token_ids.shape), entropy.view(token_ids.shape))


def logprobs_from_hidden(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    buffer_bytes: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """As `logprobs_from_logits`, from hidden states: the logits exist only one chunk of rows at a time.

    Args:
        hidden: (B, T, H) or (N, H), dtype of the head (under autocast both are cast to its dtype).
        head: the projection and its logit transform.
        buffer_bytes: bound on the logits held at once; default 128 MiB on a CPU, 1.25 GiB on an accelerator.
        token_ids, temperature, mask, backend: as for `logprobs_from_logits`.

    Masked rows are dropped before the GEMM, at the cost of one host synchronisation. The gradient computes the logits
    again: 8NHV FLOP in all (6NHV for a frozen head). A row's bits depend on the vendor GEMM, which may choose by N.
    """
    _check_ids_and_mask(token_ids, mask)
    hidden, weight, bias = _check_hidden(hidden, head, token_ids)
    scoring = _scoring(token_ids, _flat_mask(mask), weight.shape[0], temperature, hidden, head)
    params = autograd.ScoreParams(scoring, backends.of(hidden, backend), _buffer(buffer_bytes, hidden))
    logps, entropy = autograd.ScoreHidden.apply(hidden, weight, bias, params)
    return TokenLogprobs(logps.view(token_ids.shape), entropy.view(token_ids.shape))


def policy_loss(
    logps: Tensor,
    rollouts: Rollouts,
    spec: LossSpec = GRPO,
    *,
    entropy: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """The policy loss from log-probs: L = Σₜ wₜ·(ℓ(ratioₜ, Aₜ) + kl_coef·KLₜ − entropy_coef·Hₜ).

    Args:
        logps: as rollouts.token_ids in shape, the current policy's log-probs; values under the mask are not read.
        rollouts: what was sampled.
        spec: which loss.
        entropy: as logps, needed when `entropy_coef != 0`, else only measured.
        normalizer: the denominator D of the aggregation, a number or a 0-d tensor, e.g. the token count of all
            micro-batches and ranks; None = this batch's own count. Never read on the host.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and what to do.
    """
    _checks.floating("logps", logps)
    _check_spec(spec, rollouts, entropy is not None)
    _aligned("logps", logps, rollouts)
    if entropy is not None:
        _checks.floating("entropy", entropy)
        _aligned("entropy", entropy, rollouts)
    grad = torch.is_grad_enabled() and (logps.requires_grad or (entropy is not None and entropy.requires_grad))
    dtype = wide(logps.dtype)
    params = autograd.LossParams(
        flat=_flat(rollouts, dtype),
        normalizer=_normalizer(normalizer, spec, logps),
        spec=spec,
        backend=backends.of(logps, backend),
        grad=grad,
    )
    rows = logps.reshape(-1).to(dtype)
    entropy_rows = None if entropy is None else entropy.reshape(-1).to(dtype)
    loss, statistics = autograd.TokenLoss.apply(rows, entropy_rows, params)
    measured = None if entropy is None else entropy.detach()
    return LossOutput(loss, _metrics(statistics, rollouts, spec, entropy is not None), logps.detach(), measured)


def policy_loss_from_logits(
    logits: Tensor,
    rollouts: Rollouts,
    spec: LossSpec = GRPO,
    *,
    temperature: float | Tensor = 1.0,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """The policy loss from logits; equals `policy_loss(*logprobs_from_logits(...))` with fewer passes over them.

    Args:
        logits, temperature: as for `logprobs_from_logits`.
        rollouts, spec, normalizer, backend: as for `policy_loss`.
        inplace: overwrite the logits with their gradient instead of allocating it. Whatever reads them later, another
            backward included, is then wrong or refused by autograd; they must not be a leaf.

    The gradient is computed in forward when, and only when, the logits require one (float16: in backward).
    """
    logits = _check_logits(logits, rollouts.token_ids)
    _check_spec(spec, rollouts, has_entropy=True)
    grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and grad:
        _check_inplace(logits)
    flat = _flat(rollouts, wide(logits.dtype))
    params = autograd.LossParams(
        flat=flat,
        normalizer=_normalizer(normalizer, spec, logits),
        spec=spec,
        backend=backends.of(logits, backend),
        grad=grad,
        scoring=_scoring(rollouts.token_ids, flat.mask, logits.shape[-1], temperature, logits),
        inplace=inplace,
    )
    loss, statistics, scores = autograd.LogitsLoss.apply(logits, params)
    return _output(loss, statistics, scores, rollouts, spec)


def policy_loss_from_hidden(
    hidden: Tensor,
    head: LMHead,
    rollouts: Rollouts,
    spec: LossSpec = GRPO,
    *,
    temperature: float | Tensor = 1.0,
    normalizer: float | Tensor | None = None,
    buffer_bytes: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """The policy loss from hidden states and the head: the [N, V] logits never exist, nor does their gradient.

    Chunks of rows go through three GEMMs, the gradients of hidden states and head computed in the same pass: 6NHV FLOP
    with a trainable head, 4NHV with a frozen one; peak memory is the gradients plus one buffer. Masked rows are dropped
    first; rows that can have no gradient (zero advantage, no KL, no entropy bonus) are scored only. That costs one host
    synchronisation, or none with `rollouts.row_counts`. A sequence-level ratio chunks on sequence boundaries, and
    computes the logits twice (8NHV) if one sequence does not fit the buffer.

    Args:
        hidden, head, temperature, buffer_bytes: as for `logprobs_from_hidden`.
        rollouts, spec, normalizer, backend: as for `policy_loss`.
    """
    hidden, weight, bias = _check_hidden(hidden, head, rollouts.token_ids)
    _check_spec(spec, rollouts, has_entropy=True)
    wants = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    flat = _flat(rollouts, wide(hidden.dtype))
    params = autograd.LossParams(
        flat=flat,
        normalizer=_normalizer(normalizer, spec, hidden),
        spec=spec,
        backend=backends.of(hidden, backend),
        grad=torch.is_grad_enabled() and any(wants),
        scoring=_scoring(rollouts.token_ids, flat.mask, weight.shape[0], temperature, hidden, head),
        buffer_bytes=_buffer(buffer_bytes, hidden),
        row_counts=rollouts.row_counts,
    )
    loss, statistics, scores = autograd.HiddenLoss.apply(hidden, weight, bias, params)
    return _output(loss, statistics, scores, rollouts, spec)


def _metrics(statistics: Tensor, rollouts: Rollouts, spec: LossSpec, entropy: bool) -> Metrics:
    ref, rollout = rollouts.ref_logps is not None, rollouts.rollout_logps is not None
    return Metrics(statistics, rollouts.flat.counts, metric_names(spec, entropy=entropy, ref=ref, rollout=rollout))


def _output(loss: Tensor, statistics: Tensor, scores: Tensor, rollouts: Rollouts, spec: LossSpec) -> LossOutput:
    logps, entropy = scores[0].view(rollouts.shape), scores[1].view(rollouts.shape)
    return LossOutput(loss, _metrics(statistics, rollouts, spec, entropy=True), logps, entropy)


def _check_spec(spec: LossSpec, rollouts: Rollouts, has_entropy: bool) -> None:
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


def _flat(rollouts: Rollouts, dtype: torch.dtype) -> Flat:
    """The flat rows, in fp32 unless the loss itself is computed in fp64."""
    flat = rollouts.flat
    if dtype == torch.float64:
        return flat
    narrow: dict[str, Any] = {
        name: value.float()
        for name, value in zip(Flat._fields, flat, strict=True)
        if isinstance(value, Tensor) and value.dtype == torch.float64
    }
    return flat._replace(**narrow) if narrow else flat


def _aligned(name: str, value: Tensor, rollouts: Rollouts) -> None:
    remedy = "position t must score token t: see shift_for_next_token"
    _checks.shape(name, value, tuple(rollouts.shape), "the shape of rollouts.token_ids", remedy)
    _checks.same_device(name, value, rollouts.token_ids.device, "rollouts.token_ids")


def _check_ids_and_mask(token_ids: Tensor, mask: Tensor | None) -> None:
    _checks.integer("token_ids", token_ids)
    if mask is not None:
        _checks.tensor("mask", mask)
        _checks.shape("mask", mask, tuple(token_ids.shape), "the shape of token_ids")
        _checks.same_device("mask", mask, token_ids.device, "token_ids")


def _flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask.reshape(-1) != 0).contiguous()


def _check_logits(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The logits, copied only if their inner stride is not 1."""
    _checks.floating("logits", logits)
    _check_rows("logits", logits, token_ids, "V")
    if logits.shape[-1] == 0:
        _checks.refuse("logits", "a vocabulary of at least one token", logits)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _check_rows(name: str, value: Tensor, token_ids: Tensor, last: str) -> None:
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


def _check_hidden(hidden: Tensor, head: LMHead, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, H) hidden states, weight and bias in one dtype, that of autocast where it is on."""
    _checks.floating("hidden", hidden)
    if not isinstance(head, LMHead):
        _checks.refuse("head", "a fastrl.LMHead", head, "LMHead(weight, bias) or LMHead.from_model(model)", TypeError)
    _check_rows("hidden", hidden, token_ids, "H")
    weight, bias = head.weight, head.bias
    if hidden.shape[-1] != weight.shape[1]:
        _checks.refuse("hidden", f"H = {weight.shape[1]} as head.weight {tuple(weight.shape)}", hidden)
    _checks.same_device("head.weight", weight, hidden.device, "hidden")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        remedy = "cast one of them, or run under torch.autocast"
        _checks.refuse("hidden", f"dtype {weight.dtype} as head.weight", hidden, remedy, TypeError)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias


def _scoring(
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
    else:
        _checks.number("temperature", temperature)
    scale, softcap = (1.0, 0.0) if head is None else (head.logit_scale, head.softcap or 0.0)
    return Scoring.of(ids, mask, temperature, float(scale), float(softcap))


def _normalizer(normalizer: float | Tensor | None, spec: LossSpec, like: Tensor) -> Tensor | None:
    """The caller's denominator as a 0-d tensor on the device, without a synchronisation."""
    if normalizer is None:
        return None
    if spec.aggregation == Aggregation.TOKEN_SUM:
        remedy = "use 'token-mean' with this normalizer"
        _checks.refuse("normalizer", "None with aggregation 'token-sum', which has no denominator", normalizer, remedy)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            _checks.refuse("normalizer", "a number or a 0-d tensor", normalizer)
        _checks.no_grad_needed("normalizer", normalizer)
        return normalizer.reshape(()).to(like.device, wide(like.dtype))
    _checks.number("normalizer", normalizer)
    return torch.full((), float(normalizer), dtype=wide(like.dtype), device=like.device)


def _buffer(buffer_bytes: int | None, hidden: Tensor) -> int:
    if buffer_bytes is None:
        return DEFAULT_BUFFER_BYTES.get(hidden.device.type, _ACCELERATOR_BUFFER_BYTES)
    if isinstance(buffer_bytes, bool) or not isinstance(buffer_bytes, int) or buffer_bytes < 1:
        _checks.refuse("buffer_bytes", "a positive int, the bytes of logits held at once", repr(buffer_bytes))
    return buffer_bytes


def _check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        _checks.refuse("inplace", "False under torch.compile", "True", "the compiler plans memory itself")
    if logits.is_leaf:
        _checks.refuse("inplace", "False for leaf logits", "True", "autograd needs a leaf's value to stay")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        _checks.refuse("inplace", "False for expanded logits", "True", "several rows share their memory")
