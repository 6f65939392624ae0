"""Meta's .pth files are read without torch and without running their code."""

import os
import pickle
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint.formats.pth import PthFolder
from jaxmoe.errors import UserError
from tests import pth_files
from tests.pth_files import EXTRA_STATE, Parameter, View, plain, save_pth

W = np.arange(24, dtype=np.float32).reshape(4, 6)
WQKV = "layers.3.attention.wqkv.weight"
FILE = "consolidated.00.pth"


def save(folder, **tensors):
    return save_pth(folder / FILE, tensors)


def save_ranks(folder, *names):
    for n, name in enumerate(names):
        save_pth(folder / name, {"w": W + n})


def save_tensor(folder, key="0", offset=0, shape=(4, 6), strides=(6, 1), data=bytes(96), **how):
    """Saves a file with one tensor, `w`, described by the arguments."""
    code = pth_files.tensor("float32", key, 24, offset, shape, strides)
    records = {"data/0": data}
    return pth_files.save_records(folder / FILE, pth_files.as_pickle({"w": code}), records, **how)


def save_pickle(folder, data_pkl):
    return pth_files.save_records(folder / FILE, data_pkl, {})


def refused(folder, *parts):
    with pytest.raises(UserError) as caught:
        PthFolder(folder)
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message
    assert "\n" not in message and message.endswith((".", "?"))
    return message


def test_ranks(tmp_path):
    save_ranks(tmp_path, "consolidated.00.pth", "consolidated.01.pth")
    (tmp_path / "consolidated.old.pth").write_text("not one of them")
    folder = PthFolder(tmp_path)
    assert folder.ranks == 2
    assert folder.tensors.keys() == {"0:w", "1:w"}
    for n in range(2):
        np.testing.assert_array_equal(folder.read(f"{n}:w", 0, 24), (W + n).reshape(-1))
    assert [record["name"] for record in folder.files] == [FILE, "consolidated.01.pth"]
    assert folder.files[0]["bytes"] == (tmp_path / FILE).stat().st_size


def test_files_of_two_ranks_that_are_exchanged(tmp_path):
    """Only the name that torch writes into a file shows it, since each file is whole."""
    save_ranks(tmp_path, "consolidated.00.pth", "consolidated.01.pth")
    (tmp_path / FILE).rename(tmp_path / "x")
    (tmp_path / "consolidated.01.pth").rename(tmp_path / FILE)
    (tmp_path / "x").rename(tmp_path / "consolidated.01.pth")
    refused(tmp_path, tmp_path / FILE, "was written under the name consolidated.01.pth")


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "int32", "int64"]
)
def test_dtypes(tmp_path, dtype):
    tensor = W.astype(np.dtype(dtype))
    save(tmp_path, a=tensor, b=Parameter(tensor + tensor))
    folder = PthFolder(tmp_path)
    assert folder.tensors["0:a"].shape == (4, 6)
    assert folder.tensors["0:a"].nbytes == tensor.nbytes
    assert folder.dtype("0:a") == tensor.dtype
    for name, stored in (("0:a", tensor), ("0:b", tensor + tensor)):
        read = folder.read(name, 7, 11)
        assert read.dtype == tensor.dtype
        assert read.tobytes() == stored.reshape(-1)[7:18].tobytes()


def test_other_dtypes_are_refused_by_name(tmp_path):
    save(tmp_path, **{WQKV: W.astype(np.float64)})
    folder = PthFolder(tmp_path)
    with pytest.raises(UserError, match=rf"{FILE} holds 0:{WQKV} as F64"):
        folder.read(f"0:{WQKV}", 0, 1)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_tensors_that_share_a_storage(tmp_path, dtype):
    base = W.astype(np.dtype(dtype))
    save(tmp_path, whole=base, again=base, rows=View(base, 6, (2, 6), (6, 1)))
    folder = PthFolder(tmp_path)
    assert folder.tensors["0:whole"] == folder.tensors["0:again"]
    assert folder.tensors["0:rows"].start == folder.tensors["0:whole"].start + 6 * base.itemsize
    assert folder.read("0:rows", 0, 12).tobytes() == base[1:3].tobytes()
    assert folder.read("0:rows", 5, 3).tobytes() == base.reshape(-1)[11:14].tobytes()


