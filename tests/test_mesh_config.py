"""MeshConfig: what a mesh may be written as, and what is refused."""

import jax
import pytest

from jaxmoe.errors import UserError
from jaxmoe.mesh import AXES, MeshConfig


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("expert=4,sequence=2", {"expert": 4, "sequence": 2}),
        (" tensor = 2 , data = 4 ", {"tensor": 2, "data": 4}),
        ("fsdp=8,", {"fsdp": 8}),
        ("data=-1", {"data": -1}),
        ("data=1", {}),
    ],
)
def test_parse(text, sizes):
    assert MeshConfig.parse(text) == MeshConfig(**sizes)


@pytest.mark.parametrize("name", ["mesh.yaml", "mesh.yml"])
@pytest.mark.parametrize("text", ["expert: 4\nsequence: -1\n", "mesh: {expert: 4, sequence: -1}\n"])
def test_parse_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert MeshConfig.parse(str(tmp_path / name)) == MeshConfig(expert=4, sequence=-1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experts=4", ["'experts'", *AXES]),
        ("expert=four", ["expert", "'four'", "no number"]),
        ("expert", ["expert", "no number"]),
        ("expert=", ["expert", "no number"]),
        ("expert=2.5", ["expert", "'2.5'", "no number"]),
        ("expert=0", ["expert", "0", "1 or more"]),
        ("expert=-2", ["expert", "-2", "1 or more"]),
        ("\0.yaml", ["cannot be read"]),
    ],
)
def test_bad_text_is_refused(text, words):
    with pytest.raises(UserError) as caught:
        MeshConfig.parse(text)
    assert all(word in str(caught.value) for word in (repr(text), *words))


@pytest.mark.parametrize(
    "text",
    [
        *(None, "expert: [", "- expert\n- data", "4", "expert: many", "x: 1"),
        *('"a\\nb": 1', "expert: " + "9" * 5000, "expert: " + "[" * 5000, "expert: .nan"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text):
    path = tmp_path / "mesh.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        MeshConfig.parse(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_no_file_has():
    with pytest.raises(UserError, match=r"'mesh\\x00\.yaml' cannot be read"):
        MeshConfig.parse("mesh\0.yaml")


@pytest.mark.parametrize(
    ("text", "devices", "sizes"),
    [
        ("data=-1", 8, {"data": 8}),
        ("data=-1", 1, {}),
        ("expert=4,sequence=-1", 8, {"expert": 4, "sequence": 2}),
        ("expert=8,tensor=-1", 8, {"expert": 8}),
        ("fsdp=2,tensor=4", 8, {"fsdp": 2, "tensor": 4}),
    ],
)
def test_resolve(text, devices, sizes):
    assert MeshConfig.parse(text).resolve(devices) == MeshConfig(**sizes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expert=4", ["expert=4", "8 device", "multiply to 4"]),
        ("expert=16", ["expert=16", "8 device", "multiply to 16"]),
        ("expert=3,data=-1", ["expert=3", "8 device"]),
        ("expert=16,data=-1", ["expert=16", "8 device"]),
        ("expert=-1,data=-1", ["expert=-1", "data=-1", "only one"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(text, words):
    with pytest.raises(UserError) as caught:
        MeshConfig.parse(text).resolve(8)
    assert all(word in str(caught.value) for word in words)


def test_text_and_back():
    for text in ("expert=4,sequence=2", "data=-1,tensor=2"):
        assert str(MeshConfig.parse(text)) == text
    assert MeshConfig.parse(str(MeshConfig())) == MeshConfig()


def test_make():
    mesh = MeshConfig.parse("tensor=2,data=-1").make()
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 2}
    assert set(mesh.devices.flat) == set(jax.devices())
