"""Options of the hidden level that must not change what is computed: fp32 logits from half-precision operands lose
nothing on the way, overlap only changes the order of work."""

from __future__ import annotations

import contextlib

import pytest
import torch
from common import BACKENDS, close, make_batch, truth_from_hidden
from torch.utils._python_dispatch import TorchDispatchMode

import fastrl
from fastrl import chunking, compaction, projection, torch_backend

TOKEN = fastrl.GRPO.replace(kl_coef=0.1, entropy_coef=0.02)
PLANS = [
    pytest.param(TOKEN, id="token"),
    pytest.param(fastrl.GSPO.replace(kl_coef=0.1), id="sequence"),
    pytest.param(fastrl.KL_COV, id="batch"),
]
HALF = [torch.bfloat16, torch.float16]


def run(batch, spec, backend, **options):
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    out = fastrl.policy_loss_from_hidden(
        leaves[0], batch.head(*leaves[1:]), batch.rollouts, spec, temperature=0.7, backend=backend, **options
    )
    out.loss.backward()
    return out, [leaf.grad for leaf in leaves]


@contextlib.contextmanager
def taken(monkeypatch):
    """The rows of each product of logits inside the block."""
    rows, project = [], projection.Projection._project
    with monkeypatch.context() as patch:
        patch.setattr(projection.Projection, "_project", lambda *args: rows.append(args[1].tolist()) or project(*args))
        yield rows


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spec", PLANS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_logits(backend, spec, dtype):
    """Loss, log-probs and entropies as exact as from fp32 operands; gradients rounded to the operands' dtype once."""
    name, device = backend
    batch = make_batch(dtype=dtype, device=device, softcap=20.0, logit_scale=1.3, scale=3.0)
    truth = truth_from_hidden(batch, spec)
    out, gradients = run(batch, spec, name, out_dtype=torch.float32, buffer_bytes=7 * 48 * 6)
    close(out.loss, truth.loss, ulps=200, what="loss")
    close(out.logps, truth.logps, what="logps")
    close(out.entropy, truth.entropy, what="entropy")
    rounded, _ = run(batch, spec, name)
    assert (rounded.logps.cpu() - truth.logps).abs().max() > 100 * (out.logps.cpu() - truth.logps).abs().max()
    for got, want, what in zip(gradients, truth.gradients, ("dhidden", "dweight", "dbias"), strict=True):
        assert got.dtype == dtype
        close(got, want, ulps=4, dtype=dtype, what=what)


