"""Chat templates, and the built-in Llama 4 format, beside transformers."""

import json

import pytest
from PIL import Image

from jaxmoe.images import ImageSettings, ImageTokens, PictureReader
from jaxmoe.text import Tokenizer, render, render_chat
from jaxmoe.text.template import ChatTemplate
from tests.images.cases import TOKENS, grids
from tests.small_tokenizers import trained_backend

SPECIALS = [
    *("<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|im_start|>", "<|im_end|>", *TOKENS),
]
TOOLS = [{"name": "f", "description": "<b> & caf\u00e9", "parameters": {"x": {"type": "string"}}}]
SYSTEM = {"role": "system", "content": "  Be brief. \n"}
USER = {"role": "user", "content": "\n hi <there> \u00e9 \n"}
ITEMS = {"role": "user", "content": [{"type": "text", "text": t} for t in ("a ", " b")]}
ANSWER = {"role": "assistant", "content": " hello "}
CALL = {"function": {"name": "f", "arguments": {"x": "\u00e9", "n": None}}}
CALLS = {"role": "assistant", "content": "think", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": {"a": [1, None]}}
CHATS = [
    ([USER], None),
    ([SYSTEM, USER, ANSWER, USER], None),
    ([SYSTEM, USER], TOOLS),
    ([USER, CALLS, RESULT, ANSWER, USER], TOOLS),
    ([SYSTEM, USER, CALLS, {"role": "ipython", "content": "plain\n"}], None),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], None),
]
CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | string | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
MIXED = """{{ bos_token }}{%- set ns = namespace(n=0) %}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
  {# a comment #}
  {% generation %}
  {{ m.role }}: {{ m.content }}{{ eos_token }}
  {% endgeneration %}
  {% set ns.n = ns.n + 1 %}
  {% if ns.n > 2 %}{% break %}{% endif %}
{% endfor %}
{{ ns.n }} {{ messages | tojson(indent=2, sort_keys=true) }} {{ unknown }}{{ tools is none }}
{{ {'a': '<\u00e9>'} | tojson(ensure_ascii=true) }} {{ dict(a=1) }} {{ strftime_now('%Y') }}
"""
CASES = [
    (source, messages, tools, opened)
    for source in ("llama4", CHATML, MIXED)
    for messages, tools in CHATS
    for opened in (False, True)
]
CASES.append(("llama4", [ITEMS], None, True))  # others would write the list as Python does

PICTURE, TEXT = {"type": "image"}, {"type": "text", "text": "\n and "}
PICTURE_CHATS = [
    [{"role": "user", "content": [PICTURE, TEXT, PICTURE, TEXT]}],
    [
        SYSTEM,
        {"role": "user", "content": [TEXT, PICTURE]},
        ANSWER,
        {"role": "user", "content": [PICTURE]},
    ],
    [USER, CALLS | {"content": [TEXT, PICTURE]}, RESULT],
]
TEXTS = CASES.copy()
CASES += [("llama4", messages, None, True) for messages in PICTURE_CHATS]
IMAGE = Image.new("RGB", (700, 300))  # one row of three tiles


@pytest.fixture(scope="module")
def tokenizer():
    corpus = ["the user asks the assistant\n\n the system"]
    return Tokenizer(trained_backend(corpus, 310, SPECIALS))


@pytest.fixture(scope="module")
def expected(ask_oracle, tokenizer, tmp_path_factory):
    """The ids of each of CASES, and the source of the template that is called llama4."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer.save(folder)
    chats = [
        dict(zip(("template", "messages", "tools", "open"), case, strict=True)) for case in CASES
    ]
    (folder / "chats.json").write_text(json.dumps(chats), encoding="utf-8")
    files = {"chats": folder / "chats.json", "output": folder / "ids.json", "tokenizer": folder}
    ask_oracle({name: str(file) for name, file in files.items()})
    published = (folder / "llama4.jinja").read_text(encoding="utf-8")
    return json.loads((folder / "ids.json").read_text(encoding="utf-8")), published


@pytest.mark.oracle
def test_templates_give_the_ids_of_transformers(expected, tokenizer):
    ids, published = expected
    for (source, messages, tools, opened), wanted in zip(TEXTS, ids, strict=False):
        template = ChatTemplate(published if source == "llama4" else source, "its.jinja")
        own = Tokenizer(tokenizer.backend, {"eos_token": "<|eot|>"}, {"default": template})
        assert render(messages, own, tools, opened) == wanted, (source, messages, opened)


@pytest.mark.oracle
def test_the_built_in_format_gives_the_ids_of_the_published_template(expected, tokenizer):
    ids, _ = expected
    for (source, messages, tools, opened), wanted in zip(TEXTS, ids, strict=False):
        if source == "llama4":
            assert render(messages, tokenizer, tools, opened) == wanted, (messages, opened)


def with_image(content):
    """Content whose pictures are one."""
    if not isinstance(content, list):
        return content
    return [PICTURE | {"image": IMAGE} if item == PICTURE else item for item in content]


@pytest.mark.oracle
@pytest.mark.parametrize("way", ["built in", "template"])
def test_chats_with_pictures_give_the_ids_of_transformers(expected, tokenizer, way):
    """Each of their `<|image|>` is expanded here, as their processor does before it tokenizes."""
    ids, published = expected
    template = {"default": ChatTemplate(published, "its.jinja")} if way == "template" else {}
    own = Tokenizer(tokenizer.backend, {}, template)
    tokens = ImageTokens.of(tokenizer.specials)
    for messages, wanted in zip(PICTURE_CHATS, ids[-len(PICTURE_CHATS) :], strict=True):
        given = [message | {"content": with_image(message["content"])} for message in messages]
        prompt = render_chat(given, own, PictureReader(ImageSettings()))
        assert len(prompt.pictures) == wanted.count(tokens.image) > 0
        grids = [picture.grid for picture in prompt.pictures]
        assert prompt.tokens == tokens.expand(wanted, grids, 144)


@pytest.mark.oracle
def test_the_tokens_of_a_picture_are_those_of_transformers(ask_oracle, tokenizer, tmp_path):
    request = {"grids": grids(), "each": 144, "output": str(tmp_path / "layouts.json")}
    ask_oracle(request)
    layouts = json.loads((tmp_path / "layouts.json").read_text())
    tokens = ImageTokens.of(tokenizer.specials)
    for grid, text in zip(grids(), layouts, strict=True):
        assert tokens.layout(grid, 144) == tokenizer.encode(text, parse_special=True)
