"""What each of two processes does in test_distributed: the cases, each held against one process over all the data."""

from __future__ import annotations

import contextlib
import datetime
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastrl
from fastrl.head_weights import LowRank

V, H, RANKS = 23, 8, 2
# (sequences, tokens) of every micro-batch of each rank: unequal within a rank and between ranks.
MICRO_BATCHES = (((2, 7), (1, 3)), ((1, 4), (3, 2)))


class Policy(nn.Module):
    """A backbone and a head, and the loss inside of forward: what DDP and FSDP2 are to wrap."""

    def __init__(self, spec: fastrl.LossSpec, *, tied: bool = False, bias: bool = False, lora: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spec = spec
        self.embed, self.body = nn.Embedding(V, H), nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H))
        self.lm_head = nn.Linear(H, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.lora = nn.ParameterList([torch.randn(2, H), torch.randn(V, 2)] if lora else [])
        self.lm_head.requires_grad_(not lora)

    def backbone(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids))

    def forward(self, ids: Tensor, rollouts: fastrl.Rollouts, normalizer: Tensor) -> fastrl.LossOutput:
        return self.loss(self.backbone(ids), rollouts, normalizer)

    def loss(self, hidden: Tensor, rollouts: fastrl.Rollouts, normalizer: Tensor) -> fastrl.LossOutput:
        adapters = (LowRank(*self.lora, scaling=0.5),) if len(self.lora) else ()
        head = fastrl.LMHead(self.lm_head.weight, self.lm_head.bias, softcap=5.0, adapters=adapters)
        return fastrl.policy_loss_from_hidden(hidden, head, rollouts, self.spec, normalizer=normalizer)


def micro_batches(rank: int, dtype: torch.dtype) -> list[tuple[Tensor, fastrl.Rollouts]]:
    """The inputs of the model and what was sampled, of one rank."""
    made = []
    for i, (B, T) in enumerate(MICRO_BATCHES[rank]):
        g = torch.Generator().manual_seed(10 * rank + i)
        ids, targets = (torch.randint(0, V, (B, T), generator=g) for _ in range(2))
        mask = torch.rand(B, T, generator=g) > 0.2
        old = -3 + 0.1 * torch.randn(B, T, generator=g, dtype=dtype)
        advantages = torch.randn(B, generator=g, dtype=dtype)
        made.append((ids, fastrl.Rollouts(targets, mask, advantages, old_logps=old, ref_logps=old + 0.1)))
    return made


def total(spec: fastrl.LossSpec, batches: list[tuple[Tensor, fastrl.Rollouts]]) -> Tensor:
    """The denominator of all micro-batches."""
    return sum(rollouts.normalizer(spec) for _, rollouts in batches)


def one_process(policy: Policy, dtype: torch.dtype) -> tuple[Tensor, fastrl.Metrics, dict[str, Tensor]]:
    """Loss, metrics and gradients over the data of all ranks."""
    batches = [batch for rank in range(RANKS) for batch in micro_batches(rank, dtype)]
    normalizer = total(policy.spec, batches)
    outputs = [policy(*batch, normalizer) for batch in batches]
    sum(out.loss for out in outputs).backward()
    metrics = outputs[0].metrics
    for out in outputs[1:]:
        metrics = metrics.merge(out.metrics)
    return sum(out.loss.detach() for out in outputs), metrics, gradients(policy)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, whole."""
    found = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        found[name.removeprefix("module.")] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def hold(case: str, got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys(), case
    for name, gradient in want.items():
        error = (got[name].double() - gradient.double()).abs().max() / gradient.double().abs().max()
        assert error <= tolerance, f"{case}: {name} differs by {error:.2g}"


def accumulate(case: str, module: Any, loss: Any, dtype: torch.dtype, spec: fastrl.LossSpec) -> fastrl.Metrics:
    """Both micro-batches of this rank, gradients exchanged with the second one only; the metrics of all ranks.

    The wrappers average over ranks, so the sum over the global denominator needs normalizer = D / ranks.
    """
    batches = micro_batches(dist.get_rank(), dtype)
    mine = total(spec, batches)
    dist.all_reduce(mine)
    metrics = None
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        waiting: Any = contextlib.nullcontext()
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(last)
        elif not last:
            waiting = module.no_sync()
        with waiting:
            out = loss(*batch, mine / RANKS)
            out.loss.backward()
        metrics = out.metrics if metrics is None else metrics.merge(out.metrics)
    return metrics.all_reduce()


def check(
    case: str, policy: Policy, wrap: Any, *, dtype: torch.dtype = torch.float64, tolerance: float = 1e-12
) -> None:
    """The wrapped policy's gradients and metrics are those of one process."""
    policy = policy.to(dtype)
    _, metrics, want = one_process(policy, dtype)
    policy.zero_grad()
    module, loss = wrap(policy)
    got = accumulate(case, module, loss, dtype, policy.spec)
    hold(case, gradients(module), want, tolerance)
    assert got.keys() == metrics.keys()
    for name in metrics:
        torch.testing.assert_close(
            got[name], metrics[name], rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-7), msg=f"{case}: {name}"
        )


def ddp(policy: Policy) -> tuple[Any, Any]:
    module = DistributedDataParallel(policy)
    return module, module


def fsdp2(policy: Policy, *units: nn.Module, root: bool | None = None, outside: bool = False, **options: Any) -> Any:
    """Each of `units` sharded by itself, the rest with the root; the loss inside of the root's forward or outside."""
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(policy, reshard_after_forward=root, **options)
    if not outside:
        return policy, policy
    register_fsdp_forward_method(policy, "backbone")
    return policy, lambda ids, rollouts, normalizer: policy.loss(policy.backbone(ids), rollouts, normalizer)


