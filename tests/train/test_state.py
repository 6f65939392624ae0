"""Saved states, and checkpoints, on disks that fail."""

import contextlib
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.zarr.writer import save_tree
from jaxmoe.errors import UserError
from jaxmoe.train.state import SavedStates, TrainState


def make_state(step):
    return TrainState({"w": jnp.full((1000,), step / 2)}, (), *map(jnp.int32, (step, 0, 0)))


@contextlib.contextmanager
def small_files(nbytes):
    """Every file ends after so many bytes, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_newest_state_is_kept(tmp_path):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0))
    with SavedStates.open(tmp_path / "states") as states:
        assert states.newest(abstract) is None
        for step in (2, 4, 4):
            states.save(make_state(step))
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["4"]
    with SavedStates.open(tmp_path / "states") as states:
        jax.tree.map(np.testing.assert_array_equal, states.newest(abstract), make_state(4))


def test_a_disk_that_fails_is_one_sentence_and_keeps_the_state_before(tmp_path, capfd):
    with SavedStates.open(tmp_path / "states") as states:
        states.save(make_state(2))
    with pytest.raises(UserError, match=r"states cannot be written: File too large\.$"):
        with SavedStates.open(tmp_path / "states") as states, small_files(100):
            states.save(make_state(4))
    assert capfd.readouterr().err == ""
    with SavedStates.open(tmp_path / "states") as states:
        assert int(states.newest(make_state(0)).step) == 2


def test_a_checkpoint_on_a_disk_that_fails_is_one_sentence(tmp_path, capfd):
    with small_files(100), pytest.raises(UserError, match=r"result cannot be written: File too la"):
        save_tree(tmp_path / "result", {"w": jnp.arange(1000)}, "key", {})
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"states cannot be written: Not a directory"):
        with SavedStates.open(tmp_path / "file" / "states"):
            pass


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_damaged_state_is_one_sentence(tmp_path, name):
    with SavedStates.open(tmp_path / "states") as states:
        states.save(make_state(2))
    (path,) = (tmp_path / "states" / "2" / "state").glob(name)
    path.write_bytes(b"")
    with SavedStates.open(tmp_path / "states") as states:
        with pytest.raises(UserError, match=r"states is damaged: .*; delete it to begin anew"):
            states.newest(make_state(0))
