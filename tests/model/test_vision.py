"""Images equal to transformers: the golden files of multimodal models, by every path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert.conversion import convert
from jaxmoe.eval.logits import token_logits
from jaxmoe.generation.engine import Engine, Request, generate
from jaxmoe.generation.features import FeatureTable
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.vision import tile_features
from tests import tiny, vision
from tests.conftest import one_device
from tests.images.drawn import drawn
from tests.tiers import slow_after_first

TOLERANCE = 1e-4
LIKE = ["scout", "maverick"]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    @functools.cache
    def made(like):
        golden = vision.read_golden(f"vision/{like}")
        folder = tmp_path_factory.mktemp(like)
        tiny.write_checkpoint(folder / "hf", golden.config, golden.tensors())
        convert(folder / "hf", folder / "orbax")
        return golden, folder / "orbax"

    return made


def loaded(checkpoints, like, mesh=None):
    golden, folder = checkpoints(like)
    mesh = one_device() if mesh is None else MeshConfig.parse(mesh).make()
    return golden, mesh, *store.load(folder, mesh)


def prompts_of(golden):
    """By name the tokens and the pictures of each prompt."""
    found = golden.prompts()
    return {name: (tokens, list(map(drawn, images))) for name, (tokens, images) in found.items()}


def assert_kept(golden, name, logits):
    expected = golden.logits[list(vision.PROMPTS).index(name)]
    assert abs(logits[-len(expected) :] - expected).max() < TOLERANCE


@pytest.mark.parametrize("like", LIKE)
def test_features_of_tiles(checkpoints, like):
    golden, _, config, params = loaded(checkpoints, like)
    features = tile_features(config, params["vision"], jnp.asarray(vision.tiles(vision.TWO)))
    assert abs(features - golden.features).max() < 1e-5


def test_pixels_may_be_floats(checkpoints):
    golden, _, config, params = loaded(checkpoints, "scout")
    pixels = jnp.asarray(vision.tiles(vision.TWO), jnp.float32) / 127.5 - 1
    features = tile_features(config, params["vision"], pixels)
    assert abs(features - golden.features).max() < 1e-5


@pytest.mark.parametrize("name", vision.PROMPTS)
@pytest.mark.parametrize("like", LIKE)
def test_full_forward(checkpoints, like, name):
    golden, mesh, config, params = loaded(checkpoints, like)
    tokens, pictures = prompts_of(golden)[name]
    with jax.set_mesh(mesh):
        logits = token_logits(config, params, np.array([tokens]), pictures=[pictures])
    assert_kept(golden, name, logits[0])


@pytest.mark.parametrize("name", ["two by two", "images in several turns"])
def test_chunks_that_cut_images_and_decode(checkpoints, name):
    golden, mesh, config, params = loaded(checkpoints, "scout")
    tokens, pictures = prompts_of(golden)[name]
    options = {"prefill_chunk": 7, "decode_from": len(tokens) - 12, "pictures": [pictures]}
    with jax.set_mesh(mesh):
        logits = token_logits(config, params, np.array([tokens]), **options)
    assert_kept(golden, name, logits[0])


def test_rows_padded_on_the_left_and_packed(checkpoints):
    golden, mesh, config, params = loaded(checkpoints, "scout")
    prompts = prompts_of(golden)
    names = ["one tile", "two by two", "several images"]
    packed = [prompts[name] for name in names]
    row = np.concatenate([tokens for tokens, _ in packed])
    segments = np.concatenate([np.full(len(x), i + 1) for i, (x, _) in enumerate(packed)])
    tokens, segment_ids = np.zeros((2, 2, len(row) + 5), np.int32)
    tokens[0, 5:], segment_ids[0, 5:] = row, segments
    last, pictures = prompts["images in several turns"]
    tokens[1, -len(last) :], segment_ids[1, -len(last) :] = last, 1
    pictures = [[x for _, pictures in packed for x in pictures], pictures]
    with jax.set_mesh(mesh):
        logits = token_logits(config, params, tokens, segment_ids, pictures=pictures)
    for i, name in enumerate(names):
        assert_kept(golden, name, logits[0, 5:][segments == i + 1])
    assert_kept(golden, "images in several turns", logits[1])


def requests_of(golden, names=tuple(vision.PROMPTS)):
    new = golden.greedy.shape[1]
    return [
        Request(name, tuple(tokens), new, pictures=tuple(pictures))
        for name, (tokens, pictures) in prompts_of(golden).items()
        if name in names
    ]


def written_by(stream):
    written = {}
    for token in stream:
        written.setdefault(token.request.id, []).append(token.token)
    return written


def assert_greedy(golden, written):
    expected = dict(zip(vision.PROMPTS, golden.greedy.tolist(), strict=True))
    assert written == {name: expected[name] for name in written}


MESHES = [
    None,
    "expert=4,sequence=2",
    "data=2,fsdp=2,tensor=2",
]


@pytest.mark.parametrize("mesh", slow_after_first(MESHES))
def test_engine_beside_text(checkpoints, mesh):
    golden, mesh, config, params = loaded(checkpoints, "scout", mesh)
    with jax.set_mesh(mesh):
        stream = generate(
            config, params, requests_of(golden), GREEDY, rows=4, step_tokens=24, stop_ids=()
        )
        written = written_by(stream)
    assert len(written) == len(vision.PROMPTS)
    assert_greedy(golden, written)


def test_a_small_table_gives_the_same_answers(checkpoints):
    golden, mesh, config, params = loaded(checkpoints, "scout")
    with jax.set_mesh(mesh):
        table = FeatureTable(config, params, tiles=3)
        requests = requests_of(golden)
        options = {"rows": 4, "step_tokens": 24, "stop_ids": (), "features": table}
        assert_greedy(golden, written_by(generate(config, params, requests, GREEDY, **options)))


def test_an_image_is_computed_once(checkpoints):
    golden, mesh, config, params = loaded(checkpoints, "scout")
    requests = requests_of(golden, ("one tile", "several images", "images in several turns"))
    with jax.set_mesh(mesh):
        table = FeatureTable(config, params)
        options = {"rows": 4, "stop_ids": (), "features": table}
        for _ in range(2):  # the second call finds all of them
            assert_greedy(golden, written_by(generate(config, params, requests, GREEDY, **options)))
    different = {image for request in requests for image in images_of(request)}
    assert table.computed == sum(map(vision.num_tiles, different))


def images_of(request):
    return [picture.image for picture in request.pictures]


def test_prompts_with_the_same_image_share_a_prefix_and_others_do_not(checkpoints):
    golden, mesh, config, params = loaded(checkpoints, "scout")
    image, other = vision.Image(3, 3, 8), vision.Image(3, 3, 9)
    each = vision.tokens_per_tile(golden.config["vision_config"])

    def request(id_, image, seed):
        tokens, images = vision.prompt([4, image, 6], 5, each)
        tokens[-3:] = [seed, seed + 1, seed + 2]
        return Request(id_, tuple(tokens), 4, pictures=tuple(map(drawn, images)))

    requests = [request("a", image, 1), request("b", image, 11), request("c", other, 1)]
    with jax.set_mesh(mesh):
        alone = {}
        for one in requests:
            alone |= written_by(generate(config, params, [one], GREEDY, stop_ids=()))
        own = [dataclasses.replace(x, sampling=GREEDY) for x in requests]
        engine = Engine(config, params, own, rows=4, stop_ids=(), drafts=0)
        assert written_by(engine.run()) == alone
    shared = len(requests[0].tokens) - 3
    assert engine.tokens < sum(len(x.tokens) + 3 for x in requests) - shared + 10


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["int8", "int4", "fp8"])
def test_quantized_caches(checkpoints, kv):
    golden, mesh, config, params = loaded(checkpoints, "scout")
    tokens, pictures = prompts_of(golden)["two by two"]
    options = {"prefill_chunk": 16, "kv": kv}
    plain = np.where(np.array(tokens) == vision.PATCH, 1, tokens)
    with jax.set_mesh(mesh):
        logits = token_logits(config, params, np.array([tokens]), pictures=[pictures], **options)
        text = token_logits(config, params, np.array([plain]), prefill_chunk=16)
        text_kv = token_logits(config, params, np.array([plain]), **options)
    expected = golden.logits[list(vision.PROMPTS).index("two by two")]
    error = abs(logits[0][-len(expected) :] - expected).max()
    assert error < 2 * abs(text_kv - text).max() + TOLERANCE  # as text is rounded