@pytest.mark.parametrize(
    ("shape", "strides"), [((), ()), ((0, 3), (1, 7)), ((1, 6), (99, 1)), ((6, 1), (1, 7))]
)
def test_strides_that_do_not_matter(tmp_path, shape, strides):
    save(tmp_path, w=View(W, 3, shape, strides))
    count = int(np.prod(shape))
    read = PthFolder(tmp_path).read("0:w", 0, count)
    np.testing.assert_array_equal(read, W.reshape(-1)[3 : 3 + count])


@pytest.mark.parametrize(
    ("shape", "strides"), [((6, 4), (1, 6)), ((4, 3), (6, 1)), ((4, 3), (6, 2)), ((2, 6), (0, 1))]
)
def test_elements_out_of_order(tmp_path, shape, strides):
    save(tmp_path, **{WQKV: View(W, 0, shape, strides)})
    refused(tmp_path, FILE, WQKV, strides, "contiguous")


def test_extra_state_is_left_out(tmp_path):
    """It may also be something else than a BytesIO, in other versions of Meta's libraries."""
    kinds = {
        "a._extra_state": pth_files.extra_state(),
        "b._extra_state": pth_files.extra_state(contents=""),
        "c._extra_state": plain(None),
        "d._extra_state": pth_files.tensor("float32", "none", 24, 0, (4, 6), (6, 1)),
        "w": pth_files.tensor("float32", "0", 24, 0, (4, 6), (6, 1)),
    }
    pickled = pth_files.as_pickle(kinds)
    pth_files.save_records(tmp_path / FILE, pickled, {"data/0": W.tobytes()})
    assert PthFolder(tmp_path).tensors.keys() == {"0:w"}
    save(tmp_path, w=W, e=EXTRA_STATE)
    assert PthFolder(tmp_path).tensors.keys() == {"0:w"}


def test_ordered_dict_with_attributes(tmp_path):
    """torch's state dicts have the attribute `_metadata`."""
    items = pickle.MARK + plain("w") + pth_files.tensor("float32", "0", 24, 0, (4, 6), (6, 1))
    state = pickle.EMPTY_DICT + pickle.MARK + plain("_metadata") + plain(1) + pickle.SETITEMS
    pickled = pth_files.hooks() + items + pickle.SETITEMS + state + pickle.BUILD + pickle.STOP
    pth_files.save_records(tmp_path / FILE, pickled, {"data/0": W.tobytes()})
    np.testing.assert_array_equal(PthFolder(tmp_path).read("0:w", 0, 24), W.reshape(-1))


def test_scales(tmp_path):
    save_ranks(tmp_path, "consolidated.00.pth", "consolidated.01.pth")
    scales = np.array([0.5, 2], np.float32)
    for rank in range(2):
        save_pth(tmp_path / f"fp8_scales_{rank}.pt", {"layers.1.w1": scales * (rank + 1)})
    folder = PthFolder(tmp_path)
    assert folder.tensors.keys() == {"0:w", "1:w", "0:layers.1.w1.scale", "1:layers.1.w1.scale"}
    assert folder.ranks == 2
    assert folder.read("1:layers.1.w1.scale", 0, 2).tolist() == [1, 4]
    assert [record["name"] for record in folder.files][2:] == ["fp8_scales_0.pt", "fp8_scales_1.pt"]


@pytest.mark.parametrize(
    ("present", "missing"), [((0,), 1), ((1,), 0), ((0, 1, 2), "consolidated.02.pth")]
)
def test_scales_of_some_ranks(tmp_path, present, missing):
    save_ranks(tmp_path, "consolidated.00.pth", "consolidated.01.pth")
    for rank in present:
        save_pth(tmp_path / f"fp8_scales_{rank}.pt", {"layers.1.w1": W})
    refused(tmp_path, tmp_path, f"fp8_scales_{missing}.pt" if missing in (0, 1) else missing)


