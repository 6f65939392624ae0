"""Pictures of prompts and chats from Python."""

import dataclasses
import io

import jax
import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.generation.features import TILES, FeatureTable
from jaxmoe.images import PictureReader
from jaxmoe.model.vision import tile_features
from jaxmoe.text import render_chat
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


@pytest.fixture(scope="module")
def llm():
    return LLM.from_parts(MODEL, random_params(), TOKENIZER, rows=2)


def test_a_prompt_and_a_chat_see_pictures(llm):
    other = {"prompt": "<image>a", "images": [np.asarray(noise(5))]}
    again = llm.generate([{"prompt": "a"}, other, "b"], GREEDY, max_new_tokens=4)
    assert [len(one.tokens) for one in again] == [4] * 3
    assert [one.usage["prompt_tokens"] for one in again] == [2, 2 + 9 + 3, 2]
    asked = dataclasses.replace(GREEDY, logprobs=0)
    pair = llm.generate([{"prompt": "<image>a", "images": [x]} for x in (SMALL, WIDE)], asked,
                        max_new_tokens=1)  # fmt: skip
    assert pair[0].logprobs != pair[1].logprobs  # what the pictures show matters

    messages = user({"type": "image", "image": WIDE}, {"type": "text", "text": "?"})
    (chat,) = llm.chat(messages, GREEDY, max_new_tokens=4)
    prompt = render_chat(messages, TOKENIZER, PictureReader(SETTINGS))
    assert chat.usage["prompt_tokens"] == len(prompt.tokens) and chat.error is None


def test_the_tokens_of_a_result_are_the_prompts(llm):
    (result,) = llm.generate({"prompt": "<image>a", "images": [SMALL]}, GREEDY, max_new_tokens=1)
    layout = IDS.layout((1, 1), SETTINGS.tokens_per_tile)
    assert result.prompt_tokens == (TOKENIZER.bos_id, *layout, *TOKENIZER.encode("a"))


def test_settings_of_the_llm_say_how_pictures_are_cut(llm, monkeypatch):
    monkeypatch.setattr(llm, "images", dataclasses.replace(llm.images, max_tiles=1))
    (result,) = llm.generate({"prompt": "<image>", "images": [WIDE]}, GREEDY, max_new_tokens=1)
    assert result.usage["prompt_tokens"] == 1 + len(IDS.layout((1, 1), 9))


def test_bad_pictures_are_results(llm):
    prompts = ["a", {"prompt": "<image>", "images": [3]}, {"prompt": "", "image": SMALL}]
    good, bad, unknown = llm.generate(prompts, GREEDY, max_new_tokens=1)
    assert good.error is None and "images[0] is 3, which is no picture" in bad.error
    assert "has other keys than prompt and images" in unknown.error


def test_an_encoded_picture_from_memory(llm):
    file = io.BytesIO()
    SMALL.save(file, "PNG")
    sources = [SMALL, file.getvalue(), {"bytes": file.getvalue(), "path": None}]
    results = llm.generate([{"prompt": "<image>", "images": [x]} for x in sources], GREEDY,
                           max_new_tokens=3)  # fmt: skip
    assert len({result.tokens for result in results}) == 1


def test_a_file_that_vanishes_ends_its_own_request_only(tmp_path):
    llm = LLM.from_parts(MODEL, random_params(), TOKENIZER, rows=1)
    path = tmp_path / "small.png"
    SMALL.save(path)
    picture = {"prompt": "<image>a", "images": [path]}
    stream = llm.stream(["ab", picture, "cd"], GREEDY, max_new_tokens=3)
    pieces = [next(stream)]
    content = path.read_bytes()
    path.unlink()
    results = {piece.index: piece.result for piece in [*pieces, *stream] if piece.result}
    assert [len(results[i].tokens) for i in range(3)] == [3, 0, 3]
    assert results[0].error is None and results[2].error is None
    assert "request '1'" in results[1].error and "small.png" in results[1].error
    path.write_bytes(content)  # and its features are not those of the black tiles
    again, memory = llm.generate([picture, picture | {"images": [SMALL]}], GREEDY, max_new_tokens=3)
    assert again.tokens == memory.tokens and again.error is None


def test_another_tower_sees_for_itself(llm):
    own = LLM.from_parts(MODEL, llm.params, TOKENIZER)
    asked = dataclasses.replace(GREEDY, logprobs=0), {"prompt": "<image>", "images": [SMALL]}
    (before,) = own.generate(asked[1], asked[0], max_new_tokens=1)
    tower = jax.tree.map(lambda x: x[::-1], llm.params["vision"]["projector"])
    own.params = {**llm.params, "vision": {**llm.params["vision"], "projector": tower}}
    (after,) = own.generate(asked[1], asked[0], max_new_tokens=1)
    assert before.logprobs != after.logprobs


def test_a_table_survives_a_tower_that_fails():
    params = random_params()

    def fails(config, params, pixels):
        raise RuntimeError("out of memory")

    table = FeatureTable(MODEL, params, encode=fails)
    picture = PictureReader(SETTINGS).open(SMALL, "it")
    for _ in range(2 * TILES):
        with pytest.raises(RuntimeError, match="out of memory"):
            table.slots([(picture, 0)])
    table._encode = tile_features
    assert table.slots([(picture, 0)]) == [0] and not table.table.is_deleted()
