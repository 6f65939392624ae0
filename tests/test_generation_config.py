"""Stop tokens and sampling come from generation_config.json, and errors name it."""

import json
import re
from dataclasses import replace

import pytest

from jaxmoe.config import SCOUT
from jaxmoe.errors import UserError
from jaxmoe.generation.sampling import Sampling, sampling_of
from jaxmoe.generation_config import GenerationConfig, read_generation_config, with_stop_ids


@pytest.fixture
def folder(tmp_path):
    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "generation_config.json").write_text(text)
        return tmp_path

    return write


def test_no_file_says_nothing(tmp_path):
    assert read_generation_config(tmp_path) == GenerationConfig()
    assert sampling_of(tmp_path) == Sampling()


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 5]}, (7, 5)),
        ({"eos_token_id": 0}, (0,)),
        ({"eos_token_id": None}, ()),
        ({"text_config": {"eos_token_id": 7}}, (7,)),
        ({"text_config": {"eos_token_id": 7}, "eos_token_id": [5]}, (5,)),
        ({"text_config": {"eos_token_id": 7}, "eos_token_id": None}, (7,)),
        ({"text_config": None}, ()),
    ],
)
def test_ids_that_end_an_answer(folder, content, ids):
    assert read_generation_config(folder(content)).eos_token_ids == ids


def test_stop_ids_are_those_of_both_files(folder):
    """A fine-tune may name a stop token in either file; without it, answers would not end."""
    config = replace(SCOUT, eos_token_ids=(1, 2))
    assert with_stop_ids(config, folder({"eos_token_id": [2, 9]})).eos_token_ids == (1, 2, 9)


@pytest.mark.parametrize(
    ("content", "sampling"),
    [
        ({"temperature": 0.3}, {"temperature": 0.3}),
        ({"top_k": 4, "top_p": 0.5}, {"top_k": 4, "top_p": 0.5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0.6}, {"top_p": 1.0}),
        ({"do_sample": False, "temperature": 0.3, "min_p": 0.1}, {"temperature": 0.0}),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, {"min_p": 0.1, "repetition_penalty": 1.1}),
        (
            {"do_sample": False, "repetition_penalty": 2},
            {"temperature": 0.0, "repetition_penalty": 2.0},
        ),
        ({"text_config": {"top_p": 0.5}, "top_k": 3}, {"top_k": 3, "top_p": 0.5}),
        ({"temperature": None, "do_sample": None}, {}),
    ],
)
def test_sampling_is_the_checkpoints_unless_it_is_given(folder, content, sampling):
    path = folder(content)
    assert sampling_of(path, top_p=None) == Sampling(**sampling)
    wanted = {"temperature": 2.0, "top_k": 0, "seed": 3}
    assert sampling_of(path, **wanted) == Sampling(**sampling | wanted)


def test_what_is_asked_for_in_vain_is_named(folder):
    content = {"repetition_penalty": 1.1, "typical_p": 1.0, "num_beams": 1, "suppress_tokens": [3]}
    content |= {"text_config": {"no_repeat_ngram_size": 2}}
    unsupported = read_generation_config(folder(content)).unsupported
    assert set(unsupported) == {"suppress_tokens", "no_repeat_ngram_size"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ([], "no JSON object"),
        ({"text_config": [1]}, "no JSON object"),
        ({"eos_token_id": "x"}, "eos_token_id 'x'"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id \[1, -1\]"),
        ({"eos_token_id": True}, "eos_token_id True"),
        ({"eos_token_id": 1.0}, "eos_token_id 1.0"),
        ({"eos_token_id": 2**31}, "eos_token_id"),
        ({"do_sample": 1}, "do_sample 1"),
        ({"temperature": "hot"}, "temperature 'hot'"),
        ('{"temperature": 1e999}', "has the number 1e999, which is too large"),
        ({"temperature": -1}, "temperature -1.0 is not"),
        ({"top_k": 0.5}, "top_k 0.5"),
        ({"top_p": 2}, "top_p 2.0 is not"),
        ({"min_p": "x"}, "min_p 'x'"),
        ({"repetition_penalty": 0}, "repetition_penalty 0.0 is not"),
    ],
)
def test_what_cannot_be_used_is_named(folder, content, complaint):
    path = folder(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + complaint):
        sampling_of(path)