def test_scale_called_like_a_weight(tmp_path):
    save(tmp_path, **{"w.scale": W})
    save_pth(tmp_path / "fp8_scales_0.pt", {"w": W})
    refused(tmp_path, FILE, "fp8_scales_0.pt", "0:w.scale")


def test_int4_weights_are_refused(tmp_path):
    """They are declared as float8 in the files of weights."""
    save(tmp_path, w=W.astype(jnp.float8_e4m3fn))
    save_pth(tmp_path / "int4_scales_0.pt", {"w": W})
    refused(tmp_path, "int4_scales_0.pt", "bfloat16")


def test_digest_follows_names_shapes_and_places(tmp_path):
    def digest(**tensors):
        save(tmp_path, **tensors)
        return PthFolder(tmp_path).files[0]["header_sha256"]

    first = digest(a=W, b=W + 1)
    assert digest(a=W, b=W + 1) == first
    others = [
        digest(a=W, c=W + 1),
        digest(a=W.reshape(6, 4), b=W + 1),
        digest(b=W + 1, a=W),
        digest(a=W, b=View(W, 0, (4, 6), (6, 1))),
    ]
    assert len({first, *others}) == 5
    digests = set()
    for size in (96, 97):  # the pickle is the same
        save_tensor(tmp_path, data=bytes(size))
        digests.add(PthFolder(tmp_path).files[0]["header_sha256"])
    assert len(digests) == 2


TORCH = """
import io, sys, torch
folder = sys.argv[1]
written = torch.load(f"{folder}/ours.pth", weights_only=True)
w = torch.arange(24.0).reshape(4, 6)
for name, dtype in (("bf16", torch.bfloat16), ("f8", torch.float8_e4m3fn), ("f32", torch.float32)):
    assert written[name].dtype == dtype, name
    assert written[name].float().equal(w.to(dtype).float()), name
assert written["rows"].equal(w[1:3]) and isinstance(written["parameter"], torch.nn.Parameter)
saved = {"bf16": w.bfloat16(), "f16": w.half(), "f8": w.to(torch.float8_e4m3fn), "f32": w}
saved |= {"bytes": saved["f8"].view(torch.uint8), "rows": w[1:3], "scalar": w[1, 1]}
saved |= {"parameter": torch.nn.Parameter(saved["f8"]), "a._extra_state": io.BytesIO(b"settings")}
saved |= {"b._extra_state": io.BytesIO(), "empty": w[:0]}
torch.save(saved, f"{folder}/consolidated.00.pth")
torch.save(torch.nn.Linear(6, 4).state_dict(), f"{folder}/consolidated.01.pth")
"""


@pytest.mark.oracle
def test_torch_reads_and_writes_the_same(tmp_path):
    f8 = W.astype(jnp.float8_e4m3fn)
    ours = {"bf16": W.astype(jnp.bfloat16), "f8": f8, "f32": W, "parameter": Parameter(f8)}
    save_pth(tmp_path / "ours.pth", ours | {"rows": View(W, 6, (2, 6), (6, 1))})
    python = os.environ["JAXMOE_ORACLE_PYTHON"]
    subprocess.run([python, "-W", "ignore", "-c", TORCH, str(tmp_path)], check=True)
    folder = PthFolder(tmp_path)
    theirs = {"bf16": ours["bf16"], "f16": W.astype(np.float16), "f8": f8, "f32": W}
    theirs |= {"rows": W[1:3], "scalar": W[1, 1], "empty": W[:0], "parameter": f8}
    others = {"0:bytes", "1:weight", "1:bias"}
    assert folder.tensors.keys() == {f"0:{name}" for name in theirs} | others
    with pytest.raises(UserError, match="holds 0:bytes as U8"):  # found, but no weight
        folder.read("0:bytes", 0, W.size)
    for name, tensor in theirs.items():
        assert folder.tensors[f"0:{name}"].shape == tensor.shape
        read = folder.read(f"0:{name}", 0, tensor.size)
        assert read.dtype == tensor.dtype
        assert read.tobytes() == tensor.tobytes(), name