@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scoring_and_training_have_the_same_bits(backend, dtype, rows, monkeypatch):
    """Logits of fp32 products: an on-policy ratio is exactly 1, and the gradient through the log-probs is that of the
    loss. So it is where training takes other rows at once, those without an advantage apart; but for a GPU's library,
    which may sum a product of other rows in another order."""
    name, device = backend
    batch = make_batch(T=12, H=48, dtype=dtype, device=device, garbage=False, scale=3.0)
    options = {"out_dtype": torch.float32, "backend": name, "temperature": 0.7, "buffer_bytes": rows * 48 * 6}
    ids, mask = batch.rollouts.token_ids, batch.rollouts.mask
    with torch.no_grad(), taken(monkeypatch) as scored:
        old = fastrl.logprobs_from_hidden(batch.hidden, batch.head(), ids, mask=mask, **options)
    for second in (2.0, 0.0):
        advantages = torch.tensor([1.0, second, -1.0, 0.5], device=device)
        rollouts = fastrl.Rollouts(ids, mask, advantages, old_logps=old.logps)
        hidden = batch.hidden.clone().requires_grad_()
        with taken(monkeypatch) as trained:
            out = fastrl.policy_loss_from_hidden(hidden, batch.head(), rollouts, fastrl.GRPO, **options)
        assert (trained == scored) == (second != 0)
        if device == "cpu" or trained == scored:
            assert torch.equal(out.logps, old.logps)
        close(out.logps, old.logps, ulps=8)
        for metric in ("ratio_mean", "ratio_min", "ratio_max"):
            off = abs(out.metrics[metric].item() - 1)
            assert off == 0 or (off < 1e-4 and not torch.equal(out.logps, old.logps)), metric
    (direct,) = torch.autograd.grad(out.loss, hidden)
    scores = fastrl.logprobs_from_hidden(hidden, batch.head(), ids, mask=mask, **options)
    loss = fastrl.policy_loss(scores.logps, rollouts, fastrl.GRPO, backend=name).loss
    (through,) = torch.autograd.grad(loss, hidden)
    close(through, direct, ulps=4, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_logits_of_fp32_operands_change_nothing(backend):
    name, device = backend
    batch = make_batch(device=device)
    for a, b in zip(run(batch, TOKEN, name)[1], run(batch, TOKEN, name, out_dtype=torch.float32)[1], strict=True):
        assert torch.equal(a, b)


class Sizes(TorchDispatchMode):
    """Bytes of every tensor that is made, but for views."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.seen.add((out.untyped_storage().data_ptr(), out.numel() * out.element_size(), tuple(out.shape)))
        return out


def test_fp32_logits_stay_within_the_buffer(monkeypatch):
    """Logits and gradient share buffer_bytes, and neither the head nor the logits exist in fp32 as a whole."""
    monkeypatch.setattr(projection, "_TILE_BYTES", 2**16)
    monkeypatch.setitem(torch_backend._BLOCK_BYTES, "cpu", 2**20)
    N, H, V, rows = 300, 32, 4080, 100  # rows that need no padding
    hidden = torch.randn(2, N // 2, H).bfloat16().requires_grad_()
    head = fastrl.LMHead(torch.randn(V, H).bfloat16())
    rollouts = fastrl.Rollouts(torch.randint(0, V, (2, N // 2)), advantages=torch.ones(2))
    with Sizes() as sizes:
        fastrl.policy_loss_from_hidden(hidden, head, rollouts, out_dtype=torch.float32, buffer_bytes=rows * V * 6)
    buffers = [size for _, size, shape in sizes.seen if shape == (rows, V)]
    assert sorted(buffers) == [rows * V * 2, rows * V * 4]
    block = 2 * torch_backend._BLOCK_BYTES["cpu"]  # the working space of the kernels in plain torch
    assert all(size <= block for _, size, shape in sizes.seen if shape != (rows, V))
    tiles = [size for _, size, shape in sizes.seen if shape[1:] == (H,) and shape[0] not in (N, rows)]
    assert tiles and max(tiles) == 2**16


OVERLAPPED = [
    *[pytest.param(*plan.values, {}, id=f"{plan.id}-exact") for plan in PLANS],
    pytest.param(TOKEN, {"sparse_eps": 0.05, "sparse_capacity": 32}, id="token-sparse"),
    pytest.param(TOKEN, {"out_dtype": torch.float32}, id="token-wide"),
]


@pytest.mark.parametrize(("spec", "more"), OVERLAPPED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_overlap_has_the_same_bits(backend, spec, more):
    """With twice the memory, which is the same rows at once."""
    name, device = backend
    wide = "out_dtype" in more
    batch = make_batch(B=6, device=device, dtype=torch.bfloat16 if wide else torch.float32)
    size = 9 * (48 * (6 if wide else 4) + 32 * more.get("sparse_capacity", 0))
    out, gradients = run(batch, spec, name, buffer_bytes=size, **more)
    again, same = run(batch, spec, name, buffer_bytes=2 * size, overlap=True, **more)
    assert torch.equal(out.loss, again.loss) and torch.equal(out.logps, again.logps)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_order_of_work(overlap, monkeypatch):
    """With overlap the logits of a chunk are asked for before the gradient of the one before is taken."""
    order = []

    def noted(name, function):
        def noting(self, *args, **kwargs):
            order.append(name)
            return function(self, *args, **kwargs)

        return noting

    for name in ("project", "accumulate"):
        method = f"_{name}"
        monkeypatch.setattr(projection.Projection, method, noted(name, getattr(projection.Projection, method)))
    hidden = torch.randn(1, 6, 4, requires_grad=True)
    rollouts = fastrl.Rollouts(torch.zeros(1, 6).long(), advantages=torch.ones(1))
    head = fastrl.LMHead(torch.randn(16, 4))
    fastrl.policy_loss_from_hidden(
        hidden, head, rollouts, buffer_bytes=2 * 16 * 4 * (1 + overlap), overlap=overlap, backend="torch"
    )  # fmt: skip
    alternating = ["project", "accumulate"] * 3
    ahead = ["project", "project", "accumulate", "project", "accumulate", "accumulate"]
    assert order == (ahead if overlap else alternating)


@pytest.mark.parametrize("spec", PLANS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_follow_each_other_are_not_gathered(backend, spec, monkeypatch):
    """A batch whose rows all count takes slices, with the bits of the gathered rows."""
    name, device = backend
    batch = make_batch(B=6, device=device, garbage=False)
    every = fastrl.Rollouts(
        batch.rollouts.token_ids, None, 1 + torch.rand(6, device=device), old_logps=batch.rollouts.old_logps.nan_to_num(),
        ref_logps=batch.rollouts.ref_logps.nan_to_num(),
    )  # fmt: skip
    batch.rollouts = every
    spans = set()
    project = projection.Projection._project
    monkeypatch.setattr(projection.Projection, "_project", lambda *args: spans.add(type(args[2])) or project(*args))
    out, gradients = run(batch, spec, name, buffer_bytes=7 * 48 * 4)
    assert spans == {slice}
    monkeypatch.setattr(compaction.LiveRows, "in_order", False)
    again, same = run(batch, spec, name, buffer_bytes=7 * 48 * 4)
    assert spans == {slice, torch.Tensor}
    assert torch.equal(out.loss, again.loss) and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


@pytest.mark.parametrize("rows", [100, 9])
def test_one_bfloat16_product_is_not_held_in_fp32(rows, monkeypatch):
    """Where a library sums in fp32 and rounds once, and nothing is added to it; elsewhere the head's gradient is."""
    monkeypatch.setattr(projection, "_library_widens", lambda _: rows == 100)
    monkeypatch.setattr(projection, "_LARGE_HEAD", 0)
    batch = make_batch(B=6, dtype=torch.bfloat16)
    with Sizes() as sizes:
        _, gradients = run(batch, TOKEN, "torch", buffer_bytes=rows * 48 * 2)
    shape = tuple(batch.weight.shape)
    held = [size for _, size, seen in sizes.seen if seen == shape and size == 4 * batch.weight.numel()]
    assert bool(held) == (rows == 9)
    monkeypatch.undo()
    _, wanted = run(batch, TOKEN, "torch", buffer_bytes=rows * 48 * 2)
    for got, want in zip(gradients, wanted, strict=True):
        close(got, want.double(), ulps=1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "more", "at_once"),
    [
        (8192, {}, 8192),  # 2.3 GiB of logits, instead of 1.25 and a sum
        (16384, {}, 4416),
        (8192, {"overlap": True}, 2208),
        (8192, {"buffer_bytes": 2**30}, 3533),
    ],
)
def test_rows_at_once_instead_of_an_fp32_sum(rows, more, at_once, monkeypatch):
    """A large bfloat16 head takes all rows in one product where twice the buffer holds them; so it does when scored."""
    weight = torch.empty(151936, 1024, dtype=torch.bfloat16, device="meta")
    options = projection.HiddenOptions(**{"buffer_bytes": 0, **more})
    monkeypatch.setattr(projection, "_library_widens", lambda _: True)
    assert options.rows_per_buffer(weight, rows) == at_once
    assert options.rows_per_buffer(weight.half(), rows) == min(at_once, 4416)
    monkeypatch.setattr(projection, "_library_widens", lambda _: False)
    assert options.rows_per_buffer(weight, rows) == min(at_once, 4416)


