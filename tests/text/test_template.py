"""Chat templates are found, rendered as by transformers, and limited in time and memory."""

import json
import subprocess
import sys

import pytest

from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer, jinja_worker, render, template
from jaxmoe.text.template import ChatTemplate

LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message.role + '<|header_end|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {{- item.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""
EACH = "{% for message in messages %}"
PLAIN = EACH + "{{ message.content }}<|eot|>{% endfor %}"


def user(content) -> dict:
    return {"role": "user", "content": content}


@pytest.fixture
def written(small):
    """The text that a template writes of some messages."""

    def write(source, messages=None, **options) -> str:
        names = {"eos_token": "<|eot|>"}
        tokenizer = Tokenizer(small.backend, names, {"default": ChatTemplate(source, "its.jinja")})
        messages = [user("hi")] if messages is None else messages
        ids = render(messages, tokenizer, **options)
        return tokenizer.decode(ids, skip_special=False)

    return write


def test_the_checkpoints_template_comes_before_the_built_in_format(written):
    assert written("{{ messages[0].content }}!") == "hi!"


@pytest.mark.parametrize("opened", [True, False])
def test_a_template_of_the_llama_4_format_gives_the_built_in_ids(meta, opened):
    messages = [
        {"role": "system", "content": "Be brief."},
        user(" \nhi "),
        {"role": "assistant", "content": "na\u00efve \u65e5"},
        user([{"type": "text", "text": "and "}, {"type": "text", "text": "<|eot|>"}]),
    ]
    own = Tokenizer(meta.backend, {}, {"default": ChatTemplate(LLAMA, "its.jinja")})
    expected = render(messages, meta, add_generation_prompt=opened)
    assert render(messages, own, add_generation_prompt=opened) == expected


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),  # blocks are trimmed on both sides
        ("{{ {'a': '<\u00e9 & \"'} | tojson }}", '{"a": "<\u00e9 & \\""}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=true) }}", None),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in [1] %}{% continue %}{{ i }}{% endfor %}x", "x"),
        ("a{% generation %}{% for i in [1] %}{{ i }}{% endfor %}{% endgeneration %}b", "a1b"),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ bos_token }}{{ eos_token }}{{ pad_token }}", "<|begin_of_text|><|eot|>"),
        ("{{ tools is none }} {{ documents is none }} {{ unknown }}", "True True "),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('y') }}", "[y]"),
        ("{{ 'a&lt;b' | replace('&lt;', '<') | upper }} {{ '<' | e }}", "A<B &lt;"),
        ("{{ lipsum(n=1, html=false) | length > 9 }}", "True"),  # needs a module of its own
    ],
)
def test_templates_have_what_transformers_gives_them(written, source, text):
    if text is None:
        text = json.dumps({"a": [2], "b": 1}, indent=1)
    assert written(source) == text


@pytest.mark.parametrize(
    "source",
    [
        PLAIN,
        EACH + "{{ message.content | trim }}{% endfor %}",
        EACH + "{{ message.content }}{{ message.content }}{% endfor %}",
        EACH + "{{ message | tojson }}{% endfor %}",
        "{{ messages | tojson(ensure_ascii=true) }}",
        "{{ messages }}",
        "{{ tools | tojson }}",
        EACH + "{% for item in message.content %}{{ item.text | trim }}{% endfor %}{% endfor %}",
    ],
)
def test_nothing_in_a_message_becomes_a_special_token(small, source):
    own = Tokenizer(small.backend, {}, {"default": ChatTemplate(source, "its.jinja")})

    def specials(text: str, half: str) -> list[int]:
        items = [{"type": "text", "text": half}, {"type": "text", "text": "ot|>"}]
        messages = [user(text), user(half), user("ot|>"), user(items), user("end")]
        ids = render([*messages, {"role": "user", text: text}], own, tools=[{"name": text}])
        return [id_ for id_ in ids if id_ in small.specials.values()]

    assert specials("".join(small.specials), "<|e ") == specials("x", "y")


