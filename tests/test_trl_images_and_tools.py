"""Real training runs whose prompts hold images, and whose model calls tools: TRL's loss and ours log the same curves."""

from __future__ import annotations

import pytest
import torch

trl = pytest.importorskip("trl", reason="needs trl 1.16")
pytest.importorskip("transformers", reason="needs transformers 5")
pytest.importorskip("datasets", reason="needs datasets")
pytest.importorskip("PIL", reason="needs pillow")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

from trl_chat_cases import image_trainer, llava, picture, qwen2_vl, tool_trainer  # noqa: E402
from trl_training_cases import OURS, THEIRS, differing, even_tokens, logged  # noqa: E402

OPTIONS = {"max_steps": 10, "num_iterations": 2, "gradient_accumulation_steps": 2, "reward": even_tokens}
PAIRS = OPTIONS | {"num_generations": 3}  # two of them in a micro-batch, so that TRL takes its images apart
LEVELS = ("hidden", "logits")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from a second one, and wait for it where another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(theirs, ours):
    """(log, evaluation) of both, where the policy did leave the one that sampled."""
    assert differing(theirs[0], ours[0]) == {} and ours[0]
    for metric in ("eval_loss", "eval_entropy", "eval_reward"):
        assert ours[1][metric] == pytest.approx(theirs[1][metric], rel=1e-4, abs=1e-6), metric
    assert max(entry["fastrl/ratio_max"] for entry in ours[0]) > 1.1


def vision_tower(it):
    """Its parameters as they are now, flat."""
    named = it.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if "vision" in name or "visual" in name])


@pytest.mark.parametrize(
    ("family", "column", "kind"), [(llava, "image", "GRPO"), (qwen2_vl, "images", "GRPO"), (llava, "images", "RLOO")]
)
def test_same_curves_with_images(family, column, kind):
    """Which the vision tower learns from, and without which TRL's own curve is another."""
    theirs = logged(image_trainer(THEIRS[kind], family, column, **PAIRS))
    for level in LEVELS:
        it = image_trainer(OURS[kind], family, column, level=level, **PAIRS)
        before = vision_tower(it)
        assert_same(theirs, logged(it))
        assert (vision_tower(it) - before).abs().max() > 1e-3
    unseen, _ = logged(image_trainer(THEIRS[kind], family, column, black=True, **PAIRS | {"max_steps": 2}))
    assert differing(theirs[0][:2], unseen)["grad_norm"] > 1e-2


def test_same_curves_with_tools():
    """The model samples its calls, which are rewarded; TRL's loop runs them and masks what they return. Some fail, and
    some answers have two."""
    chats = []

    def calls(completions, **_):
        chats.extend(completions)
        return [sum(message["role"] == "tool" for message in chat) for chat in completions]

    options = OPTIONS | {"max_steps": 20, "reward": calls, "max_completion_length": 32}
    theirs = logged(tool_trainer(trl.GRPOTrainer, **options))
    answers = [[message["content"] for message in chat if message["role"] == "tool"] for chat in chats]
    assert sum(map(len, answers)) > 40 and max(map(len, answers)) > 1
    assert any("error" in content for contents in answers for content in contents)
    often = [entry["tools/call_frequency"] for entry in theirs[0] if "tools/call_frequency" in entry]
    assert sum(often[-3:]) > sum(often[:3]) + 0.5, "calling is learnt"
    same = list(chats)
    for level in LEVELS:
        chats.clear()
        assert_same(theirs, logged(tool_trainer(OURS["GRPO"], level=level, **options)))
        assert chats == same


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_same_curves_with_tools_that_show_images(image):
    """Whose placeholders then stand in the completion; the prompt has an image besides, or none."""
    shown = []

    def calls(completions, **_):
        shown.extend(str(chat).count("'type': 'image'") for chat in completions)
        return [sum(message["role"] == "tool" for message in chat) for chat in completions]

    options = PAIRS | {"max_steps": 6, "reward": calls, "max_completion_length": 32, "tool": picture, "image": image}
    theirs = logged(tool_trainer(trl.GRPOTrainer, **options))
    assert sum(shown) > 20 and 0 in shown
    for level in LEVELS:
        it = tool_trainer(OURS["GRPO"], level=level, **options)
        before = vision_tower(it)
        assert_same(theirs, logged(it))
        assert (vision_tower(it) - before).abs().max() > 1e-3
