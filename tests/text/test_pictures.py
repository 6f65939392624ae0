"""Pictures in chats and prompts: at their places, expanded once, never out of text."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxmoe.errors import UserError
from jaxmoe.images import ImageSettings, ImageTokens, PictureReader
from jaxmoe.text import Tokenizer, render, render_chat, split_places, text_prompt, token_prompt
from jaxmoe.text.template import ChatTemplate
from tests.images.cases import TOKENS
from tests.text.conftest import CHAT_SPECIALS

SETTINGS = ImageSettings(tile_size=28, tokens_per_tile=2)
SMALL, WIDE = (Image.new("RGB", size) for size in ((28, 28), (56, 28)))  # one tile and two
OF_SMALL = "<|image_start|><|image|><|patch|><|patch|><|image_end|>"
OF_WIDE = (
    "<|image_start|><|patch|><|patch|><|tile_x_separator|><|patch|><|patch|><|tile_y_separator|>"
    "<|image|><|patch|><|patch|><|image_end|>"
)
TEMPLATE = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|header_start|>' + (m.role if m.role != 'tool' else 'ipython') + '<|header_end|>\\n\\n' }}
    {%- if m.role == 'tool' %}{{- m.content | tojson }}
    {%- elif m.content is string %}{{- m.content }}
    {%- else %}
        {%- for item in m.content %}
            {{- '<|image|>' if item.type == 'image' else item.text }}
        {%- endfor %}
    {%- endif %}{{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"""
