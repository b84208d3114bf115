"""How many programs share a row changes no bit: a row per program, its tiles by programs of their own, and the kernel whose
programs wait for each other, here as threads of the interpreter."""

from __future__ import annotations

import inspect
import sys
import threading

import pytest
import torch
from common import ACCELERATOR, ROLLOUT_OPTIONS, make_batch

pytest.importorskip("triton", reason="needs triton")

from fastrl_kernels import fused, logprob, ticket, tune
from fastrl_kernels.tune import CHIPS, RowConfig

import fastrl
from bench.cost import counted

HAS_GPU = torch.cuda.is_available()
SPECS = {
    "grpo": fastrl.GRPO,
    "kl-entropy": fastrl.GRPO.replace(kl_coef=0.2, entropy_coef=0.05),
    "icepop": ROLLOUT_OPTIONS["icepop"],
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 columns, so that a small vocabulary has many: the interpreter takes one program after another."""
    if HAS_GPU:
        return

    def config(vocab_size, *_, **__):
        return RowConfig(16, 1, tiles=1 << (-(-vocab_size // 16) - 1).bit_length())

    for module in (logprob, fused):
        monkeypatch.setattr(module, "row_config", config)
    monkeypatch.setattr(logprob, "tile_config", config)


def set_schedule(monkeypatch, *, few=False, by_ticket=False):
    for module in (logprob, fused):
        monkeypatch.setattr(module, "few_rows", lambda *_: few)
    monkeypatch.setattr(fused, "takes_tickets", lambda *_, **__: by_ticket)
    if by_ticket and not HAS_GPU:
        monkeypatch.setattr(ticket, "_fused_ticket_kernel", InThreads(ticket._fused_ticket_kernel))


class InThreads:
    """A kernel whose programs run at once, as far as Python's threads do: what the interpreter cannot do by itself. It
    takes no program id, which the interpreter keeps once for all."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        from triton.runtime.interpreter import GridExecutor, InterpretedFunction

        # A function is rewritten on its first call, in the dictionary that other threads are reading.
        for name in [name for name in sys.modules if name.startswith("fastrl_kernels.")]:
            for value in [*vars(sys.modules[name]).values()]:
                if isinstance(value, InterpretedFunction):
                    value.rewrite()
        return GridExecutor(_Program(self.kernel.rewrite(), grid[0]), self.kernel.arg_names, grid)


class _Program:
    def __init__(self, function, count):
        self.function, self.count, self.threads, self.errors = function, count, [], []
        self.__globals__, self.__signature__ = function.__globals__, inspect.signature(function)
        self.__annotations__, self.__name__ = function.__annotations__, function.__name__

    def __call__(self, **arguments):
        self.threads.append(threading.Thread(target=self._run, kwargs=arguments, daemon=True))
        if len(self.threads) < self.count:
            return
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            for thread in reversed(self.threads):  # not in the order of their tickets
                thread.start()
            for thread in self.threads:
                thread.join(timeout=60)
                assert not thread.is_alive(), "a program waits for a tile that nobody takes"
        finally:
            sys.setswitchinterval(interval)
        if self.errors:
            raise self.errors[0]

    def _run(self, **arguments):
        try:
            self.function(**arguments)
        except Exception as error:
            self.errors.append(error)


def inputs(V, dtype=torch.float32):
    batch = make_batch(B=2, T=3, V=V, device=ACCELERATOR)
    logits = torch.randn(2, 3, V) * 3
    logits[0, 0, : V // 2] = -torch.inf  # whole tiles
    logits[0, 0, batch.rollouts.token_ids[0, 0]] = 0.0
    logits[~batch.rollouts.mask.cpu()] = torch.nan
    return logits.to(ACCELERATOR, dtype), batch.rollouts


def results(logits, rollouts, spec, **options):
    leaf = logits.clone().requires_grad_()
    given = leaf.clone() if options.get("inplace") else leaf
    out = fastrl.policy_loss_from_logits(given, rollouts, spec, backend="triton", temperature=0.9, **options)
    (gradient,) = torch.autograd.grad(out.loss, given)
    return out.loss.detach(), out.logps, out.entropy, gradient


def equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.accelerator
@pytest.mark.parametrize("V", [17, 100])
def test_scoring(monkeypatch, small_tiles, V):
    """Log-probs, entropies and their gradients; whatever the schedule, as plain torch within rounding."""
    logits, rollouts = inputs(V)

    def run(schedule):
        set_schedule(monkeypatch, few=schedule)
        leaf = logits.clone().requires_grad_()
        out = fastrl.logprobs_from_logits(leaf, rollouts.token_ids, mask=rollouts.mask, backend="triton")
        (gradient,) = torch.autograd.grad((out.logps.sum(), out.entropy.sum()), leaf, allow_unused=True)
        return out.logps.detach(), out.entropy.detach(), gradient

    got = run(False)
    equal(got, run(True))
    plain = fastrl.logprobs_from_logits(logits, rollouts.token_ids, mask=rollouts.mask, backend="torch")
    torch.testing.assert_close(got[0], plain.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], plain.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.accelerator
@pytest.mark.parametrize("spec", list(SPECS))
@pytest.mark.parametrize("schedule", ["tiles", "tickets"])
def test_one_pass_loss(monkeypatch, small_tiles, schedule, spec):
    """Loss, log-probs, entropies and the gradient are those of a row per program, to the bit."""
    logits, rollouts = inputs(50)
    set_schedule(monkeypatch)
    want = results(logits, rollouts, SPECS[spec])
    set_schedule(monkeypatch, few=schedule == "tiles", by_ticket=schedule == "tickets")
    equal(results(logits, rollouts, SPECS[spec]), want)


@pytest.mark.accelerator
@pytest.mark.parametrize("schedule", ["tiles", "tickets"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_pass_loss_in_place(monkeypatch, small_tiles, schedule, dtype):
    """Nobody writes a tile that another program has still to read."""
    logits, rollouts = inputs(50, dtype)
    set_schedule(monkeypatch)
    want = results(logits, rollouts, fastrl.GRPO)
    set_schedule(monkeypatch, few=schedule == "tiles", by_ticket=schedule == "tickets")
    equal(results(logits, rollouts, fastrl.GRPO, inplace=True), want)


@pytest.mark.skipif(HAS_GPU, reason="counts in the interpreter")
def test_tickets_read_each_logit_once(monkeypatch, small_tiles):
    """2 bytes read and 2 written per bf16 logit: the row per program reads all but its kept tile again."""
    logits = torch.randn(2, 2, 160).bfloat16()
    ids = torch.zeros(2, 2, dtype=torch.long)
    rollouts = fastrl.Rollouts(ids, None, torch.ones(2))

    def cost(by_ticket):
        """Bytes read of the logits, and bytes written of their gradient."""
        set_schedule(monkeypatch, by_ticket=by_ticket)
        with counted(half_only=True) as traffic:
            results(logits, rollouts, fastrl.GRPO)
        return traffic.issued["read"], traffic.issued["written"]

    rows, target = 2 * logits.numel(), 2 * 4  # the target's logit is read once more
    assert cost(by_ticket=True) == (rows + target, rows)
    kept = 2 * 4 * 16
    assert cost(by_ticket=False) == (2 * rows - kept + target, rows)


@pytest.mark.accelerator
def test_a_row_alone_and_in_a_batch(monkeypatch, small_tiles):
    """Promise 9 across schedules: few rows go by tiles, many by rows."""
    logits = torch.randn(2, 3, 100, device=ACCELERATOR)
    ids = torch.randint(0, 100, (2, 3), device=ACCELERATOR)
    set_schedule(monkeypatch)
    many = fastrl.logprobs_from_logits(logits, ids, backend="triton")
    set_schedule(monkeypatch, few=True)
    one = fastrl.logprobs_from_logits(logits[1:, 2:], ids[1:, 2:], backend="triton")
    assert torch.equal(one.logps[0, 0], many.logps[1, 2]) and torch.equal(one.entropy[0, 0], many.entropy[1, 2])


@pytest.mark.skipif(HAS_GPU, reason="of the interpreter")
def test_tickets_never_in_the_interpreter():
    """It would wait forever: asking for it changes nothing there."""
    with ticket.tickets(True):
        assert not ticket.takes_tickets(151936, 2, "interpreter")
        assert ticket.takes_tickets(151936, 2, "sm_90")
        assert not ticket.takes_tickets(1000, 2, "sm_90")  # one tile
        tiles = -(-151936 // tune.row_config(151936, 2, "sm_90").block_v)
        assert ticket.takes_tickets(151936, 2, "sm_90", multiprocessors=2 * tiles)
        assert not ticket.takes_tickets(151936, 2, "sm_90", multiprocessors=2 * tiles - 1)  # a slice of the chip
    assert not ticket.takes_tickets(151936, 2, "sm_90")  # not measured to win


@pytest.mark.gpu
def test_tickets_on_a_gpu():
    """The real kernel, over rows enough for many waves, against a row per program."""
    ids = torch.randint(0, 151936, (64, 32), device="cuda")
    logits = torch.randn(64, 32, 151936, device="cuda", dtype=torch.bfloat16)
    rollouts = fastrl.Rollouts(ids, None, torch.randn(64, device="cuda"), old_logps=torch.full(ids.shape, -12.0).cuda())
    with ticket.tickets(True):
        got = results(logits, rollouts, fastrl.GRPO)
    equal(got, results(logits, rollouts, fastrl.GRPO))


@pytest.mark.parametrize("arch", list(CHIPS))
def test_row_configurations(arch):
    """Powers of two that hold 16 values a thread (8 with a softcap), at most 1024 threads, never a function of N; and
    the rows in flight fit the cache wherever the largest program lets them."""
    chip = CHIPS[arch]
    for vocab in (1, 17, 4096, 32000, 50257, 128256, 151936, 262144):
        for size in (2, 4):
            for softcap in (False, True):
                config = tune.row_config(vocab, size, arch, softcap)
                threads = config.num_warps * chip.warp_size
                assert threads <= 1024 and config.block_v <= threads * (8 if softcap else 16)
                assert config.block_v * config.tiles >= vocab and config.tiles < 2 * max(1, vocab / config.block_v) + 1
                assert config.tiles <= threads or config.tiles == 1  # one value per thread, in every kernel
    variant = ("a kernel of this test", arch)
    assert tune.few_rows(chip.multiprocessors - 1, arch, variant)
    assert not tune.few_rows(chip.multiprocessors, arch, variant)
    assert not tune.few_rows(1, arch, variant)  # it has met more, and is compiled for that
    assert not tune.few_rows(1, "interpreter", ("another", arch))
