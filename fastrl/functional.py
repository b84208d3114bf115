"""The public functions: check, choose the backend, call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import _checks, autograd, inputs
from fastrl import backend as backends
from fastrl.dtypes import wide
from fastrl.flat import Flat
from fastrl.head import LMHead
from fastrl.metrics import STATISTICS, Metrics, metric_names
from fastrl.presets import GRPO
from fastrl.rollouts import Rollouts
from fastrl.spec import LossSpec


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
    inputs.check_ids_and_mask(token_ids, mask)
    logits = inputs.check_logits(logits, token_ids)
    flat_mask = inputs.flat_mask(mask)
    scoring = inputs.scoring(token_ids, flat_mask, logits.shape[-1], temperature, logits)
    params = autograd.ScoreParams(scoring, backends.of(logits, backend))
    logps, entropy = autograd.score_logits(logits, params)
    return TokenLogprobs(logps.view(token_ids.shape), entropy.view(token_ids.shape))


def logprobs_from_hidden(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    buffer_bytes: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """As `logprobs_from_logits`, from hidden states: the logits exist only one chunk of rows at a time.

    Args:
        hidden: (B, T, H) or (N, H), dtype of the head (under autocast both are cast to its dtype).
        head: the projection and its logit transform.
        buffer_bytes: bound on the logits held at once; default 1.25 GiB on an accelerator, or 2.5 GiB where that holds
            all of them and the head is a large bfloat16 one, whose gradient then needs no sum in fp32; on a CPU an
            eighth of the rows (64 to 512 of them) and at most 128 MiB.
        out_dtype: torch.float32 = logits in fp32 from bf16 or fp16 operands, not rounded between the product and the
            softmax; their gradient is rounded once, for the products of backward. Takes a row three times the memory,
            within buffer_bytes. None = the dtype of the operands.
        token_ids, temperature, mask, backend: as for `logprobs_from_logits`.

    Masked rows are dropped before the GEMM, at the cost of one host synchronisation. The gradient computes the logits
    again: 8NHV FLOP in all (6NHV for a frozen head). A row's bits depend on the vendor GEMM, which may choose by N.
    """
    inputs.check_ids_and_mask(token_ids, mask)
    hidden, weight, bias = inputs.check_hidden(hidden, head, token_ids)
    scoring = inputs.scoring(token_ids, inputs.flat_mask(mask), weight.shape[0], temperature, hidden, head)
    options = inputs.hidden_options(hidden, buffer_bytes, out_dtype)
    params = autograd.ScoreParams(scoring, backends.of(hidden, backend), options)
    logps, entropy = autograd.score_hidden(hidden, weight, bias, params)
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
    """The policy loss from log-probs: L = Σₜ wₜ·(vₜ·ℓ(ratioₜ, Aₜ) + kl_coef·KLₜ − entropy_coef·Hₜ), see `LossSpec`.

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
    inputs.check_spec(spec, rollouts, entropy is not None)
    inputs.aligned("logps", logps, rollouts)
    if entropy is not None:
        _checks.floating("entropy", entropy)
        inputs.aligned("entropy", entropy, rollouts)
    grad = torch.is_grad_enabled() and (logps.requires_grad or (entropy is not None and entropy.requires_grad))
    dtype = wide(logps.dtype)
    flat = inputs.flat(rollouts, spec, dtype)
    params = autograd.LossParams(
        flat=flat,
        normalizer=inputs.normalizer(normalizer, spec, logps),
        spec=spec,
        backend=backends.of(logps, backend),
        grad=grad,
    )
    rows = logps.reshape(-1).to(dtype)
    entropy_rows = None if entropy is None else entropy.reshape(-1).to(dtype)
    loss, statistics = autograd.token_loss(rows, entropy_rows, params)
    measured = None if entropy is None else entropy.detach()
    metrics = _metrics(statistics, rollouts, flat, spec, entropy is not None)
    return LossOutput(loss, metrics, logps.detach(), measured)


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
    logits = inputs.check_logits(logits, rollouts.token_ids)
    inputs.check_spec(spec, rollouts, has_entropy=True)
    grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and grad:
        inputs.check_inplace(logits)
    flat = inputs.flat(rollouts, spec, wide(logits.dtype))
    params = autograd.LossParams(
        flat=flat,
        normalizer=inputs.normalizer(normalizer, spec, logits),
        spec=spec,
        backend=backends.of(logits, backend),
        grad=grad,
        scoring=inputs.scoring(rollouts.token_ids, flat.mask, logits.shape[-1], temperature, logits),
        inplace=inplace,
    )
    loss, statistics, scores = autograd.logits_loss(logits, params)
    return _output(loss, statistics, scores, rollouts, flat, spec)


