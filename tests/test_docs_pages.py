"""The code of the pages on Transformers, Liger, the Kernel Hub and troubleshooting runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from common import make_batch

import fastrl

pytestmark = pytest.mark.filterwarnings("ignore")
DOCS = Path(__file__).parent.parent / "docs"


def run(page: str, namespace: dict) -> dict:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.S | re.M)
    assert blocks
    for block in blocks:
        exec(block, namespace)
    return namespace


def test_transformers(tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs transformers 5.23")
    pytest.importorskip("accelerate", reason="needs accelerate, which transformers' Trainer takes")
    from hf_cases import arguments, build_model

    model = build_model()
    before = model.lm_head.weight.detach().clone()
    ran = run("transformers.md", {"model": model, "args": arguments(tmp_path)})
    assert ran["rows"][0]["advantages"] == -ran["rows"][1]["advantages"] > 0
    assert not torch.equal(model.lm_head.weight, before)
    assert "'clip_fraction'" in capsys.readouterr().out and ran["trainer"].state.global_step == 1


@pytest.mark.accelerator
def test_liger():
    pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")
    pytest.importorskip("triton", reason="needs triton")
    torch.manual_seed(0)
    B, T, V, H = 3, 4, 19, 8
    ids = torch.randint(0, V, (B, T))
    given = {
        "ids": ids,
        "hidden": torch.randn(B, T, H),
        "weight": torch.randn(V, H),
        "logits": torch.randn(B, T + 1, V),
        "mask": (torch.arange(T) < torch.tensor([4, 2, 0])[:, None]).int(),
        "advantages": torch.tensor([1.0, -0.5, 2.0]),
        "old_logps": -2 + torch.randn(B, T) / 2,
        "ref_logps": -2 + torch.randn(B, T) / 2,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run("liger.md", {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()})


@pytest.mark.accelerator
def test_liger_does_what_its_page_says():
    """In place by default, unbounded exponents, NaN for a masked first tile, another luspo."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")
    pytest.importorskip("triton", reason="needs triton")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, advantages = torch.full((2, 3), 4, device=device), torch.tensor([1.0, -0.5], device=device)

    def liger(logits, old=None, **options):
        options = {"temperature": 1.0, "beta": 0.0, "reduce": True, **options}
        return triton_grpo_loss(logits, old, None, ids, advantages, None, **options)[0]

    for options, kept in (({}, False), ({"inplace": False}, True)):
        leaf = torch.randn(2, 4, 19, device=device, requires_grad=True)
        logits = leaf * 1
        before = logits.detach().clone()
        liger(logits, **options).backward()
        assert torch.equal(logits.detach(), before) == kept
    stale = torch.full((2, 3), -200.0, device=device)
    logits = torch.randn(2, 4, 19, device=device)
    assert liger(logits, stale, inplace=False).isinf()
    rollouts = fastrl.Rollouts(ids, advantages=advantages, old_logps=stale)
    assert fastrl.policy_loss_from_logits(logits[:, :-1], rollouts, fastrl.DAPO).loss.isfinite()
    masked = torch.randn(2, 4, 5000, device=device).index_fill_(-1, torch.arange(4096, device=device), -torch.inf)
    ids = torch.full_like(ids, 4500)
    assert liger(masked, inplace=False).isnan()
    rollouts = fastrl.Rollouts(ids, advantages=advantages)
    assert fastrl.policy_loss_from_logits(masked[:, :-1], rollouts, fastrl.DAPO).loss.isfinite()

    ids = torch.full_like(ids, 4)
    hidden, weight = torch.randn(2, 3, 8, device=device) / 5, torch.randn(19, 8, device=device)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], device=device)
    old = torch.randn(2, 3, device=device) / 3 - 3
    other = old.where(mask.bool(), -1.0)  # another value under the mask
    for level in ("token", "sequence"):
        chunked = LigerFusedLinearGRPOLoss(
            loss_type="luspo", beta=0.0, compiled=False, use_ref_model=False, importance_sampling_level=level,
            epsilon_low=0.99, epsilon_high=1e6,
        )  # fmt: skip
        spec = fastrl.LUSPO.replace(ratio_level=level, epsilon_low=None, epsilon_high=None)
        both = []
        for given in (old, other):
            rollouts = fastrl.Rollouts(ids, mask, advantages, old_logps=given)
            theirs, _ = chunked(hidden, weight, ids, mask, advantages, old_per_token_logps=given)
            ours = fastrl.policy_loss_from_hidden(hidden, fastrl.LMHead(weight), rollouts, spec, normalizer=2).loss
            both.append((theirs, ours))
        assert torch.equal(both[0][1], both[1][1])
        assert torch.equal(both[0][0], both[1][0]) == (level == "sequence")
        if level == "sequence":
            torch.testing.assert_close(*both[0])


def test_troubleshooting(capsys):
    batch = make_batch()
    logits = batch.logits().float()
    run("troubleshooting.md", {"rollouts": batch.rollouts, "logits": logits, "spec": fastrl.DAPO})
    assert capsys.readouterr().out.splitlines() == ["old_logps 0", "ref_logps 0", "rewards 0", "logps 0 clamped 0.0"]
    ids, mask = torch.zeros(1, 3).long(), torch.tensor([[1, 1, 0]])
    old = torch.tensor([[0.0, torch.nan, torch.nan]])
    broken = fastrl.Rollouts(ids, mask, torch.ones(1), old_logps=old)
    run(
        "troubleshooting.md",
        {"rollouts": broken, "logits": torch.zeros(1, 3, 5), "spec": fastrl.DAPO},
    )
    assert capsys.readouterr().out.splitlines()[:2] == ["old_logps 1", "advantages 0"]


def test_kernel_hub(tmp_path, monkeypatch, capsys):
    pytest.importorskip("kernels.load", reason="needs kernels 0.17")
    import build_hub

    monkeypatch.chdir(tmp_path)
    build_hub.build(Path("OUT"))
    run("kernel_hub.md", {})
    assert "logprob_fwd" in capsys.readouterr().out


def test_numerics_names_tests_that_exist():
    page = (DOCS / "numerics.md").read_text()
    written = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", page)
    assert len(names) > 10
    for name in names:
        assert f"def {name}(" in written, name
    for path in re.findall(r"`(tests/\w+\.py)`", page):
        assert (DOCS.parent / path).exists()
