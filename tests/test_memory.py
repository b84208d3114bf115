"""Promise 11 on a CPU: the hidden level never holds [N, V]; peak memory is the gradients and one buffer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastrl

# Peak resident memory is the process's own and never falls, so each measurement is a process of its own.
SCRIPT = """
import resource, sys, torch, fastrl
torch.set_num_threads(1)
N, H, V = 1024, 64, 32768
hidden = torch.randn(1, N, H, requires_grad=True)
weight = torch.randn(V, H, requires_grad={trainable})
ids = torch.randint(0, V, (1, N))
rollouts = fastrl.Rollouts(ids, advantages=torch.ones(1), old_logps=torch.full((1, N), -10.0))
small = fastrl.Rollouts(ids[:, :8], advantages=torch.ones(1))
fastrl.policy_loss_from_hidden(hidden[:, :8], fastrl.LMHead(weight[:64]), {small}, {spec}).loss.backward()
hidden.grad = weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(weight), rollouts, {spec}, buffer_bytes={buffer})
if {backward}:
    out.loss.backward()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
LOGITS = 1024 * 32768 * 4
WEIGHT = 32768 * 64 * 4
BUFFER = 16 * 2**20
SLACK = 24 * 2**20  # BLAS packing buffers, the allocator, [N, H]


def peak(trainable: bool, spec: str = "fastrl.GRPO", backward: bool = True) -> int:
    small = "fastrl.Rollouts(ids[:, :8] % 64, advantages=torch.ones(1))"
    text = SCRIPT.format(trainable=trainable, spec=spec, buffer=BUFFER, backward=backward, small=small)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("spec", ["fastrl.GRPO", "fastrl.LossSpec(objective=lambda d, a: -d * a, entropy_coef=0.1)"])
def test_trainable_head(spec):
    assert peak(True, spec) <= WEIGHT + BUFFER + SLACK < LOGITS


def test_frozen_head_allocates_no_gradient_of_it():
    """fla#1248, Liger#1441: a frozen head still allocated [V, H]."""
    assert peak(False) <= BUFFER + SLACK < WEIGHT + BUFFER + SLACK


def test_scoring_allocates_no_gradient():
    assert peak(False, backward=False) <= BUFFER + SLACK


def test_a_sequence_over_the_buffer_is_computed_twice_instead_of_held():
    assert peak(True, "fastrl.GSPO") <= WEIGHT + BUFFER + SLACK


@pytest.mark.parametrize("spec", [fastrl.GRPO, fastrl.GSPO], ids=["token", "sequence"])
def test_no_tensor_of_the_size_of_the_logits(spec, monkeypatch):
    """Nor in pieces: no single allocation over the buffer, the weight gradient and a megabyte of working space."""
    N, H, V = 96, 8, 4096
    limit = 8 * V * 4
    seen = []
    original = torch.empty

    def watching(*args, **kwargs):
        out = original(*args, **kwargs)
        seen.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch, "empty", watching)
    hidden, weight = torch.randn(2, N // 2, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    rollouts = fastrl.Rollouts(torch.randint(0, V, (2, N // 2)), advantages=torch.ones(2))
    head = fastrl.LMHead(weight)
    fastrl.policy_loss_from_hidden(hidden, head, rollouts, spec, buffer_bytes=limit).loss.backward()
    assert max(seen) <= limit + 2**20 < N * V * 4


@pytest.mark.gpu
def test_peak_memory_on_the_gpu():
    N, H, V = 8192, 512, 65536
    hidden = torch.randn(1, N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rollouts = fastrl.Rollouts(torch.randint(0, V, (1, N), device="cuda"), advantages=torch.ones(1, device="cuda"))
    buffer = 128 * 2**20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(weight), rollouts, buffer_bytes=buffer).loss.backward()
    gradients = N * H * 2 + V * H * (4 + 2)  # dhidden; dweight in fp32 and, at the end, in bf16
    assert torch.cuda.max_memory_allocated() - before <= gradients + buffer + 64 * 2**20
