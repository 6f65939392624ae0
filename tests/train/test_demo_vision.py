"""The committed model that sees is the one that its metrics and demo/README.md speak of."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxmoe
from demo.vision import digit_pictures, vision_report, vision_training
from demo.vision.make_vision_model import make_tokenizer, preprocessor_config
from jaxmoe.checkpoint.convert import convert
from jaxmoe.hf_config import from_hf, read_config
from jaxmoe.images import ImageSettings
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import num_params
from jaxmoe.text import Tokenizer
from jaxmoe.train.config import read_train_config
from tests.conftest import one_device
from tests.tiers import slow_after_first

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "demo" / "vision"
MODEL = FOLDER / "model"
METRICS = json.loads((FOLDER / "metrics.json").read_text())
TRAINING = read_train_config(ROOT / "configs" / "demo-vision.yaml")
CONFIG = from_hf(TRAINING.model, "configs/demo-vision.yaml")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "checkpoint"
    convert(MODEL, folder)
    return folder


def read_examples(checkpoint, mesh):
    """What the model says of the pictures in the repository, in float32."""
    lines = [json.loads(line) for line in (FOLDER / "held-out" / "questions.jsonl").open()]
    for line in lines:
        image = line["messages"][0]["content"][0]
        image["image"] = str(FOLDER / "held-out" / image["image"])
    llm = jaxmoe.LLM(checkpoint, mesh=mesh, dtype="float32")
    greedy = jaxmoe.Sampling(temperature=0.0)
    found = llm.chat([line["messages"] for line in lines], greedy, max_new_tokens=32)
    return [
        {"id": line["id"], "expected": line["answer"], "text": result.text}
        for line, result in zip(lines, found, strict=True)
    ]


@pytest.mark.parametrize("mesh", slow_after_first([None, "expert=4,tensor=2"]))
def test_it_says_on_any_mesh_what_the_metrics_say(checkpoint, mesh):
    mesh = one_device() if mesh is None else MeshConfig.parse(mesh).make()
    assert read_examples(checkpoint, mesh) == METRICS["examples"]


def test_it_reads_held_out_digits_and_not_without_seeing_them():
    seeing, blind = (vision_report.reading(METRICS[key]) for key in ("seeing", "blind"))
    assert seeing["characters_right"] > 0.95 * seeing["characters"]
    assert blind["right"] < 0.1 * blind["questions"]
    assert METRICS["examples"][0]["text"] == METRICS["examples"][0]["expected"]


def test_the_readme_has_the_numbers_of_the_metrics():
    readme = (ROOT / "demo" / "README.md").read_text()
    assert vision_report.with_numbers(readme, METRICS) == readme


def test_the_model_is_the_one_that_the_config_trains():
    assert read_config(MODEL) == CONFIG
    assert num_params(CONFIG) == METRICS["parameters"]
    assert TRAINING.steps == METRICS["steps"]


def test_the_files_beside_it_are_the_scripts():
    tokenizer = make_tokenizer(CONFIG.vocab_size)
    assert json.loads((MODEL / "tokenizer.json").read_text()) == json.loads(
        tokenizer.backend.to_str()
    )
    written = json.loads((MODEL / "preprocessor_config.json").read_text())
    assert written == preprocessor_config(CONFIG)
    assert Tokenizer.load(MODEL).vocab_size == CONFIG.vocab_size


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 8e6


@pytest.fixture
def drawn_digits(monkeypatch):
    """Digits without the package that has them: a square of the digit's brightness each."""
    images = np.tile(np.arange(10.0)[:, None, None] + 5, (1, 8, 8))
    source = digit_pictures.Digits(images, np.arange(10))
    monkeypatch.setattr(digit_pictures, "digits", lambda held_out: source)
    return source


@pytest.mark.parametrize("layout", digit_pictures.LAYOUTS)
def test_a_picture_has_its_digits_where_the_answer_has_them(drawn_digits, layout):
    rng = np.random.default_rng(0)
    drawing = digit_pictures.draw(rng, drawn_digits, layout, one_tile=False)
    assert drawing.image.size == (32 * layout[1], 32 * layout[0])
    grey = np.asarray(drawing.image)[..., 0].astype(int)
    cells = grey.reshape(layout[0], 32, layout[1], 32).swapaxes(1, 2)
    darkest = cells.min(axis=(2, 3))
    flat = [int(digit) for row in drawing.answer("read").split("\n") for digit in row]
    assert (np.argsort(-darkest.ravel(), kind="stable") == np.argsort(flat, kind="stable")).all()
    assert drawing.answer("largest") == str(max(flat))
    assert drawing.answer("count") == str(len(flat)) == str(np.prod(layout))


def test_features_see_the_digit_of_their_quarter():
    tokenizer = make_tokenizer(CONFIG.vocab_size)
    ids = [tokenizer.encode(str(digit))[0] for digit in range(10)]

    def seen(rows):
        return vision_training.seen_by_features(digit_pictures.Drawing(None, rows), tokenizer)

    assert seen([[7]]).tolist() == [ids[7]] * 4
    assert seen([[1, 2], [3, 4]]).tolist() == [ids[i] for i in (1, 2, 3, 4)]
    assert seen([[1, 2]]).tolist() == [ids[1], ids[2], -1, -1]
    assert seen([[1], [2]]).tolist() == [ids[1], -1, ids[2], -1]


def test_batches_follow_from_the_seed_and_the_step(drawn_digits):
    tokenizer = make_tokenizer(CONFIG.vocab_size)
    for step in (0, vision_training.TOWER_STEPS, TRAINING.steps - 1):
        same, again = (vision_training.batch(CONFIG, tokenizer, 0, step) for _ in range(2))
        other = vision_training.batch(CONFIG, tokenizer, 1, step)
        assert type(same) is type(again) is type(other)
        for one, two in zip(same, again, strict=True):
            np.testing.assert_array_equal(one, two)
        assert (same.pixels != other.pixels).any()


def test_conversations_tell_what_is_drawn(drawn_digits):
    tokenizer, rng = make_tokenizer(CONFIG.vocab_size), np.random.default_rng(0)
    settings = ImageSettings.of(CONFIG.vision)
    layouts = digit_pictures.LAYOUTS
    talks = vision_training.conversations(settings, tokenizer, rng, False, layouts)
    for _ in range(20):
        tokens, learned, pixels = next(talks)
        said = tokenizer.decode(tokens[learned].tolist())
        assert said and set(said) <= set("0123456789\n")
        assert (tokens == CONFIG.image_token_id).sum() == 4 * len(pixels)
