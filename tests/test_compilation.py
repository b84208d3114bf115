"""Promise 11 at every level: a new N, T, epsilon, coefficient or temperature compiles no kernel anew.

On a GPU Triton's own compilations are counted. Without one, each launch in the interpreter gives what Triton would look
its compiled kernel up by: the values of constexprs, of the launch options, and of the properties of arguments that a
kernel did not exempt with `do_not_specialize` and `do_not_specialize_on_alignment`.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import fastrl

V, H = 48, 16
SHAPES = [(4, 6), (2, 16), (3, 17), (1, 32), (5, 1)]  # T = 1, odd, multiples of 16


def step(i: int, device: str) -> None:
    """Every level once, everything that changes from step to step changed."""
    B, T = SHAPES[i]
    generator = torch.Generator().manual_seed(i)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    ids = torch.randint(0, V, (B, T), generator=generator).to(device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    old, advantages = normal(B, T) - 4, normal(B)
    rollouts = fastrl.Rollouts(ids, mask, advantages, old_logps=old, ref_logps=old + 0.1)
    temperature = 0.5 + 0.1 * i
    for preset in (fastrl.GRPO, fastrl.GSPO):
        spec = preset.replace(
            epsilon_low=0.1 + 0.01 * i, epsilon_high=0.2 + 0.01 * i, kl_coef=0.1 + 0.1 * i, entropy_coef=0.01 * (i + 1)
        )
        logps, logits, hidden = (x.requires_grad_() for x in (normal(B, T) - 4, normal(B, T, V), normal(B, T, H)))
        entropy = torch.ones_like(old)
        fastrl.policy_loss(logps, rollouts, spec, entropy=entropy, backend="triton").loss.backward()
        out = fastrl.policy_loss_from_logits(logits, rollouts, spec, temperature=temperature, backend="triton")
        out.loss.backward()
        head = fastrl.LMHead(WEIGHT.to(device).requires_grad_())
        out = fastrl.policy_loss_from_hidden(hidden, head, rollouts, spec, temperature=temperature, backend="triton")
        out.loss.backward()
    sparse = {"sparse_eps": 0.01 * (i + 1), "sparse_capacity": 16, "buffer_bytes": 16 * (4 * V + 32 * 16)}
    out = fastrl.policy_loss_from_hidden(hidden, head, rollouts, backend="triton", **sparse)
    out.loss.backward()
    fastrl.logprobs_from_logits(normal(B, T, V), ids, temperature=temperature, backend="triton")
    fastrl.gae(normal(B, T), normal(B, T), mask=mask, gamma=0.9 + 0.01 * i, lam=0.8, backend="triton")
    fastrl.group_advantages(normal(8 * B), group_size=8, backend="triton")


WEIGHT = torch.randn(V, H, generator=torch.Generator().manual_seed(0))


def variant(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton keys a compiled kernel by, as far as a launch in the interpreter shows it."""
    parameters = inspect.signature(kernel.fn).parameters
    unspecialised = kernel.kwargs.get("do_not_specialize") or ()
    unaligned = kernel.kwargs.get("do_not_specialize_on_alignment") or ()
    named = dict(zip(parameters, args, strict=False)) | kwargs
    key: list[Any] = [kernel.fn.__name__]
    for name, value in named.items():
        annotation = str(parameters[name].annotation) if name in parameters else "constexpr"  # a launch option
        if "constexpr" in annotation or value is None:
            key.append((name, repr(value)))
        elif isinstance(value, torch.Tensor):
            aligned = name not in unaligned and name not in unspecialised and value.data_ptr() % 16 == 0
            key.append((name, value.dtype, aligned))
        elif isinstance(value, int) and not isinstance(value, bool) and name not in unspecialised:
            key.append((name, "one" if value == 1 else value % 16 == 0))
        else:
            key.append((name, type(value)))
    return tuple(key)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launches of the interpreter are looked at")
def test_promise_11_the_key_of_a_kernel_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    launched: set[tuple[Any, ...]] = set()
    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.add(variant(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    step(0, "cpu")
    first = set(launched)
    assert len({key[0] for key in first}) > 5  # kernels, so that nothing passes unseen
    for i in range(1, len(SHAPES)):
        step(i, "cpu")
    new = launched - first
    assert not new, "\n".join(_difference(key, first) for key in sorted(new, key=str))


def _difference(key: tuple[Any, ...], known: set[tuple[Any, ...]]) -> str:
    """What sets a variant apart from the nearest known one of its kernel."""
    near = min((set(key) - set(other) for other in known if other[0] == key[0]), key=len, default=set(key))
    return f"{key[0]}: {sorted(near, key=str)}"


@pytest.mark.gpu
def test_promise_11_nothing_is_compiled_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *_, **kw: compiled.append(kw.get("repr")))
    step(0, "cuda")
    first = len(compiled)
    for i in range(1, len(SHAPES)):
        step(i, "cuda")
    assert compiled[first:] == []