ESCAPED = TEMPLATE.replace("tojson", "tojson(ensure_ascii=true)")
OF_TEXTS = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|header_start|>' + (m.role if m.role != 'tool' else 'ipython') + '<|header_end|>\\n\\n' }}
    {{- (m.content | tojson) if m.role == 'tool' else m.content | string }}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"""
WAYS = {"built in": None, "template": TEMPLATE, "escaping": ESCAPED, "of texts": OF_TEXTS}


@pytest.fixture(params=WAYS)
def tokenizer(request, train_small):
    """One that renders by the format that is built in, or by a template of the checkpoint."""
    source = WAYS[request.param]
    templates = {"default": ChatTemplate(source, "its.jinja")} if source else {}
    return Tokenizer(train_small([*CHAT_SPECIALS, *TOKENS]), templates=templates)


@pytest.fixture
def plain(train_small):
    return Tokenizer(train_small([*CHAT_SPECIALS, *TOKENS]))


def reader():
    return PictureReader(SETTINGS)


def turn(role, content):
    return f"<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>"


def image(picture=SMALL):
    return {"type": "image", "image": picture}


def item(text):
    return {"type": "text", "text": text}


def user(*items, **others):
    return {"role": "user", "content": list(items), **others}


def rendered(messages, tokenizer, **options):
    """The text of a chat, and the grids of its pictures."""
    prompt = render_chat(messages, tokenizer, reader(), add_generation_prompt=False, **options)
    check_counts(prompt, tokenizer)
    text = tokenizer.decode(prompt.tokens[1:], skip_special=False)
    return text, [picture.grid for picture in prompt.pictures]


def check_counts(prompt, tokenizer):
    patches = prompt.tokens.count(ImageTokens.of(tokenizer.specials).patch)
    assert patches == sum(picture.num_features for picture in prompt.pictures)


# Chats


def test_pictures_stand_where_their_items_stand(tokenizer):
    messages = [
        user(image(), item("and "), image(WIDE), item("?")),
        {"role": "assistant", "content": "ah"},
        user(item("the "), image(WIDE)),
    ]
    text, grids = rendered(messages, tokenizer)
    assert text == (
        turn("user", OF_SMALL + "and " + OF_WIDE + "?")
        + turn("assistant", "ah")
        + turn("user", "the " + OF_WIDE)
    )
    assert grids == [(1, 1), (1, 2), (1, 2)]


def test_the_assistants_turn_is_opened_after_pictures(tokenizer):
    prompt = render_chat([user(image())], tokenizer, reader())
    text = tokenizer.decode(prompt.tokens, skip_special=False)
    assert text.endswith(OF_SMALL + "<|eot|><|header_start|>assistant<|header_end|>\n\n")


@pytest.mark.parametrize("kind", ["image_url", "input_image", "image"])
def test_each_type_of_item_is_a_picture(kind, tokenizer):
    text, grids = rendered([user({"type": kind, "image_url": {"url": SMALL}})], tokenizer)
    assert (text, grids) == (turn("user", OF_SMALL), [(1, 1)])


def test_texts_of_responses_are_texts(tokenizer):
    text, _ = rendered([user({"type": "input_text", "text": "a"}, image())], tokenizer)
    assert text == turn("user", "a" + OF_SMALL)


def test_a_lone_item_is_a_picture(tokenizer):
    text, _ = rendered([{"role": "user", "content": image()}], tokenizer)
    assert text == turn("user", OF_SMALL)


@pytest.mark.parametrize("role", ["tool"])
def test_the_result_of_a_tool_may_have_pictures(role, tokenizer):
    messages = [
        user(item("look")),
        {"role": role, "content": [item('a "map": '), image(WIDE), item("\n")]},
        user(item("so?"), image()),
    ]
    text, grids = rendered(messages, tokenizer)
    assert text == (
        turn("user", "look")
        + turn("ipython", f'"a \\"map\\": {OF_WIDE}\\n"')
        + turn("user", "so?" + OF_SMALL)
    )
    assert grids == [(1, 2), (1, 1)]


@pytest.mark.parametrize("marker", ["<image>", "<|image|>"])
def test_a_list_of_images_belongs_to_the_places_in_the_text(marker, tokenizer):
    message = {"role": "user", "content": f"a {marker}b{marker}", "images": [WIDE, SMALL]}
    text, grids = rendered([message, user(item("c <image>"))], tokenizer)
    assert text == turn("user", "a " + OF_WIDE + "b" + OF_SMALL) + turn("user", "c <image>")
    assert grids == [(1, 2), (1, 1)]


def test_a_list_beside_all_messages_belongs_to_all_places(tokenizer):
    messages = [
        user({"type": "image"}, item("a")),
        {"role": "assistant", "content": "no <|image|"},
        {"role": "user", "content": "<image>b"},
    ]
    text, grids = rendered(messages, tokenizer, images=[SMALL, WIDE])
    assert text == (
        turn("user", OF_SMALL + "a")
        + turn("assistant", "no <|image|")
        + turn("user", OF_WIDE + "b")
    )
    assert grids == [(1, 1), (1, 2)]


@pytest.mark.parametrize(
    ("content", "images", "counts"),
    [("<image>", [], (1, 0)), ("a", [SMALL], (0, 1)), ("<image><|image|>", [SMALL], (2, 1))],
)
def test_as_many_places_as_pictures(content, images, counts, tokenizer):
    complaint = "given: {1}, places for them in the text: {0};".format(*counts)
    message = {"role": "user", "content": content}
    with pytest.raises(UserError, match=rf"messages\[1\]: .*{complaint}"):
        render_chat([user(item("a")), message | {"images": images}], tokenizer, reader())
    with pytest.raises(UserError, match=complaint):
        render_chat([message], tokenizer, reader(), images=images)


def test_no_text_becomes_a_part_of_a_picture(tokenizer):
    """Catches the forgery of pictures by names in texts, and marks that texts may have."""
    forged = "".join(TOKENS) + "<image>\ue000\ue001 \\ue000\\ue002"
    messages = [
        {"role": "system", "content": forged},
        user(item(forged), image(), item(forged)),
        {"role": "tool", "content": [item(forged), image(WIDE)]},
    ]
    prompt = render_chat(messages, tokenizer, reader())
    check_counts(prompt, tokenizer)
    ids = ImageTokens.of(tokenizer.specials)
    assert [prompt.tokens.count(id_) for id_ in (ids.start, ids.image, ids.end)] == [2, 2, 2]
    text = tokenizer.decode(prompt.tokens, skip_special=False)
    assert forged + OF_SMALL + forged in text
    in_json = [json.dumps(forged, ensure_ascii=x)[1:-1] + OF_WIDE for x in (False, True)]
    assert any(one in text for one in in_json)


def test_a_text_alone_is_rendered_as_ever(tokenizer):
    messages = [user(item("<|image|> <image> <|patch|>"))]
    prompt = render_chat(messages, tokenizer, reader())
    assert prompt.tokens == render(messages, tokenizer) and not prompt.pictures
    assert not set(ImageTokens.of(tokenizer.specials).__dict__.values()) & set(prompt.tokens)


def test_tools_stand_before_pictures_in_the_first_message(plain):
    tools = [{"name": "f"}]
    text, _ = rendered([user(item(" a "), image(), item(" b "))], plain, tools=tools)
    assert text.endswith(f'"name": "f"\n}}\n\na {OF_SMALL} b<|eot|>')


def test_a_template_that_loses_pictures_is_refused(train_small):
    source = "{% for m in messages %}{{ m.role }}{% endfor %}"
    backend = train_small([*CHAT_SPECIALS, *TOKENS])
    tokenizer = Tokenizer(backend, templates={"default": ChatTemplate(source, "its.jinja")})
    with pytest.raises(UserError, match=r"its\.jinja does not write <\|image\|> once for each"):
        render_chat([user(image())], tokenizer, reader())


def test_a_tokenizer_without_tokens_of_pictures_is_refused(small):
    with pytest.raises(UserError, match=r"no special token <\|image"):
        render_chat([user(image())], small, reader())


def test_without_a_tower_pictures_are_refused_by_place(tokenizer):
    for render_one in (render, lambda *given: render_chat(*given, None)):
        with pytest.raises(UserError, match=r"messages\[0\]\.content\[1\] is a picture, and there"):
            render_one([user(item("a"), image())], tokenizer)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (user({"type": "image"}), r"messages\[0\]\.content\[0\] has no picture"),
        (user(item("a"), {"type": "image", "path": "gone.png"}), r"content\[1\] \('.*gone.png'\)"),
        (user(image(), images="a.png"), r"messages\[0\]: images is no list"),
        ({"role": "user", "content": "<image>", "images": [3]}, r"content\[0\] is 3, which is no"),
        ({"role": "tool", "content": [image(), 3]}, "neither a string nor a list"),
    ],
)
def test_bad_pictures_are_named_by_place(message, complaint, plain):
    with pytest.raises(UserError, match=complaint):
        render_chat([message], plain, reader())


# Prompts


def test_pictures_between_texts(plain):
    prompt = text_prompt(["a ", "b", ""], plain, reader(), [SMALL, WIDE])
    check_counts(prompt, plain)
    text = plain.decode(prompt.tokens, skip_special=False)
    assert text == "<|begin_of_text|>a " + OF_SMALL + "b" + OF_WIDE


def test_names_in_prompts_are_text_unless_parsed(plain):
    name = "<|patch|><|eot|>"
    patch, eot = plain.special("<|patch|>"), plain.special("<|eot|>")
    tokens = text_prompt([name, ""], plain, reader(), [SMALL]).tokens
    assert (tokens.count(patch), tokens.count(eot)) == (2, 0)
    tokens = text_prompt(["<|eot|>", ""], plain, reader(), [SMALL], parse_special=True).tokens
    assert (tokens.count(patch), tokens.count(eot)) == (2, 1)


def test_places_of_a_text():
    assert split_places("a<image>b<|image|><image >") == ["a", "b", "<image >"]


def test_a_prompt_has_as_many_places_as_pictures(plain):
    with pytest.raises(UserError, match="given: 1, places for them in the text: 0"):
        text_prompt(["a"], plain, reader(), [SMALL])
    with pytest.raises(UserError, match=r"images\[0\] is a picture, and there is no vision tower"):
        text_prompt(["a", ""], plain, None, [SMALL])


def test_tokens_are_expanded_once(plain):
    mark = plain.special("<|image|>")
    prompt = token_prompt([5, mark, 6, mark], plain, reader(), [SMALL, WIDE])
    ids = ImageTokens.of(plain.specials)
    assert prompt.tokens == [5, *ids.layout((1, 1), 2), 6, *ids.layout((1, 2), 2)]
    again = token_prompt(prompt.tokens, plain, reader(), [SMALL, WIDE])
    assert again.tokens == prompt.tokens and again.pictures == prompt.pictures
    assert token_prompt([5, 6], None, reader(), [np.asarray(SMALL)]).tokens == [5, 6]
