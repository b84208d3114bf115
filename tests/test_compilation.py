"""Promise 11 at every level: a new N, T, epsilon, coefficient or temperature compiles no kernel anew.

Triton's own compilations are counted: on a GPU, and without one by its launch path with a driver that launches nothing.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import fastrl

H = 16
VOCABULARIES = (48, 49)  # with rows at multiples of 16 bytes, and without
SHAPES = [(4, 6), (2, 16), (3, 17), (1, 32), (5, 1), (20, 16), (3, 5)]  # T = 1, odd, 16; few rows, many, few again


def step(i: int, V: int, device: str) -> None:
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
        head = fastrl.LMHead(WEIGHT[:V].to(device).requires_grad_())
        out = fastrl.policy_loss_from_hidden(hidden, head, rollouts, spec, temperature=temperature, backend="triton")
        out.loss.backward()
    sparse = {"sparse_eps": 0.01 * (i + 1), "sparse_capacity": 16, "buffer_bytes": 16 * (4 * V + 32 * 16)}
    out = fastrl.policy_loss_from_hidden(hidden, head, rollouts, backend="triton", **sparse)
    out.loss.backward()
    fastrl.logprobs_from_logits(normal(B, T, V), ids, temperature=temperature, backend="triton")
    fastrl.gae(normal(B, T), normal(B, T), mask=mask, gamma=0.9 + 0.01 * i, lam=0.8, backend="triton")
    fastrl.group_advantages(normal(8 * B), group_size=8, backend="triton")


WEIGHT = torch.randn(max(VOCABULARIES), H, generator=torch.Generator().manual_seed(0))


SCRIPT = """
import json, sys
sys.path.insert(0, {folder!r})
from no_driver import pretend
from test_compilation import SHAPES, step
seen = pretend(compiling={compiling})
compiled = []
for i in {steps}:
    step(i, {V}, "cpu")
    compiled.append(seen.compiled[sum(map(len, compiled)):])
print(json.dumps([compiled, sorted(set(seen.launched))]))
"""


def without_a_driver(V: int, steps: list[int], compiling: bool = False) -> tuple[list[list[str]], list[str]]:
    """(variants that each step had to compile, kernels launched), by Triton's own launch path in a process without the
    interpreter."""
    root = Path(__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    script = SCRIPT.format(folder=str(root / "tests"), V=V, steps=steps, compiling=compiling)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver that launches nothing takes the place of the real one")
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("steps", [range(len(SHAPES)), (5, 6, 0)], ids=["few rows first", "many rows first"])
def test_promise_11_no_step_compiles_another_variant(V: int, steps: Sequence[int]) -> None:
    compiled, launched = without_a_driver(V, list(steps))
    assert len(launched) >= 10 and "_fused_kernel" in launched
    assert "_tile_statistics_kernel" in launched or steps[0] != 0  # the way of few rows
    assert len(compiled[0]) > 10
    assert not any(compiled[1:]), compiled[1:]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver that launches nothing takes the place of the real one")
def test_what_a_step_launches_compiles() -> None:
    """As launched: dtypes, missing inputs and options by the arguments themselves, where codegen's builds name them."""
    without_a_driver(48, [0], compiling=True)


def test_promise_11_no_kernel_is_keyed_by_how_rows_lie() -> None:
    """Strides and element counts are 64-bit whatever their value, or fixed by V and H: a batch of over 2³¹ logits takes
    the variant of a small one."""
    from fastrl_kernels import fused, logprob, scale, sparse, sparse_sums, ticket

    kernels = {
        value.fn.__name__: value
        for module in (fused, logprob, scale, sparse, sparse_sums, ticket)
        for value in vars(module).values()
        if hasattr(value, "fn") and value.fn.__name__.endswith("_kernel")
    }
    seen = set()
    for name, kernel in kernels.items():
        unspecialised = (
            kernel.kwargs.get("do_not_specialize") or () if hasattr(kernel, "kwargs") else kernel.do_not_specialize
        )
        for parameter in inspect.signature(kernel.fn).parameters.values():
            if parameter.name in ("stride_b", "stride_t", "out_stride_b", "out_stride_t", "numel"):
                seen.add(name)
                assert "int64" in str(parameter.annotation), (name, parameter)
                assert parameter.name in unspecialised or name == "_sparsify_kernel", (name, parameter)  # a buffer's
    assert seen >= {
        "_fused_kernel",
        "_fused_ticket_kernel",
        "_logprob_fwd_kernel",
        "_logprob_bwd_kernel",
        "_scale_kernel",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("V", VOCABULARIES)
def test_promise_11_nothing_is_compiled_after_the_first_step(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *_, **kw: compiled.append(kw.get("repr")))
    step(0, V, "cuda")
    first = len(compiled)
    for i in range(1, len(SHAPES)):
        step(i, V, "cuda")
    assert compiled[first:] == []


class _Unused:
    def __getitem__(self, grid: Any) -> Any:
        raise AssertionError("the one-pass kernel was launched")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter, where few rows take the one kernel too")
@pytest.mark.parametrize("case", ["padded vocabulary", "fp32 logits"])
def test_a_gradient_that_lies_otherwise_is_taken_apart(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gradient's rows allow wider or narrower accesses than those of the logits, one kernel for both would sum
    a row in another order than scoring does: Triton lays out all of its tiles alike (`test_codegen.py` holds the
    orders of the kernels that are launched)."""
    from fastrl_kernels import fused

    B, T, V = 2, 3, 49
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, T), generator=generator)
    rollouts = fastrl.Rollouts(ids, advantages=torch.tensor([1.0, -1.0]), old_logps=torch.full((B, T), -4.0))
    wide = torch.randn(B, T, 64, generator=generator)
    hidden = torch.randn(B, T, H, generator=generator).bfloat16()

    def step(padded: bool) -> list[torch.Tensor]:
        if case == "padded vocabulary":
            leaf = wide[..., :V] if padded else wide[..., :V].contiguous()
            out = fastrl.policy_loss_from_logits(leaf.requires_grad_(), rollouts, backend="triton")
        else:
            leaf, head = hidden.clone().requires_grad_(), fastrl.LMHead(WEIGHT[:V].bfloat16())
            more = {"out_dtype": torch.float32} if padded else {}
            out = fastrl.policy_loss_from_hidden(leaf, head, rollouts, backend="triton", **more)
        out.loss.backward()
        return [out.loss, out.logps, leaf.grad]

    usual = step(False)
    monkeypatch.setattr(fused, "_fused_kernel", _Unused())
    apart = step(True)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case == "padded vocabulary" else {"rtol": 0.02, "atol": 0.02}
    for a, b in zip(apart, usual, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    with pytest.raises(AssertionError, match="was launched"):
        step(False)
