"""The documentation: generated pages are up to date, what they say of gradients is so, links resolve, code runs."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import fastrl
from fastrl.objectives import OBJECTIVES, binary_kl
from fastrl.presets import PRESETS

pytest.importorskip("matplotlib", reason="draws the plots")
import generate
import losses_text
import plots

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module", autouse=True)
def curves():
    """Computed once for all tests here."""
    tables = generate.curves()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "curves", lambda: tables)
        yield tables


def test_up_to_date():
    """`make docs` would change nothing: the same text, the same curves, an image for each."""
    assert generate.check() == []


def test_the_check_sees_a_change(tmp_path):
    shutil.copytree(ROOT / "docs" / "losses", tmp_path / "losses")
    (tmp_path / "losses.md").write_text(generate.page() + " ")
    stored = json.loads((tmp_path / generate.CURVES).read_text())
    stored["sapo"]["A = +1"][2][3] += 1e-3
    del stored["dro"]["A = −1"]
    (tmp_path / generate.CURVES).write_text(json.dumps(stored))
    (tmp_path / "losses" / "topr.svg").unlink()
    want = ["losses.md", f"{generate.CURVES}: dro", f"{generate.CURVES}: sapo", "losses/topr.svg"]
    assert generate.check(tmp_path) == want


def test_plots_are_small_and_reproducible(tmp_path, curves):
    folder = ROOT / "docs" / "losses"
    assert {path.stem for path in folder.glob("*.svg")} == OBJECTIVES.keys()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
    for name in ("first", "second"):
        plots.draw("sapo", curves["sapo"], tmp_path / f"{name}.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


@pytest.mark.parametrize("name", PRESETS)
def test_four_paragraphs(name):
    docstring = generate.parse("presets")[name.upper()]
    formula, *rest = generate.paragraphs(docstring)
    assert formula.startswith("ℓ") and len(rest) == 3
    assert name in ("reinforce", "bnpo") or re.search(r"arXiv:\d{4}\.\d{5}", formula), "the formula names its source"


def test_a_docstring_without_its_peers_is_refused():
    with pytest.raises(AssertionError):
        generate.paragraphs("ℓ = −A.\n\nGradient: −A.\n\nUse it when needed.")


def test_text_names_presets_and_fields_that_exist():
    rows = [*losses_text.PROBLEMS, *losses_text.COMING_FROM]
    fields = set(vars(fastrl.LossSpec()))
    for row in rows:
        for name in re.findall(r"\[`([A-Z_]+)`\]", row[-1]):
            assert name.lower() in PRESETS
        for name in re.findall(r"`(\w+)=[^`]*`", row[-1]):
            assert name in fields or name == "use_bias_correction_kl", name


def _within(r, A, low, high):
    return r <= high if A > 0 else r >= low


def _gate(r, A):
    tau = 1.0 if A > 0 else 1.05
    sigma = 1 / (1 + math.exp(-tau * (r - 1)))
    return 4 * sigma * (1 - sigma)


def _vespo(w, A):
    k, lam = (2, 3) if A > 0 else (3, 2)
    return math.exp(lam) * w**k * math.exp(-lam * w)


def _small_kl(r, A, p=0.3):
    old, new = torch.tensor(p).double().log(), torch.tensor(p * r).double().log()
    return binary_kl(new, old) <= 0.05 or (r <= 1 if A > 0 else r >= 1)


# The paragraphs "Gradient:", once more by hand.
GRADIENTS = {
    "ppo_clip": lambda r, A: -r * A * _within(r, A, 0.8, 1.2),
    "cispo": lambda r, A: -min(r, 5) * A,
    "sapo": lambda r, A: -r * A * _gate(r, A),
    "gmpo": lambda g, A: -g * A * _within(math.log(g), A, -0.4, 0.4),
    "vespo": lambda w, A: -_vespo(w, A) * A,
    "dppo_tv": lambda r, A: -r * A * _within(0.3 * (r - 1), A, -0.2, 0.2),
    "dppo_kl": lambda r, A: -r * A * _small_kl(r, A),
    "reinforce": lambda r, A: -A,
    "importance_sampling": lambda r, A: -r * A,
    "topr": lambda r, A: -A if A > 0 else -min(r, 1) * A,
    "dro": lambda r, A: -A + 0.1 * math.log(r),
    "clip_cov": lambda r, A: -r * A * _within(r, A, 0.8, 1.2),
    "kl_cov": lambda r, A: -r * A,
}
ADDED = {
    "A = −1, dual_clip = 2": lambda r, A: -r * A * (0.8 <= r <= 2),
    "A = +1, drawn": lambda r, A: 0.0,
    "A = −1, drawn": lambda r, A: 0.0,
    "A = +1, picked": lambda r, A: -r * A + math.copysign(r != 1, r - 1),
    "A = −1, picked": lambda r, A: -r * A + math.copysign(r != 1, r - 1),
}


@pytest.mark.parametrize("objective", GRADIENTS)
def test_gradients_are_as_the_docstrings_say(objective, curves):
    for label, (ratios, _, gradients) in curves[objective].items():
        formula, A = ADDED.get(label, GRADIENTS[objective]), 1 if "+1" in label else -1
        jumps = [a for a, b in itertools.pairwise(ratios) if b - a < 1e-5]
        for ratio, gradient in zip(ratios, gradients, strict=True):
            if all(abs(ratio - jump) > 1e-5 for jump in jumps):
                assert math.isclose(gradient, formula(ratio, A), rel_tol=1e-5, abs_tol=1e-5), (label, ratio)


@pytest.mark.parametrize(
    ("name", "share"), [("gspo", 1 / 3), ("gspo_token", 1 / 3), ("luspo", 1.0), ("rloo", 1.0), ("gmpo", 1 / 3)]
)
def test_sequence_gradients_are_as_the_docstrings_say(name, share):
    """−s·A times the token's share, at every token of a sequence of three."""
    shifts = torch.tensor([[0.3, -0.1, -0.25]], dtype=torch.float64)
    old = torch.full_like(shifts, -2.0)
    logps = (old + shifts).requires_grad_()
    rollouts = fastrl.Rollouts(torch.zeros(1, 3).long(), advantages=torch.ones(1, dtype=torch.float64), old_logps=old)
    fastrl.policy_loss(logps, rollouts, PRESETS[name], backend="torch").loss.backward()
    s = math.exp(shifts.sum().item() if name == "rloo" else shifts.mean().item())
    torch.testing.assert_close(logps.grad, torch.full_like(shifts, -s * share), rtol=1e-9, atol=0)


