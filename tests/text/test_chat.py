import pytest

from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer, render

TOOL = {"name": "f", "parameters": {"x": "caf\u00e9 <1>"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "caf\u00e9", "n": None}}}

TOOLS_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call with its "
    "proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name '
    "and its value}.Do not use variables.\n\n"
    '{\n    "name": "f",\n    "parameters": {\n        "x": "caf\u00e9 <1>"\n    }\n}\n\n'
)


def turn(role: str, content: str) -> str:
    return f"<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>"


def rendered(tokenizer: Tokenizer, messages, **options) -> str:
    """The text that `render` makes, without the begin-of-text token."""
    ids = render(messages, tokenizer, add_generation_prompt=False, **options)
    assert ids[0] == tokenizer.bos_id
    return tokenizer.decode(ids[1:], skip_special=False)


def user(content) -> dict:
    return {"role": "user", "content": content}


def test_turns_follow_each_other(small):
    messages = [
        {"role": "system", "content": " \n Be brief. \n"},
        user("  hi \n"),
        {"role": "assistant", "content": " hello "},
        user([{"type": "text", "text": "and "}, {"type": "text", "text": " now? "}]),
    ]
    # Only the system message is trimmed, and text items are joined by nothing.
    assert rendered(small, messages) == (
        turn("system", "Be brief.")
        + turn("user", "  hi \n")
        + turn("assistant", " hello ")
        + turn("user", "and  now? ")
    )


def test_developer_is_a_system(small):
    messages = [{"role": "developer", "content": " Be brief. "}, user("hi")]
    assert rendered(small, messages) == turn("system", "Be brief.") + turn("user", "hi")


def test_generation_prompt_opens_the_assistants_turn(small):
    closed = render([user("hi")], small, add_generation_prompt=False)
    opened = render([user("hi")], small)
    assert opened[: len(closed)] == closed
    tail = small.decode(opened[len(closed) :], skip_special=False)
    assert tail == "<|header_start|>assistant<|header_end|>\n\n"


def test_markers_are_special_tokens_and_there_is_one_begin_of_text(small):
    ids = render([user("hi")], small)
    names = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"]
    assert [ids.count(small.special(name)) for name in names] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: {"messages": [user(text)]},
        lambda text: {"messages": [user([{"type": "text", "text": text}])]},
        lambda text: {"messages": [{"role": "system", "content": text}]},
        lambda text: {"messages": [{"role": "assistant", "content": text}]},
        lambda text: {"messages": [{"role": "tool", "content": {text: [text]}}]},
        lambda text: {"messages": [user("hi")], "tools": [{"name": text}]},
        lambda text: {
            "messages": [
                {
                    "role": "assistant",
                    "content": text,
                    "tool_calls": [{"function": {"name": text, "arguments": {text: text}}}],
                }
            ]
        },
        lambda text: {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": text}}],
                }
            ]
        },
    ],
)
def test_nothing_in_a_message_becomes_a_special_token(small, wrap):
    def specials(text: str) -> list[int]:
        ids = render(**wrap(text), tokenizer=small)
        return [id_ for id_ in ids if id_ in small.specials.values()]

    assert specials("".join(small.specials)) == specials("x")


def test_tools_go_into_the_first_user_message(small):
    messages = [{"role": "system", "content": " Be brief. "}, user("  hi \n"), user(" more ")]
    assert rendered(small, messages, tools=[TOOL]) == (
        turn("system", "Environment: ipython\nBe brief.")
        + turn("user", TOOLS_INTRODUCTION + "hi")
        + turn("user", " more ")
    )


def test_tools_without_a_system_message_add_none(small):
    text = rendered(small, [user([{"type": "text", "text": " hi "}])], tools=[TOOL])
    assert text == turn("user", TOOLS_INTRODUCTION + "hi")


def test_no_tools_leave_the_messages_alone(small):
    messages = [{"role": "system", "content": "s"}, user(" hi ")]
    assert rendered(small, messages, tools=[]) == turn("system", "s") + turn("user", " hi ")


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
def test_tool_calls_follow_the_python_markers(small, content):
    calls = [CALL, {"function": {"name": "g", "arguments": '{"a":1}'}}]
    body = (
        "<|python_start|><|python_end|>"
        '{"name": "f", "parameters": {"x": "caf\u00e9", "n": null}}'
        '{"name": "g", "parameters": {"a":1}}'
    )
    message = {"role": "assistant", "tool_calls": calls, **content}
    assert rendered(small, [message]) == turn("assistant", body)
    ids = render([message], small)
    assert small.special("<|python_start|>") in ids and small.special("<|python_end|>") in ids


