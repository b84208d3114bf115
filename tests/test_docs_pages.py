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
    from hf_cases import arguments, build_model

    model = build_model()
    before = model.lm_head.weight.detach().clone()
    ran = run("transformers.md", {"fastrl": fastrl, "model": model, "args": arguments(tmp_path)})
    assert ran["rows"][0]["advantages"] == -ran["rows"][1]["advantages"] > 0
    assert not torch.equal(model.lm_head.weight, before)
    assert "'clip_fraction'" in capsys.readouterr().out and ran["trainer"].state.global_step == 1


def test_liger():
    pytest.importorskip("liger_kernel", reason="needs liger-kernel 0.8.5")
    pytest.importorskip("triton", reason="needs triton")
    torch.manual_seed(0)
    B, T, V, H = 3, 4, 19, 8
    ids = torch.randint(0, V, (B, T))
    given = {
        "fastrl": fastrl,
        "torch": torch,
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


def test_troubleshooting(capsys):
    batch = make_batch()
    logits = batch.logits().float()
    run("troubleshooting.md", {"fastrl": fastrl, "rollouts": batch.rollouts, "logits": logits, "spec": fastrl.DAPO})
    assert capsys.readouterr().out.splitlines() == ["old_logps 0", "ref_logps 0", "rewards 0", "logps 0 clamped 0.0"]
    ids, mask = torch.zeros(1, 3).long(), torch.tensor([[1, 1, 0]])
    old = torch.tensor([[0.0, torch.nan, torch.nan]])
    broken = fastrl.Rollouts(ids, mask, torch.ones(1), old_logps=old)
    run(
        "troubleshooting.md",
        {"fastrl": fastrl, "rollouts": broken, "logits": torch.zeros(1, 3, 5), "spec": fastrl.DAPO},
    )
    assert capsys.readouterr().out.splitlines()[:2] == ["old_logps 1", "advantages 0"]


def test_kernel_hub(tmp_path, capsys):
    pytest.importorskip("kernels.load", reason="needs kernels 0.17")
    import build_hub

    build_hub.build(tmp_path)
    run("kernel_hub.md", {"OUT": tmp_path})
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
