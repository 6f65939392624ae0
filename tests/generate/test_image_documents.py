"""Documents with images: read in chunks that cut them, saved, resumed, and asked about."""

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert.conversion import convert
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.generation.saved_document import load_document, read_document
from tests import tiny, vision
from tests.conftest import one_device
from tests.images.drawn import drawn

GREEDY = Sampling(temperature=0.0)
QUESTION = (5, 6, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    golden = vision.read_golden("vision/scout")
    folder = tmp_path_factory.mktemp("vision")
    tiny.write_checkpoint(folder / "hf", golden.config, golden.tensors())
    convert(folder / "hf", folder / "orbax", weights="int8")
    return folder / "orbax"


def pages():
    """A text of three images, and what is in it."""
    parts = [3, vision.TWO, 20, vision.Image(2, 1, 4), 4, vision.TWO, 2]
    tokens, images = vision.prompt(parts, 11, 9)
    return np.array(tokens, np.int32), [drawn(image) for image in images]


def answers(config, params, requests, **options):
    written = {}
    for token in generate(config, params, requests, GREEDY, stop_ids=(), **options):
        written.setdefault(token.request.id, []).append(token.token)
    return written


@pytest.mark.slow
def test_an_answer_is_that_of_the_whole_prompt(checkpoint, tmp_path):
    tokens, pictures = pages()
    with jax.set_mesh(one_device()):
        config, params = store.load(checkpoint, one_device())
        whole = Request("q", (*tokens.tolist(), *QUESTION), 6, pictures=tuple(pictures))
        expected = answers(config, params, [whole])
        options = {"prefill_chunk": 16, "interval": 128, "pictures": pictures}
        stopped = read_document(config, params, tokens, tmp_path / "saved", **options)
        while next(stopped) < 130:  # past the first save, within an image
            pass
        stopped.close()
        first, *_ = read_document(config, params, tokens, tmp_path / "saved", **options)
        assert first == 128
        text_only = store.load(checkpoint, one_device(), text_only=True)
        document = load_document(tmp_path / "saved", *text_only, room=16)
        assert answers(*text_only, [Request("q", QUESTION, 6)], document=document) == expected


def test_other_images_are_another_text(checkpoint, tmp_path):
    tokens, pictures = pages()
    with jax.set_mesh(one_device()):
        config, params = store.load(checkpoint, one_device())
        options = {"prefill_chunk": 16, "interval": 128}
        read = read_document(
            config, params, tokens, tmp_path / "saved", pictures=pictures, **options
        )
        while next(read) < 130:
            pass
        read.close()
        other = [drawn(vision.Image(2, 2, 77)), *pictures[1:]]
        with pytest.raises(UserError, match="another text"):
            list(
                read_document(config, params, tokens, tmp_path / "saved", pictures=other, **options)
            )


@pytest.mark.parametrize("shown", [0, 1])
def test_image_tokens_of_other_pictures_are_refused(checkpoint, tmp_path, shown):
    tokens, pictures = pages()
    config, params = store.load(checkpoint, one_device())
    words = rf"has {np.sum(tokens == config.image_token_id)} image tokens for {shown} images"
    with pytest.raises(UserError, match=f"the text {words}"):
        next(read_document(config, params, tokens, tmp_path / "out", pictures=pictures[:shown]))
    assert not (tmp_path / "out").exists()
    rows, shown_to = np.stack([np.zeros_like(tokens), tokens]), [(), pictures[:shown]]
    with pytest.raises(UserError, match=f"row 1 {words}"):
        token_logits(config, params, rows, pictures=shown_to if shown else ())


def test_quantized_weights_leave_the_tower_as_it_is(checkpoint):
    _, params = store.load(checkpoint, one_device())
    assert {x.dtype.name for x in jax.tree.leaves(params["vision"])} == {"float32"}
    assert params["layers"][0]["attention"]["q"].format == "int8"
