"""Pictures in files of requests and on the command line."""

import base64
import dataclasses
import json
import threading

import jax
import pytest

from jaxmoe import LLM, Request, UserError
from jaxmoe.checkpoint import store
from jaxmoe.cli import generate, image_flags
from jaxmoe.generation.answers import job_digest
from jaxmoe.generation.checking import Checker
from jaxmoe.generation.jobs import Refusal, read_requests
from jaxmoe.generation.request import fit_context
from jaxmoe.images import ImageSettings, PictureReader, decoding, open_picture
from jaxmoe.text import render, render_chat
from tests.conftest import one_device
from tests.generate.conftest import CONTEXT
from tests.generate.pictures import (
    GREEDY,
    IDS,
    MODEL,
    SETTINGS,
    SMALL,
    TOKENIZER,
    WIDE,
    noise,
    random_params,
    user,
)
from tests.scripts import succeeds
from tests.small_tokenizers import CHAT

TEXT_MODEL = dataclasses.replace(MODEL, vision=None)


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture small.png, and one that is cut off."""
    SMALL.save(tmp_path / "small.png")
    content = (tmp_path / "small.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    return tmp_path


def read(folder, *records, model=MODEL, **options):
    """The requests of a file in the folder, checked for a model."""
    path = folder / "jobs.jsonl"
    lines = [{"id": f"q{i}"} | record for i, record in enumerate(records)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    checker = Checker(model, TOKENIZER, GREEDY)
    images = ImageSettings.of(model.vision) if model.vision is not None else None
    return read_requests(path, TOKENIZER, 4, checker.check, images=images, **options)


def of_small(where="x"):
    return open_picture(SMALL, SETTINGS, where)


# Files of requests


def test_every_shape_in_a_file_is_the_same_picture(folder):
    """Catches paths that begin where the program runs."""
    text = base64.b64encode((folder / "small.png").read_bytes()).decode()
    url = {"url": f"data:image/png;base64,{text}"}
    say = {"type": "text", "text": "what?"}
    requests = read(
        folder,
        {"messages": user({"type": "image", "path": "small.png"}, say)},
        {"messages": user({"type": "image_url", "image_url": url}, say)},
        {"messages": user({"type": "image", "base64": text}, say)},
        {"messages": [{"role": "user", "content": "<image>what?", "images": ["small.png"]}]},
        {"messages": user({"type": "image"}, say), "images": [str(folder / "small.png")]},
    )
    whole = render_chat(user({"type": "image", "image": SMALL}, say), TOKENIZER,
                        PictureReader(SETTINGS))  # fmt: skip
    for request in requests:
        assert request.tokens == tuple(whole.tokens)
        assert request.pictures == whole.pictures == (of_small(),)


def test_a_prompt_with_images(folder):
    marked, plain = read(
        folder,
        {"prompt": "<|image|>a<image>", "images": ["small.png", {"path": "small.png"}]},
        {"prompt": "<|image|>a<image><|patch|>"},
    )
    layout, begin = IDS.layout((1, 1), SETTINGS.tokens_per_tile), TOKENIZER.bos_id
    assert marked.tokens == (begin, *layout, *TOKENIZER.encode("a"), *layout)
    assert marked.pictures == (of_small(), of_small())
    assert plain.tokens == (begin, *TOKENIZER.encode("<|image|>a<image><|patch|>"))
    assert plain.pictures == ()


def test_tokens_with_images(folder):
    layout = IDS.layout((1, 1), SETTINGS.tokens_per_tile)
    marked, whole = read(
        folder,
        {"tokens": [5, IDS.image], "images": ["small.png"]},
        {"tokens": [5, *layout], "images": ["small.png"]},
    )
    assert marked.tokens == whole.tokens == (5, *layout)
    assert marked.pictures == whole.pictures == (of_small(),)


def test_pictures_of_several_lines_are_decoded_side_by_side(folder, monkeypatch):
    both = threading.Barrier(2, timeout=20)
    decode = decoding.decode
    monkeypatch.setattr(
        "jaxmoe.images.picture.decode", lambda *given: (both.wait(), decode(*given))[1]
    )
    lines = []
    for i in range(4):
        noise(i).save(folder / f"{i}.png")
        lines.append({"prompt": "<image>", "images": [f"{i}.png"]})
    found = read(folder, *lines)
    assert [request.pictures[0].name[-7:-2] for request in found] == [f"{i}.png" for i in range(4)]


BAD = {
    "a file that is cut off": (
        {"prompt": "<image>", "images": ["cut.png"]},
        ["images[0]", "cut.png", "is damaged or cut off"],
    ),
    "more pictures than places": (
        {"prompt": "<image>", "images": ["small.png", "small.png"]},
        ["given: 2, places for them in the text: 1"],
    ),
    "more places than pictures": (
        {"prompt": "<image><|image|>", "images": ["small.png"]},
        ["given: 1, places for them in the text: 2"],
    ),
    "no list": ({"prompt": "<image>", "images": "small.png"}, ["images is no list of pictures"]),
    "an URL": (
        {"messages": user({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}})},
        ["messages[0].content[0]", "https://a.b/c.png", "--allow-network"],
    ),
    "a missing file": (
        {"messages": user({"type": "image", "path": "gone.png"})},
        ["messages[0].content[0]", "gone.png", "No such file"],
    ),
    "patches without a picture": (
        {"tokens": [5, IDS.patch]},
        [f"1 tokens {IDS.patch}", "(none) have 0"],
    ),
    "too few patches": (
        {"tokens": [5, IDS.patch], "images": ["small.png"]},
        [f"1 tokens {IDS.patch}", "small.png", "have 9"],
    ),
    "a picture that the context cuts": (
        {"prompt": "a" * (CONTEXT - 9) + "<image>", "images": ["small.png"]},
        ["leaves no room in the model's context of 384", "make the pictures smaller", "small.png"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_refuses_its_line_only(name, folder):
    record, words = BAD[name]
    good = {"prompt": "<image>", "images": ["small.png"]}
    first, refusal, last = read(folder, good, record, good)
    assert isinstance(first, Request) and first.pictures == last.pictures
    assert isinstance(refusal, Refusal) and refusal.id == "q1" and "\n" not in refusal.error
    found = [word in refusal.error for word in (str(folder / "jobs.jsonl") + " line 2", *words)]
    assert all(found), refusal.error


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "<image>", "images": ["small.png"]},
        {"messages": user({"type": "image", "path": "small.png"})},
        {"tokens": [5], "images": ["small.png"]},
    ],
)
def test_a_model_without_a_tower_refuses_pictures(record, folder):
    text, refusal = read(folder, {"prompt": "<image>"}, record, model=TEXT_MODEL)
    assert TOKENIZER.decode(text.tokens) == "<image>"
    assert "line 2" in refusal.error and "there is no vision tower to see it" in refusal.error


def test_a_request_of_ones_own_is_checked():
    picture = of_small("'a.png'")
    layout = tuple(IDS.layout((1, 1), SETTINGS.tokens_per_tile))
    right = Request("a", (5, *layout), 4, pictures=(picture,))
    assert fit_context(MODEL, right) == right
    with pytest.raises(
        UserError, match=r"request 'a' has the picture 'a\.png', and the checkpoint"
    ):
        fit_context(TEXT_MODEL, right)
    for wrong in (
        dataclasses.replace(right, pictures=()),
        dataclasses.replace(right, pictures=(picture, picture)),
        dataclasses.replace(right, tokens=right.tokens[:-3]),
    ):
        with pytest.raises(UserError, match=r"request 'a' has \d+ tokens"):
            fit_context(MODEL, wrong)
    # In a model of text the token is one of the vocabulary.
    assert fit_context(TEXT_MODEL, Request("a", (IDS.patch,), 4)).tokens == (IDS.patch,)


def test_a_job_is_named_by_what_its_pictures_look_like(folder):
    one = read(folder, {"prompt": "<image>", "images": ["small.png"]})
    named = job_digest([], one)
    (folder / "moved.png").write_bytes((folder / "small.png").read_bytes())
    assert named == job_digest([], read(folder, {"prompt": "<image>", "images": ["moved.png"]}))
    noise(3).save(folder / "small.png")
    assert named != job_digest([], read(folder, {"prompt": "<image>", "images": ["small.png"]}))
    text = Request("a", (1,), 4)
    assert job_digest([], [text]) == job_digest([], [dataclasses.replace(text, pictures=())])


# On the command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The model in a folder, which asks for one tile a picture."""
    folder = tmp_path_factory.mktemp("pictures") / "model"
    with jax.set_mesh(one_device()):
        store.save(folder, MODEL, random_params())
    TOKENIZER.save(folder)
    (folder / "preprocessor_config.json").write_text('{"max_patches": 1}')
    return folder