def policy_loss_from_hidden(
    hidden: Tensor,
    head: LMHead,
    rollouts: Rollouts,
    spec: LossSpec = GRPO,
    *,
    temperature: float | Tensor = 1.0,
    normalizer: float | Tensor | None = None,
    buffer_bytes: int | None = None,
    out_dtype: torch.dtype | None = None,
    sparse_eps: float | None = None,
    sparse_capacity: int | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """The policy loss from hidden states and the head: of the logits only one bounded buffer exists, in which their
    gradient takes their place.

    Chunks of rows go through three GEMMs, the gradients of hidden states and head computed in the same pass: 6NHV FLOP
    with a trainable head, 4NHV with a frozen one; peak memory is the gradients plus one buffer (over several chunks the
    head's gradient is added up in fp32, and beside a bf16 one that copy exists until the end). Masked rows are dropped
    first; rows that can have no gradient (zero advantage, no KL, no entropy bonus) are scored only. That costs one host
    synchronisation, or none with `rollouts.row_counts`. A sequence-level ratio chunks on sequence boundaries, and
    computes the logits twice (8NHV) if one sequence does not fit the buffer.

    Args:
        hidden, head, temperature, buffer_bytes, out_dtype: as for `logprobs_from_hidden`. The same out_dtype for
            scoring and training, so that an on-policy ratio is 1.
        rollouts, spec, normalizer, backend: as for `policy_loss`.
        sparse_eps: None = the exact gradient. A number in [0, 1): of a row's gradient keep the target and the columns
            with p > sparse_eps, an entropy bonus at the same columns, and sum those instead of multiplying matrices:
            2NHV FLOP. The loss stays exact. With δ the probability left out (its mean is the metric `dropped_mass`),
            c and e the row's derivatives by log-prob and entropy H, and f = logit_scale / temperature, the gradient of
            its logits is off by at most f·(|c| + |e|·(log(V/δ) + H))·δ in sum. For fine-tuning, where the tail of a
            softmax carries little; columns that are never likely get no gradient at all.
        sparse_capacity: how many columns a row may keep, a power of two; default 256. A row over it takes the exact
            way, its logits computed once more. To learn which rows these are costs one host synchronisation.
        overlap: compute the logits of the next rows before the gradient of the last ones is taken, so that on a GPU
            the kernels between run beside the products. Two buffers of half the rows; otherwise it changes the order of
            work alone.
    """
    hidden, weight, bias = inputs.check_hidden(hidden, head, rollouts.token_ids)
    inputs.check_spec(spec, rollouts, has_entropy=True)
    wants = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    flat = inputs.flat(rollouts, spec, wide(hidden.dtype))
    params = autograd.LossParams(
        flat=flat,
        normalizer=inputs.normalizer(normalizer, spec, hidden),
        spec=spec,
        backend=backends.of(hidden, backend),
        grad=torch.is_grad_enabled() and any(wants),
        scoring=inputs.scoring(rollouts.token_ids, flat.mask, weight.shape[0], temperature, hidden, head),
        options=inputs.hidden_options(hidden, buffer_bytes, out_dtype, sparse_eps, sparse_capacity, overlap),
        row_counts=rollouts.row_counts,
    )
    loss, statistics, scores = autograd.hidden_loss(hidden, weight, bias, params)
    return _output(loss, statistics, scores, rollouts, flat, spec)


def _metrics(statistics: Tensor, rollouts: Rollouts, flat: Flat, spec: LossSpec, entropy: bool) -> Metrics:
    names = metric_names(
        spec,
        entropy=entropy,
        ref=rollouts.ref_logps is not None,
        rollout=rollouts.rollout_logps is not None,
        weights=rollouts.rollout_weights is not None,
        sparse=statistics.shape[0] > len(STATISTICS),
    )
    return Metrics(statistics, flat.counts, names)


def _output(
    loss: Tensor, statistics: Tensor, scores: Tensor, rollouts: Rollouts, flat: Flat, spec: LossSpec
) -> LossOutput:
    logps, entropy = scores[0].view(rollouts.shape), scores[1].view(rollouts.shape)
    return LossOutput(loss, _metrics(statistics, rollouts, flat, spec, entropy=True), logps, entropy)