def test_content_of_a_tool_call_stands_between_the_markers(small):
    message = {"role": "assistant", "content": " think ", "tool_calls": [CALL]}
    assert "<|python_start|> think <|python_end|>{" in rendered(small, [message])


def test_empty_tool_calls_do_not_lose_the_message(small):
    message = {"role": "assistant", "content": "hello", "tool_calls": []}
    assert rendered(small, [message]) == turn("assistant", "hello")


@pytest.mark.parametrize("role", ["ipython", "tool"])
@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("caf\u00e9\n", '"caf\u00e9\\n"'),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (3, "3"),
        (False, "false"),
        ([{"type": "text", "text": "x"}], '[{"type": "text", "text": "x"}]'),
    ],
)
def test_tool_results_are_json_in_an_ipython_turn(small, role, result, text):
    assert rendered(small, [{"role": role, "content": result}]) == turn("ipython", text)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"role": "narrator", "content": "x"}, "no known role"),
        ({"role": ["user"], "content": "x"}, "no known role"),
        ({"content": "x"}, "no known role"),
        ("hi", "no known role"),
        ({"role": "user"}, "no content"),
        ({"role": "assistant", "content": None}, "no content"),
        ({"role": "tool"}, "no content"),
        (user(3), "neither a string nor a list"),
        (user({"type": "text", "text": "x"}), "neither a string nor a list"),
        (user(["x"]), "neither a string nor a list"),
        (user([{"type": "text", "text": None}]), "neither a string nor a list"),
        (user([{"type": "audio", "text": "x"}]), "neither a string nor a list"),
        (user([{"type": "image"}]), "is a picture, and there is no vision"),
        (
            user([{"type": "text", "text": "x"}, {"type": "image_url"}]),
            r"content\[1\] is a picture",
        ),
        (
            {"role": "tool", "content": [{"type": "image"}]},
            "is a picture, and there is no vision",
        ),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only an assistant"),
        ({"role": "assistant", "tool_calls": CALL}, "not a list"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "tool call that is not"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]},
            "tool call that is not",
        ),
    ],
)
def test_bad_message_is_named_by_its_index(small, bad, complaint):
    with pytest.raises(UserError, match=rf"messages\[1\].*{complaint}"):
        render([user("hi"), bad], small)


@pytest.mark.parametrize("messages", [[], {}, "hi", None])
def test_messages_that_are_no_list_of_messages(small, messages):
    with pytest.raises(UserError, match="not a list of at least one message"):
        render(messages, small)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "s"}],
        [{"role": "assistant", "content": "a"}, user("hi")],
        [{"role": "system", "content": "s"}, {"role": "tool", "content": "r"}],
    ],
)
def test_tools_need_a_first_user_message(small, messages):
    with pytest.raises(UserError, match="first user message"):
        render(messages, small, tools=[TOOL])


@pytest.mark.parametrize("tools", [TOOL, ["f"], "f"])
def test_tools_that_are_no_list_of_objects(small, tools):
    with pytest.raises(UserError, match="not a list of JSON objects"):
        render([user("hi")], small, tools=tools)


def test_base_model_has_no_chat_format(train_small):
    with pytest.raises(UserError, match=r'no chat format.*<\|header_start\|>.* use "prompt"'):
        render([user("hi")], Tokenizer(train_small(["<|begin_of_text|>", "<|eot|>"])))


def test_markers_that_text_could_forge_are_no_chat_format(train_small):
    # A token that is not marked special is read out of any text.
    backend = train_small(["<|begin_of_text|>"])
    backend.add_tokens(["<|header_start|>", "<|header_end|>", "<|eot|>"])
    with pytest.raises(UserError, match="no chat format"):
        render([user("hi")], Tokenizer(backend))


@pytest.mark.parametrize(
    ("content", "body"),
    [("hi", [368, 5703]), ("\nfoo", [2946, 16662])],  # the header's newlines merge with the text's
)
def test_meta_ids_of_one_user_turn(meta, content, body):
    opening, closing = [200_000, 200_005, 1556, 200_006], [200_008, 200_005, 140_680, 200_006, 368]
    assert render([user(content)], meta) == [*opening, *body, *closing]
