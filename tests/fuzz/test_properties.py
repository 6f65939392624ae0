"""Texts that hypothesis makes up: read as they are, or refused in one sentence."""

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as some

from jaxmoe.errors import UserError
from jaxmoe.generation.jobs import read_requests
from jaxmoe.generation.request_keys import KEYS
from jaxmoe.hf_config import from_hf
from jaxmoe.mesh import MeshConfig
from jaxmoe.parsing import MAX_DEPTH, parse_json, read_yaml
from tests.fuzz.kinds import CONFIG

quick = settings(max_examples=100, deadline=None, derandomize=True)
numbers = some.integers(-(10**30), 10**30) | some.floats(allow_nan=False, allow_infinity=False)
values = some.recursive(
    some.none() | some.booleans() | numbers | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
)


def refused_at_most(function, *arguments):
    with contextlib.suppress(UserError):
        function(*arguments)


@quick
@given(values)
def test_json_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value), "text") == value


@quick
@given(some.text() | some.binary())
def test_no_text_is_more_than_refused_as_json(text):
    refused_at_most(parse_json, text, "text")


@quick
@given(some.integers(1, 2 * MAX_DEPTH))
def test_depth_is_what_it_says(depth):
    text = "[" * depth + "]" * depth
    try:
        parse_json(text, "text")
    except UserError:
        assert depth > MAX_DEPTH
    else:
        assert depth <= MAX_DEPTH


@quick
@given(some.text())
def test_no_text_is_more_than_refused_as_yaml_or_mesh(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "mesh.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    refused_at_most(read_yaml, file)
    refused_at_most(MeshConfig.parse, str(file))
    refused_at_most(MeshConfig.parse, text)


@quick
@given(
    some.dictionaries(some.sampled_from(["id", "prompt", "messages", "tokens", "tools"]), values)
)
def test_no_record_is_more_than_refused(tmp_path_factory, record):
    file = tmp_path_factory.getbasetemp() / "jobs.jsonl"
    file.write_text(json.dumps(record))
    refused_at_most(read_requests, file, None, 4)


@quick
@given(some.sampled_from(sorted(CONFIG)), values)
def test_no_value_of_a_configuration_is_more_than_refused(key, value):
    refused_at_most(from_hf, CONFIG | {key: value}, "config.json")


@quick
@given(some.dictionaries(some.sampled_from(KEYS), values | some.integers(0, 3), min_size=1))
def test_no_setting_of_a_request_is_more_than_refused(tmp_path_factory, settings):
    file = tmp_path_factory.getbasetemp() / "settings.jsonl"
    file.write_text(json.dumps({"id": 1, "tokens": [1], **settings}))
    refused_at_most(read_requests, file, None, 4)
