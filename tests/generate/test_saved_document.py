"""Documents: read once, in any chunks, on any mesh, killed anywhere; then like the whole text."""

import contextlib
import dataclasses
import filecmp
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.zarr.manifest import FORMAT, MANIFEST, MARKER, STATE
from jaxmoe.checkpoint.zarr.writer import Writer
from jaxmoe.errors import UserError
from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.document import new_document, read
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.generation.saved_document import KEY, document_length, load_document, read_document
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.kv_cache import PAGE
from jaxmoe.model.params import abstract_params, init_params
from jaxmoe.model.transformer import forward, unembed
from tests.checkpoint.damage import change_description, change_metadata, exchange, made_old
from tests.model.test_paged_cache import CONFIG
from tests.tiers import slow_after_first

LENGTH, ASKED, NEW = 700, 20, 12
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, LENGTH + ASKED, np.int32)


@pytest.fixture(scope="module")
def plain(params, tokens):
    """Logits of the tokens after the text."""
    return token_logits(CONFIG, params, tokens[None])[0, LENGTH:]


@contextlib.contextmanager
def on(mesh, params):
    """The parameters on a mesh that is set; None: without any."""
    if mesh is None:
        yield params
        return
    mesh = MeshConfig.parse(mesh).make()
    places = jax.tree.map(lambda x: x.sharding, abstract_params(CONFIG, mesh, jnp.float32))
    with jax.set_mesh(mesh):
        yield jax.device_put(params, places)


def read_until(params, tokens, output, stop=None, mesh=None, **arguments):
    """The counts that `read_document` told, until it was interrupted."""
    told = []
    with on(mesh, params) as params:
        steps = read_document(CONFIG, params, tokens[:LENGTH], output, interval=1, **arguments)
        for count in steps:
            told.append(count)
            if stop is not None and count >= stop:
                break
        steps.close()
    return told


def logits_after(params, document, tokens):
    row = jnp.asarray(tokens)[None]
    order = document.length + jnp.arange(row.shape[1], dtype=jnp.int32)[None]
    out = forward(CONFIG, params, row, order, jnp.ones_like(row), document.cache)
    return np.asarray(unembed(CONFIG, params, out.hidden))[0]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [64, 97, 1000])  # all edges: test_paged_cache.py
def test_prefill_chunks_around_the_edges(params, tokens, plain, chunk):
    document = new_document(CONFIG, params, LENGTH + ASKED)
    *_, document = read(CONFIG, params, document, tokens[:LENGTH], prefill_chunk=chunk)
    assert document.length == LENGTH
    assert abs(logits_after(params, document, tokens[LENGTH:]) - plain).max() < 1e-4


@pytest.mark.parametrize(
    "first, second, third, kv",
    slow_after_first(
        [
            (None, None, None, None),
            ("data=2,sequence=2,tensor=2", "sequence=4,fsdp=2", None, None),
            (None, "sequence=8", "data=2,sequence=2,tensor=2", "int8"),
        ]
    ),
)
def test_interrupted_and_continued_elsewhere(
    params, tokens, plain, tmp_path, first, second, third, kv
):
    """Saves are whole chunks and pages, here 384 tokens; the rest is read again."""
    told = read_until(params, tokens, tmp_path / "text", 434, first, kv=kv, prefill_chunk=50)
    assert told == [*range(0, 351, 50), 384, 434]
    told = read_until(params, tokens, tmp_path / "text", None, second, kv=kv, prefill_chunk=300)
    assert told == [384, 684, 700]
    with on(third, params) as placed:
        document = load_document(tmp_path / "text", CONFIG, placed, ASKED)
        ours = logits_after(placed, document, tokens[LENGTH:])
    if kv is not None:
        path = {"kv": kv, "prefill_chunk": 96, "decode_from": LENGTH}
        plain = token_logits(CONFIG, params, tokens[None], **path)[0, LENGTH:]
    # A number half way between two steps of a format may be rounded either way.
    assert abs(ours - plain).max() < (1e-4 if kv is None else 0.02 * abs(plain).max())


def test_told_to_stop(params, tokens, plain, tmp_path):
    """Between two saves, and within an attention chunk."""
    told = iter([False] * 8 + [True])
    options = {"prefill_chunk": 50, "interval": 10_000, "stop": lambda: next(told)}
    *_, last = read_document(CONFIG, params, tokens[:LENGTH], tmp_path / "text", **options)
    assert last == 450
    told = read_until(params, tokens, tmp_path / "text", prefill_chunk=300)
    assert told[0] == 384 and told[-1] == LENGTH
    document = load_document(tmp_path / "text", CONFIG, params, ASKED)
    assert abs(logits_after(params, document, tokens[LENGTH:]) - plain).max() < 1e-4


