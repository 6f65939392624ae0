"""What `jaxmoe train` shows of its data."""

import io
import sys

import pytest
import yaml
from rich.console import Console

from jaxmoe.cli import train as script
from jaxmoe.cli.show_data import show_examples
from jaxmoe.train.batches import training_data
from tests.train.test_data_pictures import config as config_of_pictures  # noqa: F401
from tests.train.test_data_pictures import rows  # noqa: F401
from tests.train.test_data_runs import CONFIG, ROWS, TOKENIZER, config, with_rows  # noqa: F401
from tests.train.test_pictures import CONFIG as SEEING
from tests.train.test_pictures import TOKENIZER as OF_PICTURES


def shown(data, tokenizer, count=1, **options):
    stream = io.StringIO()
    show_examples(data, tokenizer, count, Console(file=stream, width=200, **options))
    return stream.getvalue()


def test_an_example_marks_what_the_loss_counts(config):  # noqa: F811
    data = training_data(with_rows(config, ROWS[:1], held_out_every=0), CONFIG)
    text = shown(data, TOKENIZER)
    assert "Example 1, of which the loss counts 2 tokens:" in text
    assert "0?<|eot|><|header_start|>assistant<|header_end|>\n\n[[a<|eot|>]]\n" in text
    coloured = shown(data, TOKENIZER, force_terminal=True, color_system="standard")
    assert "\x1b[1;32ma<|eot|>\x1b[0m" in coloured and "[[" not in coloured


def test_a_picture_is_one_word(config_of_pictures):  # noqa: F811
    text = "".join(shown(training_data(config_of_pictures, SEEING), OF_PICTURES, 5).split())
    assert "<|image_start|><|image|><picture><|image_end|>0?<|eot|>" in text
    assert text.count("[[yes<|eot|>]]") == 5


@pytest.fixture
def run(config, monkeypatch, capsys):  # noqa: F811
    """Runs the command on rows, of which one is bad."""

    def run(*flags, **changes):
        path = f"{config.tokenizer}/run.yaml"
        data = {"files": list(config.data.files), "length": 64, "batch_size": 4} | changes
        fields = {"model": config.model, "output": config.output, "tokenizer": config.tokenizer}
        fields |= {"data": data, "optimizer": {"peak_lr": 0.01}, "steps": 1, "log_every": 1}
        with open(path, "w") as file:
            yaml.safe_dump(fields, file)
        monkeypatch.setattr(sys, "argv", ["train", path, *flags])
        script.main()
        return capsys.readouterr()

    return run


def test_the_command_shows_examples_and_does_not_train(run, config):  # noqa: F811
    out, _ = run("--show-data", "2")
    assert out.count("of which the loss counts") == 2
    with_rows(config, [{"txt": 1}, *ROWS])


def test_the_command_reports_what_it_skipped(run, config):  # noqa: F811
    with_rows(config, [{"txt": 1}, *ROWS])
    out, err = run(on_bad="skip")
    assert "Wrote" in out and err.startswith("Data: 30 documents in ")
    assert "Skipped 1 row(s) that" in err and "chats.jsonl line 1: it has none" in err