def test_gmpo_gradient_is_0_at_clipped_tokens():
    shifts = torch.tensor([[0.7, -0.1, -0.6]], dtype=torch.float64)
    old = torch.full_like(shifts, -2.0)
    logps = (old + shifts).requires_grad_()
    rollouts = fastrl.Rollouts(torch.zeros(1, 3).long(), advantages=torch.ones(1, dtype=torch.float64), old_logps=old)
    fastrl.policy_loss(logps, rollouts, fastrl.GMPO, backend="torch").loss.backward()
    g = math.exp((0.4 - 0.1 - 0.6) / 3)  # the clipped token counts with its bound, and low ones are free for A > 0
    want = torch.tensor([[0.0, -g / 3, -g / 3]], dtype=torch.float64)
    torch.testing.assert_close(logps.grad, want, rtol=1e-9, atol=0)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    """Files, and headings of Markdown files. Web pages are not asked for."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def _code(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def test_code_of_the_losses_page_gives_the_presets():
    namespace: dict[str, object] = {"LossSpec": fastrl.LossSpec}
    for block in _code(ROOT / "docs" / "losses.md"):
        exec(block, namespace)
    made = {name.lower(): value for name, value in namespace.items() if isinstance(value, fastrl.LossSpec)}
    assert made.pop("importance_sampling") == fastrl.LossSpec(objective="importance_sampling")
    assert made == PRESETS


@pytest.mark.filterwarnings("ignore")
def test_code_of_the_readme_runs(capsys):
    """The blocks, in order, with a tiny model and a batch under the names that they use."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    B, T = 8, 5
    input_ids = torch.randint(2, 61, (B, 3 + T))
    namespace = {
        "model": transformers.Qwen2ForCausalLM(config),
        "input_ids": input_ids,
        "completion_ids": input_ids[:, -T:],
        "completion_mask": torch.arange(T) < torch.randint(1, T + 1, (B, 1)),
        "rewards": torch.randn(B),
        "old_logps": torch.full((B, T), -4.0),
        "T": T,
    }
    blocks = _code(ROOT / "README.md")
    assert blocks
    for block in blocks:
        exec(block, namespace)
    assert "clip_fraction" in capsys.readouterr().out
    assert namespace["model"].lm_head.weight.grad.abs().sum() > 0