def by_flags(checkpoint, *flags, model=MODEL):
    """The prompt of a command line, as the command makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["generate", str(checkpoint), *map(str, flags)])
        args = generate.make_parser().parse_args()
    return image_flags.prompt_by(args, TOKENIZER, image_flags.settings_by(args, model))


def test_flags_put_pictures_before_the_prompt(checkpoint, folder):
    WIDE.save(folder / "wide.png")
    flags = "--image", folder / "small.png", "--image", folder / "wide.png"
    one, wide = (IDS.layout(grid, 9) for grid in ((1, 1), (1, 2)))
    begin, text = TOKENIZER.bos_id, TOKENIZER.encode("<image><|image|>")
    prompt = by_flags(checkpoint, "--prompt", "<image><|image|>", *flags)
    assert prompt.tokens == [begin, *one, *one, *text]  # the checkpoint asks for one tile
    prompt = by_flags(checkpoint, "--prompt", "<image><|image|>", *flags, "--max-tiles", 2)
    assert prompt.tokens == [begin, *one, *wide, *text]
    parsed = "--parse-special", "--max-tiles", 2, *flags
    prompt = by_flags(checkpoint, "--prompt", "<|image|><image><|image|><|eot|>", *parsed)
    text = TOKENIZER.encode("<image>")  # no special token
    assert prompt.tokens == [begin, *one, *text, *wide, TOKENIZER.special(CHAT[3])]
    chat = by_flags(checkpoint, "--prompt", "a", "--chat", *flags)
    content = [{"type": "image", "image": x} for x in (SMALL, WIDE)]
    content.append({"type": "text", "text": "a"})
    settings = dataclasses.replace(SETTINGS, max_tiles=1)
    assert chat == render_chat(user(*content), TOKENIZER, PictureReader(settings))
    alone = by_flags(checkpoint, "--prompt", "a", "--chat")
    assert alone.tokens == render([{"role": "user", "content": "a"}], TOKENIZER)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompt", "a", "--image", "gone.png"], r"images\[0\] \('.*gone.png'\) cannot be read"),
        (["--prompt", "a", "--image", "http://a/b.png"], "--allow-network"),
        (["--prompt", "a", "--max-tiles", "0"], "--max-tiles 0 is not a whole number"),
    ],
)
def test_flags_that_cannot_be(flags, complaint, checkpoint):
    with pytest.raises(UserError, match=complaint):
        by_flags(checkpoint, *flags)


def test_pictures_of_a_file_of_requests_stand_in_it(monkeypatch):
    flags = "--prompts", "x.jsonl", "--image", "a.png"
    monkeypatch.setattr("sys.argv", ["generate", "model", *flags])
    with pytest.raises(UserError, match=r"--image goes with --prompt; .*\"images\""):
        generate.main()


def test_flags_of_a_model_without_a_tower(checkpoint, folder):
    with pytest.raises(UserError, match=r"images\[0\] is a picture, and there is no vision tower"):
        flags = "--prompt", "a", "--image", folder / "small.png"
        by_flags(checkpoint, *flags, model=TEXT_MODEL)


@pytest.mark.slow
def test_the_command_answers_about_pictures(checkpoint, folder):
    lines = [
        {"id": "a", "prompt": "<image>a", "images": ["small.png"]},
        {"id": "b", "prompt": "<image>a", "images": ["cut.png"]},
        {"id": "c", "prompt": "a"},
    ]
    path = folder / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = "--max-new-tokens", 3, "--temperature", 0, "--ignore-eos", "--cpu-devices", 1
    stdout, stderr = succeeds("generate.py", checkpoint, "--prompts", path, *options)
    first, bad, last = map(json.loads, sorted(stdout.splitlines()))
    assert "line 2" in bad["error"] and "cut.png" in bad["error"] and "1 of 3 lines" in stderr
    assert len(last["tokens"]) == 3
    (result,) = LLM(checkpoint, mesh=one_device()).generate(
        {"prompt": "<image>a", "images": [SMALL]}, GREEDY, max_new_tokens=3
    )
    assert first["tokens"] == list(result.tokens)