@pytest.mark.parametrize("text", ["a < b <|eot|> <| <", "\ue000<|eot|>\ue001", '"\\<|'])
@pytest.mark.parametrize("ascii", ["false", "true"])
def test_text_is_what_was_said(written, text, ascii):
    source = f"{{{{ messages[0].content }}}}=={{{{ messages[0].content | tojson({ascii}) }}}}"
    expected = json.dumps(text, ensure_ascii=ascii == "true")
    assert written(source, [user(text)]) == f"{text}=={expected}"


@pytest.mark.parametrize(
    "source",
    [
        PLAIN,  # prints a list as Python
        EACH + "{{ message.content | trim }}<|eot|>{% endfor %}",  # likewise
        EACH + "{{ '' + message.content }}<|eot|>{% endfor %}",  # raises for a list
        EACH + "{% for i in message.content %}{{ i.text }}{% endfor %}<|eot|>{% endfor %}",
    ],
)
@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}]])
def test_a_template_that_reads_one_form_of_content_gets_it(written, source, content):
    assert written(source, [user(content)]) == "hi<|eot|>"


def test_keys_that_are_null_are_left_out(written):
    message = {"role": "assistant", "content": None, "name": "n"}
    assert written("{{ messages[0] | tojson }}", [message]) == '{"role": "assistant", "name": "n"}'


@pytest.mark.parametrize(("arguments", "text"), [('{"a": 1}', '{"a": 1}'), ("a", '"a"')])
def test_arguments_in_json_are_read(written, arguments, text):
    call = {"function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "tool_calls": [call]}
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert written(source, [message]) == text


def test_developer_is_a_system_unless_the_template_knows_one(written):
    message = {"role": "developer", "content": "x"}
    assert written("{{ messages[0].role }}", [message]) == "system"
    assert written("{{ messages[0].role }}{# developer #}", [message]) == "developer"


def test_tools_reach_the_template_and_choose_it(small):
    both = {
        "default": ChatTemplate("plain {{ tools }}", "its.jinja"),
        "tool_use": ChatTemplate("{{ tools[0].name }}", "its.jinja"),
    }
    tokenizer = Tokenizer(small.backend, {}, both)
    assert tokenizer.decode(render([user("hi")], tokenizer, tools=[{"name": "f"}])) == "f"
    assert tokenizer.decode(render([user("hi")], tokenizer, tools=[])) == "plain None"


# Refusals


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("a\n{% if %}", r"line 2 .*Expected an expression"),
        (
            "a\n{{ raise_exception('roles must\n alternate') }}",
            r"line 2 .*\(roles must alternate\)",
        ),
        ("{{ messages[0].x.y }}", "line 1 .*no attribute 'x'"),
        ("{{ 1 / 0 }}", "line 1 .*division by zero"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ x(", "line 1"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "cannot render"),
    ],
)
def test_what_a_template_raises_is_one_sentence(written, source, complaint):
    with pytest.raises(
        UserError, match=r"^its\.jinja.* cannot render .*--parse-special$"
    ) as caught:
        written(source)
    assert "\n" not in str(caught.value)
    caught.match(complaint)


LONG = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
DOUBLED = "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (LONG, "1 seconds"),
        ("{{ 9 ** (9 ** 9) }}", "1 seconds"),  # while it compiles
        ("{{ 'x' * 10 ** 11 }}", "1024 MiB"),
        ("{{ '%9999999999d' % 1 }}", "1024 MiB"),
        ("{% set n = namespace(s='x') %}" + DOUBLED, "MiB"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "writes more than 10"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
    ],
)
def test_a_hostile_template_is_stopped(written, monkeypatch, source, complaint):
    """The time limit is one second, to which the system adds up to one more."""
    monkeypatch.setattr(template, "SECONDS", 1)
    with pytest.raises(UserError, match=complaint):
        written(source)
    assert written(PLAIN) == "hi<|eot|>"


def worker(prelude):
    """The replies to one request of a worker that begins with this code."""
    run = f"import runpy\nrunpy.run_path({jinja_worker.__file__!r}, run_name='__main__')"
    request = {"template": PLAIN, "variables": {"messages": [user("hi")]}, "seconds": 9}
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}\n{run}"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout or "null")


