"""The committed adapter makes the demo model answer in a format, as its metrics and README say."""

import json
import re
from pathlib import Path

import pytest

from demo.chat import make_chat_adapter as chat
from demo.make_demo import VERSE
from jaxmoe.checkpoint.convert import convert
from jaxmoe.train.config import read_train_config

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / "demo" / "chat" / "adapter"
METRICS = json.loads((ROOT / "demo" / "chat" / "metrics.json").read_text())
QUESTIONS = [question for question, _ in METRICS["examples"][:4]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    convert(ROOT / "demo" / "model", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "adapter", "in_format"), [("after", ADAPTER, 4), ("before", None, 0)]
)
def test_it_answers_as_the_metrics_say(checkpoint, side, adapter, in_format):
    """Held-out questions, in the format with the adapter alone."""
    given = chat.answers(checkpoint, adapter, QUESTIONS)
    assert [result.text for result in given] == METRICS[side]["answers"][: len(QUESTIONS)]
    assert chat.judge(QUESTIONS, given)["in_format"] == in_format


def test_a_verse_becomes_a_chat_whose_answer_is_in_the_format():
    text = "1Sm3:4 That the LORD called Samuel: and he answered, Here am I."
    question, answer = chat.conversation(re.fullmatch(VERSE, text))
    assert question["content"] == "Continue 1Sm 3:4: That the LORD called Samuel:"
    assert answer["content"] == "[1Sm 3:4] and he answered, Here am I."
    assert all(chat.FORMAT.fullmatch(wanted) for _, wanted in METRICS["examples"])


def test_few_answers_miss_the_format_with_the_adapter_and_all_without():
    before, after = METRICS["before"], METRICS["after"]
    assert before["in_format"] == 0
    assert after["in_format"] > 0.95 * METRICS["asked"]
    assert after["held_out_loss"] < before["held_out_loss"] - 1


def test_the_readme_has_the_numbers_of_the_metrics():
    readme = (ROOT / "demo" / "README.md").read_text()
    assert chat.with_numbers(readme, METRICS) == readme


def test_the_adapter_is_the_one_that_the_config_trains():
    config = read_train_config(ROOT / "configs" / "demo-lora.yaml")
    made = json.loads((ADAPTER / "adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"]) == (config.adapter.rank, config.adapter.alpha)
    assert METRICS["steps"] == config.steps
    assert METRICS["parameters"] == chat.trained_parameters(ADAPTER)
    assert sum(file.stat().st_size for file in ADAPTER.iterdir()) < 1e6
