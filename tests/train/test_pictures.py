"""Training on pictures: batches, gradients through the tower, a frozen tower, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmoe.checkpoint import store
from jaxmoe.errors import UserError
from jaxmoe.hf_config import from_hf
from jaxmoe.images import ImageSettings, PictureReader
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.vision import tile_features
from jaxmoe.train.config import DataConfig, OptimizerConfig, TrainConfig
from jaxmoe.train.loss import picture_loss
from jaxmoe.train.optimizer import make_optimizer
from jaxmoe.train.partition import everything, join, split, text_only
from jaxmoe.train.pictures import pack, read_conversation
from jaxmoe.train.state import random_params, state_of
from jaxmoe.train.trainer import make_step, train
from tests import tiny, vision
from tests.conftest import one_device
from tests.small_tokenizers import CHAT, byte_tokenizer

NAMES = ["image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator"]
TOKENIZER = byte_tokenizer([*CHAT, *(f"<|{name}|>" for name in NAMES)])
TEXT = tiny.scout_like(
    num_hidden_layers=2,
    no_rope_layer_interval=2,  # one local layer, one global
    hidden_size=32,
    intermediate_size=32,
    num_local_experts=4,
    vocab_size=272,
    attention_chunk_size=64,
    bos_token_id=TOKENIZER.bos_id,
    eos_token_id=list(TOKENIZER.stop_ids),
    pad_token_id=0,
)
MODEL = {
    "model_type": "llama4",
    "text_config": TEXT,
    "vision_config": vision.VISION | {"num_hidden_layers": 2, "num_attention_heads": 4},
    "image_token_index": TOKENIZER.special("<|patch|>"),
}
CONFIG = from_hf(MODEL, "test")
READER = PictureReader(ImageSettings.of(CONFIG.vision))
ANSWER = "abcab"


def talk(seed, rows=1, columns=1):
    """A conversation about a picture of so many tiles."""
    rng = np.random.default_rng(seed)
    shape = rows * vision.SIDE, columns * vision.SIDE, 3
    picture = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "So?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "no\n"},
    ]
    return read_conversation(messages, TOKENIZER, READER)


@functools.cache
def batch():
    return alone_in_batch(*talks())


@functools.cache
def talks():
    return talk(0), talk(1, 1, 2), talk(2), talk(3, 2, 1)


def params_of(mesh):
    with jax.set_mesh(mesh):
        return random_params(CONFIG, mesh, seed=0)


def alone_in_batch(*talks):
    return pack(CONFIG, talks, rows=2, length=256, tiles=8)


@jax.jit
def loss_of(params, rows):
    """The cross entropy; all batches here have one shape, for which this is compiled once."""
    return picture_loss()(CONFIG, params, rows)[1]["loss"]


def test_what_the_assistant_says_is_learned():
    tokens, learned, pixels = talk(0, 1, 2)
    end = TOKENIZER.special("<|eot|>")
    said = [TOKENIZER.encode(answer) for answer in (ANSWER, "no\n")]
    assert tokens[learned].tolist() == [*said[0], end, *said[1], end]
    assert len(pixels) == 3 and (tokens == CONFIG.image_token_id).sum() == 3 * 9


def test_a_batch_holds_each_feature_once_and_in_order():
    tokens, segments, learned, pixels = batch()[:4]
    places = []
    for number, (own, said, tiles) in enumerate(talks(), 1):
        place = segments == number
        mine = tokens[place]
        is_feature = mine >= CONFIG.vocab_size
        places += mine[is_feature].tolist()
        np.testing.assert_array_equal(np.where(is_feature, CONFIG.image_token_id, mine), own)
        np.testing.assert_array_equal(learned[place], said)
        first = (mine[is_feature][0] - CONFIG.vocab_size) // 9
        np.testing.assert_array_equal(pixels[first : first + len(tiles)], tiles)
    assert places == list(range(CONFIG.vocab_size, CONFIG.vocab_size + 8 * 9))
    assert len(np.unique(segments[0])) > 2  # a row has several


def test_what_has_no_room_is_left_out_or_refused():
    two = [talk(0), talk(1, 2, 2)]
    assert pack(CONFIG, two, rows=2, length=256, tiles=5).segment_ids.max() == 1
    assert pack(CONFIG, two, rows=1, length=120, tiles=8).segment_ids.max() == 1
    with pytest.raises(UserError, match=r"has \d+ tokens and 1 tiles, .* room for 20 and 8"):
        pack(CONFIG, two, rows=1, length=20, tiles=8)


def test_packed_rows_are_as_each_alone():
    params = params_of(one_device())
    alone = [float(loss_of(params, alone_in_batch(x))) for x in talks()]
    mean = np.mean(alone)  # each has as many targets
    assert np.ptp(alone) > 1e-3
    np.testing.assert_allclose(loss_of(params, batch()), mean, rtol=1e-5)


def test_only_what_is_learned_counts():
    params, rows = params_of(one_device()), batch()
    of_one = rows._replace(learned=rows.learned & (rows.segment_ids == 1))
    alone = loss_of(params, alone_in_batch(talks()[0]))
    np.testing.assert_allclose(loss_of(params, of_one), alone, rtol=1e-5)
    everything = rows._replace(learned=np.ones_like(rows.learned))  # but features are no targets
    text = rows._replace(learned=rows.tokens < CONFIG.vocab_size)
    np.testing.assert_array_equal(loss_of(params, everything), loss_of(params, text))
    assert abs(loss_of(params, text) - loss_of(params, rows)) > 1e-3


STEP = 0.01  # so small that curvature is, and so large that rounding is
LEAVES = [
    "vision.class_embedding",
    "vision.position_embedding",
    "vision.patch_embedding",
    "vision.layers.0.attention.q.weight",
    "vision.layers.1.feed_forward.up.bias",
    "vision.norm_after.weight",
    "vision.adapter.up",
    "vision.projector",
    "layers.0.attention.k",
]


@pytest.mark.slow
def test_gradients_through_the_tower_are_finite_differences():
    """With all experts for every token: where the best one changes, there is no gradient."""
    params, rows = params_of(one_device()), batch()
    config = dataclasses.replace(CONFIG, num_experts_per_tok=CONFIG.num_local_experts)
    run = jax.jit(lambda params: picture_loss(0.01)(config, params, rows)[0])
    again = jax.jit(jax.grad(lambda params: picture_loss(0.01, True)(config, params, rows)[0]))
    gradient, rematerialized = jax.jit(jax.grad(run))(params), again(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), gradient, rematerialized)
    rng = np.random.default_rng(0)
    for name in LEAVES:
        (g,) = jax.tree.leaves(split(gradient, name.__eq__)[0])
        drawn = rng.normal(size=g.shape)
        direction = drawn / np.linalg.norm(drawn) + g / jnp.linalg.norm(g)
        trained, others = split(params, name.__eq__)
        (w,) = jax.tree.leaves(trained)
        direction *= STEP * max(jnp.linalg.norm(w), 1) / jnp.linalg.norm(direction)
        up, down = (
            float(run(join(jax.tree.map(lambda x, d=d: x + d, trained), others)))
            for d in (direction, -direction)
        )
        slope = jnp.vdot(g, direction)
        assert slope > 1e-4, name
        np.testing.assert_allclose((up - down) / 2, slope, rtol=0.02, err_msg=name)


def first_losses(mesh, trainable=everything, steps=3):
    config = run_config("unused")
    optimizer = make_optimizer(config.optimizer, config.steps)
    with jax.set_mesh(mesh):
        trained, frozen = split(random_params(CONFIG, mesh, config.seed), trainable)
        state = state_of(trained, optimizer, mesh)
        step = make_step(config, CONFIG, optimizer, picture_loss(config.router_loss))
        results = []
        for _ in range(steps):
            state, outcome = step(frozen, state, batch())
            results.append([float(outcome.metrics["loss"]), float(outcome.norm)])
    return np.array(results), state


def run_config(output, **changes):
    config = TrainConfig(
        model=MODEL,
        data=None,
        optimizer=OptimizerConfig(peak_lr=0.01, warmup_steps=2),
        output=str(output),
        steps=3,
        log_every=1,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def alone():
    return first_losses(one_device())[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["sequence=2,tensor=4", "data=2,fsdp=2,expert=2"])
def test_training_is_the_same_on_any_mesh(alone, mesh):
    spread, state = first_losses(MeshConfig.parse(mesh).make())
    np.testing.assert_allclose(spread, alone, rtol=1e-4)
    assert alone[-1, 0] < alone[0, 0]
    query = state.params["vision"]["layers"][0]["attention"]["q"]["weight"]
    assert query.sharding.shard_shape(query.shape)[0] * (1 + ("fsdp" in mesh)) == len(query)


def test_tiles_are_spread_over_the_devices():
    mesh = MeshConfig.parse("data=2,expert=2,sequence=2").make()
    params = params_of(mesh)
    with jax.set_mesh(mesh):
        features = jax.jit(tile_features, static_argnums=0)(
            CONFIG, params["vision"], batch().pixels
        )
    assert features.sharding.shard_shape(features.shape)[0] == 1


@pytest.mark.slow
def test_a_frozen_tower_stays_and_costs_no_backward_pass(tmp_path):
    mesh, config = one_device(), run_config(tmp_path / "run")
    with jax.set_mesh(mesh):
        init = random_params(CONFIG, mesh, seed=1)
        records = list(
            train(
                config,
                mesh,
                loss=picture_loss(),
                batches=lambda step: batch(),
                init=init,
                trainable=text_only,
            )
        )
    assert records[-1]["loss"] < records[0]["loss"]
    trained = store.load(tmp_path / "run" / "checkpoint", mesh)[1]
    jax.tree.map(np.testing.assert_array_equal, trained["vision"], init["vision"])
    assert (trained["layers"][0]["attention"]["q"] != init["layers"][0]["attention"]["q"]).any()
    _, state = first_losses(mesh, text_only, steps=0)
    whole = first_losses(mesh, steps=0)[1]
    numbers = sum(x.size for x in jax.tree.leaves(init["vision"]))
    sizes = [sum(x.size for x in jax.tree.leaves(s.optimizer)) for s in (whole, state)]
    assert sizes[0] - sizes[1] == 2 * numbers
    assert flops(everything) - flops(text_only) > 1.5 * tower_flops()  # pixels need no gradient


def flops(trainable):
    mesh, config = one_device(), run_config("unused")
    optimizer = make_optimizer(config.optimizer, config.steps)
    with jax.set_mesh(mesh):
        trained, frozen = split(random_params(CONFIG, mesh, 0), trainable)
        state = state_of(trained, optimizer, mesh)
        step = make_step(config, CONFIG, optimizer, picture_loss())
        return step.lower(frozen, state, batch()).cost_analysis()["flops"]


def tower_flops():
    params = params_of(one_device())["vision"]
    run = jax.jit(tile_features, static_argnums=0)
    return run.lower(CONFIG, params, batch().pixels).cost_analysis()["flops"]


def test_training_on_text_leaves_the_tower_as_it_is(tmp_path):
    np.save(tmp_path / "tokens.npy", np.tile([TOKENIZER.bos_id, *range(5, 21)], 100))
    data = DataConfig(tokens=str(tmp_path / "tokens.npy"), length=32, batch_size=4)
    mesh, config = one_device(), run_config(tmp_path / "run", data=data, steps=2)
    with jax.set_mesh(mesh):
        init = random_params(CONFIG, mesh, seed=1)
        list(train(config, mesh, init=init))
    config, trained = store.load(tmp_path / "run" / "checkpoint", mesh)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, trained["vision"], init["vision"])
    assert (trained["embed"] != init["embed"]).any()