TOKEN = fastrl.GRPO.replace(kl_coef=0.1, entropy_coef=0.02, aggregation="token-mean")


SIZES = {
    "hidden_size": H, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": V, "eos_token_id": 1,
}  # fmt: skip


class HuggingFace(Policy):
    """A Hugging Face model whose head is read by `from_model` inside of the wrapped forward."""

    def __init__(self, spec: fastrl.LossSpec, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.spec, self.model = spec, AutoModelForCausalLM.from_config(config)

    def forward(self, ids: Tensor, rollouts: fastrl.Rollouts, normalizer: Tensor) -> fastrl.LossOutput:
        return fused_loss(self.model, ids, rollouts, self.spec, normalizer)


def fused_loss(model: Any, ids: Tensor, rollouts: fastrl.Rollouts, spec: Any, normalizer: Tensor) -> fastrl.LossOutput:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = fastrl.LMHead.from_model(model)
    return fastrl.policy_loss_from_hidden(hidden, head, rollouts, spec, normalizer=normalizer)


def fsdp2_method(policy: HuggingFace, mesh: Any) -> Any:
    """The model itself is the root, and the loss one of its methods, wrapped as a forward."""
    model = policy.model
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.fused_loss = types.MethodType(fused_loss, model)
    register_fsdp_forward_method(model, "fused_loss")

    class Named(nn.Module):  # the parameters under the names of the policy
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def set_requires_gradient_sync(self, last: bool) -> None:
            model.set_requires_gradient_sync(last)

    return Named(), lambda ids, rollouts, normalizer: model.fused_loss(ids, rollouts, policy.spec, normalizer)


def plain(mesh: Any) -> None:
    check("ddp", Policy(TOKEN, bias=True), ddp)
    check("ddp, tied, sequence ratio", Policy(fastrl.GSPO, tied=True), ddp)
    check("ddp, fp32", Policy(TOKEN), ddp, dtype=torch.float32, tolerance=2e-6)
    check("fsdp2, head with the root", Policy(TOKEN, bias=True), lambda p: fsdp2(p, p.body, mesh=mesh))
    check("fsdp2, tied", Policy(TOKEN, tied=True), lambda p: fsdp2(p, p.body, mesh=mesh))
    check("fsdp2, head by itself", Policy(TOKEN, bias=True), lambda p: fsdp2(p, p.body, p.lm_head, mesh=mesh))
    check("fsdp2, outside", Policy(fastrl.GSPO), lambda p: fsdp2(p, p.body, root=True, outside=True, mesh=mesh))
    check("fsdp2, outside, tied", Policy(TOKEN, tied=True), lambda p: fsdp2(p, root=True, outside=True, mesh=mesh))
    check("fsdp2, outside, not resharded", Policy(TOKEN), lambda p: fsdp2(p, root=False, outside=True, mesh=mesh))
    check("fsdp2, LoRA on the head", Policy(TOKEN, lora=True), lambda p: fsdp2(p, p.body, p.lm_head, mesh=mesh))
    check("fsdp2, LoRA outside", Policy(TOKEN, lora=True), lambda p: fsdp2(p, root=True, outside=True, mesh=mesh))


def special(mesh: Any) -> None:
    hybrid = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    check("hsdp, outside", Policy(TOKEN, bias=True), lambda p: fsdp2(p, root=True, outside=True, mesh=hybrid))
    half: Any = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    low = MixedPrecisionPolicy(**half, cast_forward_inputs=False)
    bf16 = {"dtype": torch.float32, "tolerance": 0.05}
    check("fsdp2, bf16", Policy(TOKEN, bias=True), lambda p: fsdp2(p, p.body, mesh=mesh, mp_policy=low), **bf16)
    try:  # FSDP2 would cast the rollouts' log-probs and the normaliser to bfloat16, which must not pass unseen
        check("cast", Policy(TOKEN), lambda p: fsdp2(p, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half)), **bf16)
    except ValueError as error:
        assert "field flat is declared" in str(error), error
    else:
        raise AssertionError("rollouts in half precision passed")


def tensor_parallel(mesh: Any) -> None:
    """A head in pieces on ranks that compute the same loss: the mean of equal gradients is the gradient."""
    (ids, rollouts), _ = micro_batches(0, torch.float64)
    torch.manual_seed(0)
    hidden, weight = torch.randn(*ids.shape, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(leaf), rollouts, TOKEN).loss.backward()
    for placement in (Shard(0), Shard(1), Replicate()):
        piece = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
        fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(piece), rollouts, TOKEN).loss.backward()
        assert piece.grad.placements == piece.placements
        hold(f"tensor parallel, {placement}", {"weight": piece.grad.full_tensor()}, {"weight": leaf.grad}, 1e-12)
    with torch.no_grad():
        scores = fastrl.logprobs_from_hidden(hidden, fastrl.LMHead(piece), rollouts.token_ids, mask=rollouts.mask)
    assert not scores.logps.requires_grad


def models(mesh: Any) -> None:
    from transformers import GraniteConfig, Qwen2Config

    for config in (Qwen2Config(**SIZES, tie_word_embeddings=True), GraniteConfig(**SIZES, logits_scaling=2.0)):
        policy = HuggingFace(TOKEN, config)
        check(f"fsdp2, {config.model_type}", policy, lambda p: fsdp2_method(p, mesh), tolerance=1e-6)


def run(rank: int, rendezvous: str) -> None:
    """Entry of a spawned process."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timeout)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for cases in (plain, special, tensor_parallel, models):
            cases(mesh)
    finally:
        dist.destroy_process_group()
