"""examples/ppo_with_critic.py learns: the ranked reward model orders answers, and PPO finds the better ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("matplotlib", reason="draws the plot")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        spec = importlib.util.spec_from_file_location("ppo_with_critic", EXAMPLES / "ppo_with_critic.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_learns(example, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        history, accuracy = example.train(supervised=60, ranked=60, iterations=45)
    finally:
        torch.set_num_threads(threads)
    right, score, kl, coefficient = ([entry[name] for entry in history] for name in example.CURVES)
    assert accuracy > 0.9
    # 1/10 of random digits are right; runs of this length end between 0.25 and 0.5, by the machine's rounding.
    assert sum(right[-10:]) / 10 > sum(right[:3]) / 3 + 0.1
    assert sum(score[-10:]) / 10 > sum(score[:3]) / 3 + 0.7
    assert kl[0] == pytest.approx(0, abs=1e-4) and kl[-1] > 0.3
    # The controller lowers the coefficient while the KL is below its target.
    assert coefficient[5] < coefficient[0] == 0.1
    example.plot(history, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_ranked_answers(example):
    import random

    tokenizer = example.build_tokenizer()
    for row in example.ranked_answers(random.Random(0), tokenizer, 50).tolist():
        texts = [tokenizer.decode(ids).replace(" ", "") for ids in row]
        prompt = texts[0][:4]
        assert all(text.startswith(prompt) for text in texts) and len(texts) == example.K
        digits = [int(text[4:].removesuffix("<eos>")) for text in texts[:-1]]
        distances = [abs(digit - int(example.answer(prompt))) for digit in digits]
        assert distances == sorted(set(distances)) and not texts[-1].endswith("<eos>")