def rounded_once(rows, V, H, device, monkeypatch):
    """The head's gradient from one product and from the fp32 sum of three, and the dtypes that they were held in."""
    hidden = torch.randn(1, rows, H, device=device, dtype=torch.bfloat16)
    weight = torch.randn(V, H, device=device, dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    advantages = torch.randn(1, rows, device=device)
    rollouts = fastrl.Rollouts(torch.randint(0, V, (1, rows), device=device), advantages=advantages)
    gradients, sums = [], []
    add = projection._add_outer
    monkeypatch.setattr(
        projection, "_add_outer", lambda total, *args, **kw: sums.append(total.dtype) or add(total, *args, **kw)
    )
    for options in ({}, {"buffer_bytes": -(-rows // 3) * chunking.row_stride(V) * 2}):
        out = fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(weight), rollouts, **options)
        gradients.append(torch.autograd.grad(out.loss, weight)[0])
    return gradients, sums


ONE_AND_THREE = [torch.bfloat16, *[torch.float32] * 3]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [300, 12000])
def test_one_bfloat16_product_rounds_once_on_a_gpu(rows, monkeypatch):
    """No library splits the sum over the rows of a large head and adds the parts in bfloat16."""
    gradients, sums = rounded_once(rows, 16400, 1024, "cuda", monkeypatch)
    if torch.version.hip is None:
        assert sums == ONE_AND_THREE
    close(*gradients, ulps=1, dtype=torch.bfloat16)


def test_the_comparison_of_one_product_and_three(monkeypatch):
    """What the test above compares, where no library does it: the sum in bfloat16 is that of a CPU."""
    monkeypatch.setattr(projection, "_rounds_once", lambda _: True)
    gradients, sums = rounded_once(300, 96, 32, "cpu", monkeypatch)
    assert sums == ONE_AND_THREE
    close(*gradients, ulps=2, dtype=torch.bfloat16)


def test_options_travel_as_numbers():
    """An operator takes them as a list of floats and gets the same back."""
    for options in (
        projection.HiddenOptions(2**40 + 1),
        projection.HiddenOptions(7, True, 0.0, 256, True),
        projection.HiddenOptions(1, False, 1e-7, 4, False),
    ):
        assert projection.HiddenOptions.of(options.numbers()) == options


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo warns of its own internals
@pytest.mark.parametrize("options", [{"sparse_eps": 0.01}, {"out_dtype": torch.float32, "overlap": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend, options):
    name, device = backend
    batch = make_batch(device=device, dtype=torch.bfloat16, garbage=False)

    def step(hidden, weight):
        head = fastrl.LMHead(weight)
        return fastrl.policy_loss_from_hidden(
            hidden, head, batch.rollouts, TOKEN, backend=name, buffer_bytes=3000, **options
        ).loss

    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, batch.weight)]
    want = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        close(a, b, ulps=4, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_host_synchronisations_of_the_sparse_gradient(overlap):
    """One for the rows without room in their list, none otherwise with row counts given."""
    import warnings

    batch = make_batch(device="cuda", scale=3.0)
    r = batch.rollouts
    valid = int(r.flat.valid().sum())
    rollouts = fastrl.Rollouts(
        r.token_ids, r.mask, torch.ones(4, device="cuda"), old_logps=r.old_logps, row_counts=(valid, valid)
    )
    hidden = batch.hidden.clone().requires_grad_()
    options = {"sparse_eps": 0.02, "sparse_capacity": 4, "overlap": overlap}
    fastrl.policy_loss_from_hidden(hidden, batch.head(), rollouts, TOKEN.replace(kl_coef=0.0), **options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")  # the mode itself warns that it is a prototype
        try:
            torch.cuda.set_sync_debug_mode("warn")
            fastrl.policy_loss_from_hidden(hidden, batch.head(), rollouts, TOKEN.replace(kl_coef=0.0), **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(warning.message) for warning in found) <= 1
