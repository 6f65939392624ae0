import json
from pathlib import Path

import pytest

from jaxmoe import parsing
from jaxmoe.checkpoint import store
from jaxmoe.config import SCOUT
from jaxmoe.errors import UserError
from jaxmoe.train import run_folder
from jaxmoe.train.config import DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.run_folder import RunFolder


def make_config(output, **changes):
    fields = dict(
        model={"id2label": {0: "a"}},
        data=DataConfig(tokens="tokens.npy", length=16, batch_size=2),
        optimizer=OptimizerConfig(peak_lr=0.01),
        output=str(output),
        steps=4,
    )
    return TrainConfig(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path):
    return RunFolder(make_config(tmp_path / "run"))


@pytest.fixture
def saved(monkeypatch):
    """Saving a checkpoint makes an empty file instead."""

    def save(path, model, params):
        path.mkdir(parents=True)
        (path / "saved").touch()

    monkeypatch.setattr(store, "save", save)


def names(folder):
    return {path.name for path in folder.path.iterdir()}


def test_a_run_claims_its_folder_again_but_no_other_does(folder):
    for _ in range(2):
        assert not folder.is_finished()
        with folder.claimed():
            assert names(folder) == {"config.json"}
    other = RunFolder(make_config(folder.path, steps=5))
    with pytest.raises(UserError, match=r"a run of another config \(.*config\.json"):
        other.is_finished()
    with pytest.raises(UserError, match="a run of another config"), other.claimed():
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": 31}'])
def test_another_config_json_is_not_this_runs(folder, text):
    folder.path.mkdir()
    (folder.path / "config.json").write_text(text)
    with pytest.raises(UserError, match="a run of another config"):
        folder.is_finished()


def test_a_config_of_a_version_with_fewer_fields_is_this_runs(folder):
    with folder.claimed():
        pass
    file = folder.path / "config.json"
    content = json.loads(file.read_text())
    del content["init"], content["data"]["dtype"]
    file.write_text(json.dumps(content))
    assert not folder.is_finished()


def test_a_run_that_was_killed_before_its_first_file_begins(folder):
    folder.path.mkdir()
    (folder.path / "config.json.partial").write_text("{")
    with folder.claimed():
        assert names(folder) == {"config.json"}


def test_two_runs_at_once(folder):
    with folder.claimed():
        with pytest.raises(UserError, match="being written by another run; wait"):
            with RunFolder(make_config(folder.path)).claimed():
                pass
    with folder.claimed():
        pass


def test_a_run_that_another_finished_in_the_meantime(folder, saved):
    with folder.claimed():
        folder.finish(SCOUT, {})
    with pytest.raises(UserError, match="finished by another run; run again"), folder.claimed():
        pass


@pytest.mark.parametrize("left", ["states", "partial"])
def test_what_a_kill_after_the_rename_left_is_cleared_away(folder, saved, left):
    with folder.claimed():
        folder.finish(SCOUT, {})
    (folder.path / left / "4").mkdir(parents=True)
    assert folder.is_finished() and folder.is_finished()
    assert names(folder) == {"config.json", "checkpoint"}
    with pytest.raises(UserError, match="a finished run of another config"):
        RunFolder(make_config(folder.path, seed=1)).is_finished()


def test_a_kill_before_the_rename_leaves_no_checkpoint(folder, saved, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    with folder.claimed():
        folder.states.mkdir()
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
            context.setattr(run_folder.Path, "rename", killed)
            folder.finish(SCOUT, {})
    assert not folder.is_finished() and folder.states.exists()
    with folder.claimed():
        folder.finish(SCOUT, {})
    assert names(folder) == {"config.json", "checkpoint"}


def test_the_tokenizers_files_are_there_when_the_checkpoint_is(tmp_path, saved):
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = RunFolder(make_config(tmp_path / "run", tokenizer=str(tmp_path)))
    with folder.claimed():
        folder.finish(SCOUT, {})
    assert {path.name for path in folder.checkpoint.iterdir()} == {"saved", "tokenizer.json"}


def test_metrics_are_cut_back_to_a_step(folder):
    with folder.claimed():
        folder.cut_back(3)  # there are none
        for step in (2, 4, 6):
            folder.append({"step": step})
        with open(folder.metrics, "a") as file:
            file.write('{"step": 8, "lo')
        folder.cut_back(4)
    assert folder.metrics.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_metrics_may_be_longer_than_a_config(folder, monkeypatch):
    """Catches a long run that cannot be resumed."""
    folder.path.mkdir()
    folder.metrics.write_text('{"step": 2}\n')
    limited = lambda path, most=1: parsing.read_text(path, most)  # noqa: E731
    monkeypatch.setattr(run_folder, "read_text", limited)
    folder.cut_back(4)
    assert folder.metrics.read_text() == '{"step": 2}\n'


@pytest.mark.parametrize("line", ["{}", "[]", "x", '{"step": "2"}', "[" * 9999])
def test_metrics_of_another_kind_are_refused_by_line(folder, line):
    folder.path.mkdir()
    folder.metrics.write_text(f'{{"step": 2}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        folder.cut_back(4)


@pytest.mark.parametrize("output", ["x" * 300, "file/run", "/proc/run"])
def test_a_folder_that_cannot_be(tmp_path, output):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: "):
        with RunFolder(make_config(tmp_path / output)).claimed():
            pass


def test_a_full_disk_is_one_sentence(folder):
    folder.metrics = Path("/dev/full")
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left on device"):
        folder.append({"step": 1})


def test_a_model_that_no_json_can_hold(tmp_path):
    with pytest.raises(UserError, match=r"'model' is no config\.json"):
        RunFolder(make_config(tmp_path / "run", model={"dtype": float("nan")}))