def test_int4_lies_in_pairs_in_a_cache_only(params, tokens, tmp_path):
    """On disk a token has a row, as in caches of old; loaded, the numbers are those of the text."""
    read_until(params, tokens, tmp_path / "text", kv="int4", prefill_chunk=96)
    for layer, (pages, page) in enumerate([(1, 96), (-(-LENGTH // PAGE), PAGE)]):
        description = tmp_path / f"text/state/layers.{layer}.k.qvalue/zarr.json"
        shape = [pages, CONFIG.num_key_value_heads, page, CONFIG.head_dim // 2]
        assert json.loads(description.read_text())["shape"] == shape
    document = new_document(CONFIG, params, LENGTH + ASKED, "int4")
    assert all(layer.k.paired and layer.v.paired for layer in document.cache.layers)
    *_, document = read(CONFIG, params, document, tokens[:LENGTH], prefill_chunk=96)
    loaded = load_document(tmp_path / "text", CONFIG, params, ASKED)
    ours, want = (logits_after(params, x, tokens[LENGTH:]) for x in (loaded, document))
    assert abs(ours - want).max() < 1e-4


def files(folder):
    return sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    )


def arrays_alike(one, other):
    names = [name for name in files(one) if "/c/" in name or name.endswith("zarr.json")]
    assert names
    _, different, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    return not different and not missing


def test_interruptions_leave_no_trace(params, tokens, tmp_path, monkeypatch):
    """With the same chunks everything is computed alike, so every byte is the same."""
    read_until(params, tokens, tmp_path / "once", prefill_chunk=64)
    for stop in (64, 400, 512):
        read_until(params, tokens, tmp_path / "often", stop, prefill_chunk=64)
    finish = Writer.finish

    def killed(self, *arguments):
        finish(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        read_until(params, tokens, tmp_path / "often", prefill_chunk=64)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no finished checkpoint"):
        load_document(tmp_path / "often", CONFIG, params, ASKED)
    assert read_until(params, tokens, tmp_path / "often", prefill_chunk=64) == [
        384,
        448,
        512,
        576,
        640,
        700,
    ]
    assert not (tmp_path / "often.partial").exists()
    assert files(tmp_path / "once") == files(tmp_path / "often")
    assert arrays_alike(tmp_path / "once", tmp_path / "often")


def answers(params, requests, document=None):
    written = {}
    for token in generate(CONFIG, params, requests, GREEDY, stop_ids=(), document=document):
        written.setdefault(token.request.id, []).append(token.token)
    return written


@pytest.mark.slow
def test_questions_do_not_see_each_other(params, tokens, tmp_path):
    """The longest comes first: what it wrote lies where the others have nothing yet."""
    read_until(params, tokens, tmp_path / "text")
    numbers = np.random.default_rng(1)
    asked = [tuple(numbers.integers(0, CONFIG.vocab_size, n).tolist()) for n in (150, 7, 40)]
    whole = [Request(str(i), (*tokens[:LENGTH].tolist(), *new), NEW) for i, new in enumerate(asked)]
    document = load_document(tmp_path / "text", CONFIG, params, 150 + NEW)
    requests = [Request(str(i), new, NEW) for i, new in enumerate(asked)]
    assert answers(params, requests, document) == answers(params, whole)


def test_too_little_room(params, tokens, tmp_path):
    read_until(params, tokens, tmp_path / "text")
    document = load_document(tmp_path / "text", CONFIG, params, 10)
    with pytest.raises(UserError, match=r"takes 112 tokens.*room for 68"):
        generate(CONFIG, params, [Request("0", (1,) * 100, NEW)], GREEDY, document=document)


def test_beyond_the_context(params, tokens):
    short = dataclasses.replace(CONFIG, max_position_embeddings=100)
    with pytest.raises(UserError, match="101 tokens do not fit the model's context of 1 to 100"):
        next(read_document(short, params, tokens[:101], "nowhere"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": "bfloat16"}, "in float32, not bfloat16"),
        ({"config": dataclasses.replace(CONFIG, rope_theta=1e4)}, "of another config"),
        ({"weights": 3}, "of other weights"),
    ],
)
def test_another_model(params, tokens, tmp_path, change, words):
    read_until(params, tokens, tmp_path / "text")
    config = change.get("config", CONFIG)
    other = jax.tree.map(lambda x: x.astype(change.get("dtype", x.dtype)), params)
    if "weights" in change:
        other["lm_head"] = other["lm_head"].at[change["weights"], 0].add(1e-3)
    with pytest.raises(UserError, match=words):
        load_document(tmp_path / "text", config, other, ASKED)


@pytest.mark.parametrize(
    "change, words",
    [({"tokens": 1}, "another text"), ({"kv": "int8"}, "into a float32 cache, not int8")],
)
def test_another_run_was_interrupted(params, tokens, tmp_path, change, words):
    read_until(params, tokens, tmp_path / "text", 300)
    kept = files(tmp_path)
    other = tokens[change.get("tokens", 0) :]
    with pytest.raises(UserError, match=words):
        read_until(params, other, tmp_path / "text", kv=change.get("kv"))
    assert files(tmp_path) == kept


def test_a_foreign_workspace(params, tokens, tmp_path):
    (tmp_path / "text.partial").mkdir()
    (tmp_path / "text.partial" / "mine").touch()
    with pytest.raises(UserError, match="left from an interrupted run"):
        read_until(params, tokens, tmp_path / "text")
    assert files(tmp_path) == ["text.partial/mine"]


@pytest.fixture(scope="module")
def pristine(params, tokens, tmp_path_factory):
    """A document that is not to be changed."""
    folder = tmp_path_factory.mktemp("pristine") / "text"
    read_until(params, tokens, folder)
    return folder


@pytest.fixture
def text(pristine, tmp_path):
    """One that may be changed."""
    return shutil.copytree(pristine, tmp_path / "text")


def refused(text, params, match="."):
    with pytest.raises(UserError, match=match) as caught:
        load_document(text, CONFIG, params, ASKED)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message


def test_a_damaged_array(text, params):
    (text / STATE / "layers.1.k" / "c" / "0" / "0" / "0" / "0").unlink()
    refused(text, params, "is damaged")


@pytest.mark.parametrize("part", ["", "c"])
def test_arrays_that_were_exchanged(text, params, part):
    """Every two arrays of one shape are exchanged, with their folders or their data alone."""
    arrays = [f"layers.{n}.{x}" for n in range(2) for x in "kv"]
    of_ring, of_full_cache = arrays[:2], arrays[2:]
    for names in (of_ring, of_full_cache):
        one, other = (text / STATE / name / part for name in names)
        exchange(one, other)
        refused(text, params, "another array's|is not the file that")
        exchange(one, other)
    assert load_document(text, CONFIG, params, ASKED).length == LENGTH


def test_blocks_that_were_exchanged(text, params):
    """Pages of the text in another order."""
    one, other = (text / STATE / "layers.1.v/c" / str(block) for block in (0, 1))
    exchange(one, other)
    refused(text, params, "layers.1.v.*another array's, or of another time")


@pytest.mark.parametrize("change", [{"length": LENGTH - 1}, {"format": 2}, {"text": ""}])
def test_altered_metadata(text, params, change):
    change_metadata(text, KEY, change)
    refused(text, params, f"{MARKER} is not the file that {MANIFEST} lists")
    with pytest.raises(UserError, match="is not the file"):
        document_length(text)


def test_a_newer_format(text, params):
    change_metadata(text, KEY, {"format": FORMAT + 1})
    refused(text, params, "update jaxmoe")


def test_an_older_document(text, params, tokens, plain, caplog):
    made_old(text, KEY)
    document = load_document(text, CONFIG, params, ASKED)
    assert abs(logits_after(params, document, tokens[LENGTH:]) - plain).max() < 1e-4
    assert [record.message.startswith(f"{text} has no {MANIFEST}") for record in caplog.records]


@pytest.mark.parametrize(
    "change",
    [
        {"length": LENGTH + PAGE},
        {"length": 10**12},
        {"length": 0},
        {"length": "700"},
        {"length": ...},
        {"kv": ...},
        {"kv": ["int8"]},
        {"kv": "int7"},
        {"kv": "int8"},
        {"page": 64},
        {"page": ...},
        {"config": []},
        {"format": "2"},
    ],
)
def test_metadata_that_make_no_sense(text, params, change):
    change_metadata(made_old(text, KEY), KEY, change)
    refused(text, params)


def test_a_description_that_does_not_fit(text, params):
    """More memory than there is."""
    made_old(text, KEY)
    change_description(text, "layers.1.k", lambda found: found["shape"].__setitem__(0, 10**12))
    refused(text, params, "layers.1.k with shape")


def test_a_note_that_was_altered(params, tokens, tmp_path):
    """What an interrupted run says that it saved is not believed."""
    read_until(params, tokens, tmp_path / "text", 300)
    note = tmp_path / "text.partial/progress.json"
    for content in (note.read_text().replace(": 384", ": 192"), "[]", '{"note": []}', "[" * 10**5):
        note.write_text(content)
        with pytest.raises(UserError, match="left from an interrupted run; delete"):
            read_until(params, tokens, tmp_path / "text")


def test_a_model_is_no_document(small):
    with pytest.raises(UserError, match="no checkpoint of this kind; make one with jaxmoe read"):
        load_document(small.checkpoint, small.config, small.params, 1)


def test_metadata(params, tokens, tmp_path):
    read_until(params, tokens, tmp_path / "text", kv="int8")
    marker = json.loads((tmp_path / "text" / MARKER).read_text())
    found = marker["custom_metadata"]["jaxmoe-document"]
    assert found["length"] == LENGTH
    assert found["kv"] == "int8"


def test_what_is_finished_is_not_read_again(params, tokens, tmp_path):
    """Another text is not written over it."""
    output = tmp_path / "saved"
    assert read_until(params, tokens, output)[-1] == LENGTH
    assert read_until(params, tokens, output) == [LENGTH]
    with pytest.raises(UserError, match="exists and is not empty"):
        read_until(params, tokens[1:], output)