def test_a_worker_of_a_system_with_lower_limits():
    """Catches a worker that dies where the system's limits are lower than its own."""
    limits = "(resource.RLIMIT_CPU, (7, 7)), (resource.RLIMIT_AS, (2**29, 2**29))"
    prelude = f"import resource\nfor limit in {limits}: resource.setrlimit(*limit)"
    assert worker(prelude) == {"text": "hi<|eot|>"}


def test_a_worker_of_a_system_without_limits_of_memory():
    """Catches a crash on macOS, which refuses a limit below what a process has mapped."""
    prelude = """
import resource, sys
sys.platform, limit = "darwin", resource.setrlimit
def refusing(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    limit(kind, limits)
resource.setrlimit = refusing"""
    assert worker(prelude) == {"text": "hi<|eot|>"}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        (["hi"], r"messages\[0\] is no object with a role"),
        ([{"role": 3}], r"messages\[0\] is no object with a role"),
        ([user("a\ud800")], "half of a surrogate pair"),
        ([user("a"), user([{"type": "image"}])], r"messages\[1\]\.content\[0\] is a picture"),
    ],
)
def test_messages_that_no_template_reads(written, messages, complaint):
    with pytest.raises(UserError, match=complaint):
        written(PLAIN, messages)


def test_tools_that_are_no_list_of_objects(written):
    with pytest.raises(UserError, match="not a list of JSON objects"):
        written(PLAIN, tools=["f"])


# Files


@pytest.fixture
def folder(small, tmp_path):
    """A checkpoint folder with a tokenizer and the given files."""

    def write(**files) -> Tokenizer:
        small.save(tmp_path)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            path = tmp_path / name.replace("__", ".")
            path.write_text(text, encoding="utf-8")
        return Tokenizer.load(tmp_path)

    return write


def test_a_folder_without_a_template_has_none(folder):
    assert folder(tokenizer_config__json={"chat_template": None}).templates == {}


def test_the_order_of_files(folder):
    assert folder(tokenizer_config__json={"chat_template": "c"}).templates["default"].source == "c"
    assert folder(chat_template__json={"chat_template": "b"}).templates["default"].source == "b"
    assert folder(chat_template__jinja="a").templates["default"].source == "a"


def test_templates_with_names(folder):
    found = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    templates = folder(tokenizer_config__json={"chat_template": found}).templates
    assert {name: template.source for name, template in templates.items()} == {
        "default": "a",
        "tool_use": "b",
    }


def test_errors_name_the_templates_file(folder, tmp_path):
    for file in ("tokenizer_config.json, chat_template", "chat_template.jinja"):
        name = file.split(",")[0].replace(".", "__")
        tokenizer = folder(**{name: "{% x" if "jinja" in name else {"chat_template": "{% x"}})
        with pytest.raises(UserError, match=f"^{tmp_path}/{file} line 1 cannot render"):
            render([user("hi")], tokenizer)


def test_names_of_special_tokens(folder):
    first = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|header_end|>"}}
    second = {"bos_token": None, "pad_token": {"__type": "AddedToken", "content": "<|eot|>"}}
    tokenizer = folder(special_tokens_map__json=first, tokenizer_config__json=second)
    assert tokenizer.names == {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|header_end|>",
        "pad_token": "<|eot|>",
    }
    assert tokenizer.special("<|header_end|>") in tokenizer.stop_ids


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config__json": [1]}, "tokenizer_config.json is no JSON object"),
        ({"tokenizer_config__json": {"bos_token": 3}}, "a bos_token that is no text"),
        ({"tokenizer_config__json": {"chat_template": 3}}, "neither a text nor a list"),
        ({"chat_template__json": {"chat_template": [{"name": "x"}]}}, "neither a text nor a list"),
    ],
)
def test_broken_files_are_named(folder, files, complaint):
    with pytest.raises(UserError, match=complaint):
        folder(**files)


def test_templates_without_a_default(folder):
    found = [{"name": "rag", "template": "a"}]
    tokenizer = folder(tokenizer_config__json={"chat_template": found})
    with pytest.raises(UserError, match="no template called default"):
        render([user("hi")], tokenizer)
