"""Loading gives the source's numbers on any mesh and in any dtype, and refuses damage."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.mapping import tensors
from jaxmoe.checkpoint.zarr import arrays
from jaxmoe.errors import UserError
from jaxmoe.hf_config import read_config
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import abstract_params
from tests import tiny
from tests.checkpoint.damage import change_metadata, made_old

CONFIG = tiny.maverick_like(num_hidden_layers=4)
MESHES = [
    "data=1",
    "data=8",
    "fsdp=8",
    "expert=8",
    "sequence=8",
    "tensor=4",
    "expert=2,fsdp=2,tensor=2",
]


@pytest.fixture(scope="module")
def weights():
    return tiny.random_tensors(CONFIG, seed=2, dtype=ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, weights):
    """A checkpoint with several blocks and chunks per array, which tests must not change."""
    folder = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_BYTES", 20000)
        patch.setattr(arrays, "CHUNK_BYTES", 4000)
        convert(tiny.write_checkpoint(folder / "hf", CONFIG, weights, 2), folder / "orbax")
    return folder / "orbax"


@pytest.fixture
def damaged(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "orbax")


def mesh(spec="data=1"):
    count = np.prod([int(part.partition("=")[2]) for part in spec.split(",")])
    return MeshConfig.parse(spec).make(jax.devices()[:count])


def expected(weights):
    """The parameters, made by hand from the orientation of each tensor."""

    def linear(name):
        return weights[f"{name}.weight"].T

    def swiglu(prefix):
        return {part: linear(f"{prefix}.{part}_proj") for part in ("gate", "up", "down")}

    def layer(n):
        prefix = f"model.layers.{n}"
        attention = f"{prefix}.self_attn"
        ffn = f"{prefix}.feed_forward"
        if n % 2 == 0:
            feed_forward = swiglu(ffn)
        else:
            gate_up = weights[f"{ffn}.experts.gate_up_proj"]
            feed_forward = {
                "router": linear(f"{ffn}.router"),
                "shared": swiglu(f"{ffn}.shared_expert"),
                "experts": {
                    "gate": gate_up[..., :64],
                    "up": gate_up[..., 64:],
                    "down": weights[f"{ffn}.experts.down_proj"],
                },
            }
        return {
            "attention_norm": weights[f"{prefix}.input_layernorm.weight"],
            "attention": {
                "q": linear(f"{attention}.q_proj").reshape(64, 8, 16),
                "k": linear(f"{attention}.k_proj").reshape(64, 4, 16),
                "v": linear(f"{attention}.v_proj").reshape(64, 4, 16),
                "o": linear(f"{attention}.o_proj").reshape(8, 16, 64),
            },
            "feed_forward_norm": weights[f"{prefix}.post_attention_layernorm.weight"],
            "feed_forward": feed_forward,
        }

    return {
        "embed": weights["model.embed_tokens.weight"],
        "layers": [layer(n) for n in range(4)],
        "norm": weights["model.norm.weight"],
        "lm_head": linear("lm_head"),
    }


def assert_equal_trees(got, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, wanted
    )


@pytest.mark.parametrize("spec", MESHES)
def test_load_gives_the_source_on_any_mesh(pristine, weights, spec):
    config, params = store.load(pristine, mesh(spec))
    assert config == read_config(pristine.parent / "hf")
    assert_equal_trees(params, expected(weights))
    abstract = abstract_params(config, mesh(spec))
    jax.tree.map(lambda a, b: _assert_same(a.sharding, b.sharding), params, abstract)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def _assert_same(a, b):
    assert a == b


def test_load_casts_up(pristine, weights):
    _, params = store.load(pristine, mesh("tensor=2"), dtype="float32")
    wanted = jax.tree.map(lambda leaf: leaf.astype(np.float32), expected(weights))
    assert_equal_trees(params, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_load_casts_down_to_the_nearest(tmp_path):
    full = tiny.random_tensors(CONFIG, seed=3)
    convert(tiny.write_checkpoint(tmp_path / "hf", CONFIG, full), tmp_path / "orbax")
    _, params = store.load(tmp_path / "orbax", mesh(), dtype=jnp.bfloat16)
    assert_equal_trees(
        params, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), expected(full))
    )


def test_load_keeps_the_dtype_of_each_array(tmp_path, weights):
    mixed = weights | {"model.norm.weight": weights["model.norm.weight"].astype(np.float32)}
    convert(tiny.write_checkpoint(tmp_path / "hf", CONFIG, mixed), tmp_path / "orbax")
    _, params = store.load(tmp_path / "orbax", mesh())
    assert params["norm"].dtype == jnp.float32
    assert params["embed"].dtype == jnp.bfloat16


def test_load_reports_every_byte(pristine, weights):
    seen = []
    store.load(pristine, mesh(), dtype="float32", progress=lambda *step: seen.append(step))
    assert seen[-1] == (sum(t.nbytes for t in weights.values()),) * 2
    assert seen == sorted(seen) and len(seen) > 20


def test_mesh_that_does_not_divide(pristine):
    with pytest.raises(UserError, match="does not divide"):
        store.load(pristine, mesh("tensor=8"))  # four key/value heads


def test_orbax_alone_reads_it(pristine, weights):
    assert_equal_trees(ocp.load(str(pristine)), expected(weights))


def test_metadata_names_the_sources(pristine):
    metadata = ocp.metadata(str(pristine)).custom_metadata["jaxmoe"]["conversion"]
    files = sorted((pristine.parent / "hf").glob("*.safetensors"))
    assert [file["name"] for file in metadata["sources"]] == [file.name for file in files]
    assert [file["bytes"] for file in metadata["sources"]] == [f.stat().st_size for f in files]
    digests = {key for file in metadata["sources"] for key in file if key.endswith("sha256")}
    assert digests == {"header_sha256", "sample_sha256"}


@pytest.mark.parametrize("spec", ["data=1", "expert=2,fsdp=2,tensor=2"])
def test_saved_parameters_are_loaded(pristine, tmp_path, spec):
    config, params = store.load(pristine, mesh(spec))
    store.save(tmp_path / "saved", config, params)
    again, loaded = store.load(tmp_path / "saved", mesh("tensor=2"))
    assert again == config
    assert_equal_trees(loaded, params)
    with pytest.raises(UserError, match="exists and is not empty"):
        store.save(tmp_path / "saved", config, params)


def test_answers_end_where_the_generation_config_says(damaged):
    (damaged / "generation_config.json").write_text('{"eos_token_id": [7]}')
    for config in (store.load(damaged, mesh())[0], store.read_config(damaged)):
        assert config.eos_token_ids == (*CONFIG["eos_token_id"], 7)


def refused(path, *parts):
    with pytest.raises(UserError) as caught:
        store.load(path, mesh())
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message and message.endswith(".")


def blocks(folder, name):
    return sorted(path for path in (folder / "state" / name / "c").rglob("*") if path.is_file())


def test_flipped_byte_in_the_data(damaged):
    block = blocks(damaged, "layers.1.feed_forward.experts.up")[1]
    data = bytearray(block.read_bytes())
    data[100] ^= 1
    block.write_bytes(data)
    refused(damaged, damaged)


@pytest.mark.parametrize("keep", [0, 10])
def test_truncated_block(damaged, keep):
    block = blocks(damaged, "lm_head")[0]
    block.write_bytes(block.read_bytes()[:keep])
    refused(damaged, damaged)


def test_missing_block_is_not_read_as_zeros(damaged):
    blocks(damaged, "embed")[0].unlink()
    refused(damaged, damaged)


def test_missing_array(damaged):
    shutil.rmtree(damaged / "state" / "layers.2.attention.q")
    refused(damaged, damaged)


def test_config_that_contradicts_the_arrays(damaged):
    """In a checkpoint without a manifest, as older versions made it."""
    made_old(damaged, store.KEY)
    config = store.read_checkpoint(damaged).finished.metadata["config"]
    change_metadata(damaged, store.KEY, {"config": config | {"intermediate_size": 32}})
    refused(damaged, damaged, "layers.1.feed_forward.experts.down", "[8, 64, 64]", "[8, 32, 64]")


def test_config_with_more_layers_than_the_arrays(damaged):
    made_old(damaged, store.KEY)
    config = store.read_checkpoint(damaged).finished.metadata["config"]
    more = {
        "num_hidden_layers": 5,
        "no_rope_layers": [*config["no_rope_layers"], 1],
        "layer_types": [*config["layer_types"], "chunked_attention"],
    }
    change_metadata(damaged, store.KEY, {"config": config | more})
    refused(damaged, damaged, "layers.4.")


def test_orbax_checkpoint_of_something_else(tmp_path):
    ocp.save(str(tmp_path / "other"), {"a": np.zeros(3)})
    refused(tmp_path / "other", tmp_path / "other", "jaxmoe convert")


@pytest.mark.parametrize("kind", ["absent", "empty", "hf"])
def test_folders_that_are_no_checkpoint(tmp_path, pristine, kind):
    folder = pristine.parent / "hf" if kind == "hf" else tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    refused(folder, folder, "jaxmoe convert")
