"""Meta's .pth files: read without torch, no code run, and every bad file refused."""

import os
import pickle
import subprocess
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.checkpoint import pth
from jaxmoe.checkpoint.pth import PthFolder
from jaxmoe.errors import UserError
from tests import pth_files
from tests.pth_files import EXTRA_STATE, Parameter, View, call, named, plain, save_pth

W = np.arange(24, dtype=np.float32).reshape(4, 6)
WQKV = "layers.3.attention.wqkv.weight"
FILE = "consolidated.00.pth"


def save(folder, **tensors):
    return save_pth(folder / FILE, tensors)


def save_ranks(folder, *names):
    for n, name in enumerate(names):
        save_pth(folder / name, {"w": W + n})


def save_tensor(folder, key="0", offset=0, shape=(4, 6), strides=(6, 1), data=bytes(96), **how):
    """A file whose one tensor, `w`, is described as told."""
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
    """Also where it is no BytesIO, as other versions of Meta's libraries write it."""
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
    """A state dict of torch has `_metadata`."""
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
    """They are stored as if they were float8."""
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


def test_no_file(tmp_path):
    refused(tmp_path, tmp_path, FILE)
    refused(tmp_path / "absent", tmp_path / "absent", FILE)


def test_missing_rank(tmp_path):
    save_ranks(tmp_path, "consolidated.00.pth", "consolidated.01.pth", "consolidated.03.pth")
    refused(tmp_path, tmp_path, "consolidated.03.pth", "no consolidated.02.pth")


def test_rank_twice(tmp_path):
    save_ranks(tmp_path, "consolidated.00.pth", "consolidated.1.pth", "consolidated.01.pth")
    refused(tmp_path, tmp_path / "consolidated.1.pth", tmp_path / "consolidated.01.pth")


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / FILE).mkdir()
    refused(tmp_path, tmp_path / FILE, "directory")


class Run:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    pickled = pickle.dumps({"w": Run(f"touch {marker}")}, protocol)
    save_pickle(tmp_path, pickled)
    refused(tmp_path, tmp_path / FILE, f"{os.system.__module__}.system", "do not trust")
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()


def test_code_in_scales_is_not_run(tmp_path):
    save(tmp_path, w=W)
    pickled = pickle.dumps(Run(f"touch {tmp_path / 'ran'}"))
    pth_files.save_records(tmp_path / "fp8_scales_0.pt", pickled, {})
    refused(tmp_path, "fp8_scales_0.pt", "system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__call__"),
        ("collections", "OrderedDict.fromkeys"),
        ("jaxmoe.checkpoint.pth", "PthFolder"),
        ("io", "open"),
        ("x\ny", "z"),
    ],
)
def test_other_names_are_refused(tmp_path, module, name):
    pickled = b"\x80\x04" + plain(module) + plain(name) + pickle.STACK_GLOBAL + b")R."
    save_pickle(tmp_path, pickled)
    refused(tmp_path, tmp_path / FILE, f"{module}.{name}".replace("\n", r"\n"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("collections", "OrderedDict"),
        ("_io", "BytesIO"),
        ("torch", "FloatStorage"),
    ],
)
@pytest.mark.parametrize("attribute", ["__init__", "__defaults__", "__setstate__", "result"])
def test_what_a_pickle_names_cannot_be_changed(tmp_path, module, name, attribute):
    """BUILD sets attributes, and with a pair as its state does so by setattr."""
    state = pickle.EMPTY_DICT + pickle.MARK + plain(attribute) + plain(()) + pickle.SETITEMS
    for build in (state, pth_files.tuple_of(plain(None), state)):
        save_pickle(tmp_path, named(module, name) + build + pickle.BUILD + pickle.STOP)
        refused(tmp_path, tmp_path / FILE, "damaged data.pkl")
    save(tmp_path, w=Parameter(W), e=EXTRA_STATE)
    np.testing.assert_array_equal(PthFolder(tmp_path).read("0:w", 0, 24), W.reshape(-1))


def test_bytes_of_any_length_are_not_made(tmp_path):
    """Only `bytes()` is in torch's files, and `bytes(10**11)` could end the process."""
    made = call(named("__builtin__", "bytes"), plain(3))
    save_pickle(tmp_path, pth_files.as_pickle({"w": made}))
    refused(tmp_path, tmp_path / FILE, "damaged data.pkl")


@pytest.mark.parametrize("put", [b"p1048576\n", b"r\0\0\x10\0"])
def test_large_memo_is_not_made(tmp_path, put):
    """Its list of a million values could as well be one of 2**32, which no machine survives."""
    save_pickle(tmp_path, b"\x80\x02}" + put + b".")
    refused(tmp_path, tmp_path / FILE, "damaged data.pkl")
    save_pickle(tmp_path, b"\x80\x02}q\0.")
    assert not PthFolder(tmp_path).tensors


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (plain(7), "holds w, which is no tensor"),
        (pickle.EMPTY_DICT, "holds w, which is no tensor"),
        (call(named("torch._utils", "_rebuild_tensor_v2"), plain(1)), "damaged data.pkl"),
        (plain("0") + pickle.BINPERSID, "damaged data.pkl"),
        (plain(("module", "F32", "0", "cpu", 1)) + pickle.BINPERSID, "damaged data.pkl"),
        (plain(("storage", "F33", "0", "cpu", 1)) + pickle.BINPERSID, "damaged data.pkl"),
        (plain(("storage", "F32", 0, "cpu", 1)) + pickle.BINPERSID, "damaged data.pkl"),
    ],
)
def test_values_that_are_no_tensors(tmp_path, value, part):
    save_pickle(tmp_path, pth_files.as_pickle({"w": value}))
    refused(tmp_path, tmp_path / FILE, part)


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02", plain(1) + b".", b"]."])
def test_pickle_that_is_no_dict(tmp_path, pickled):
    save_pickle(tmp_path, pickled)
    refused(tmp_path, tmp_path / FILE)


@pytest.mark.parametrize("name", [3, (), "a\nb"])
def test_key_that_is_no_name(tmp_path, name):
    save_pickle(tmp_path, pth_files.as_pickle({name: plain(1)}))
    refused(tmp_path, tmp_path / FILE, "no name of a tensor")


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (-4, -6)},
        {"shape": (4.0, 6)},
        {"shape": 24},
        {"shape": (24,)},
        {"shape": (True, 24)},
        {"shape": (2**62, 6), "strides": (6, 1)},
        {"shape": (10**5000, 6), "strides": (6, 1)},
        {"strides": None},
        {"offset": -1},
        {"offset": "0"},
    ],
)
def test_tensor_that_cannot_be(tmp_path, lie):
    save_tensor(tmp_path, **lie)
    refused(tmp_path, tmp_path / FILE, "describes w as no tensor can be")


@pytest.mark.parametrize(("storage", "dtype"), [("0", "F32"), (None, "F32"), (None, None)])
def test_tensor_without_a_storage(tmp_path, storage, dtype):
    args = map(plain, (storage, 0, (4, 6), (6, 1), False, None, dtype))
    value = call(named("torch._utils", "_rebuild_tensor_v3"), *args)
    save_pickle(tmp_path, pth_files.as_pickle({"w": value}))
    refused(tmp_path, tmp_path / FILE, "describes w as no tensor can be")


@pytest.mark.parametrize(
    ("lie", "needed"), [({"data": bytes(95)}, 96), ({"offset": 1}, 100), ({"shape": (5, 6)}, 120)]
)
def test_record_shorter_than_its_tensor(tmp_path, lie, needed):
    save_tensor(tmp_path, **lie)
    refused(tmp_path, tmp_path / FILE, f"bytes of data for w, which needs {needed}")


def test_missing_record(tmp_path):
    save_tensor(tmp_path, key="17")
    refused(tmp_path, tmp_path / FILE, "lacks data/17, the data of w;")


def test_big_endian_numbers(tmp_path):
    save_tensor(tmp_path, byteorder=b"big")
    refused(tmp_path, tmp_path / FILE, "little-endian")


def test_old_files_do_not_say_their_byte_order(tmp_path):
    save_tensor(tmp_path, byteorder=None)
    assert PthFolder(tmp_path).tensors.keys() == {"0:w"}


def test_compressed_pickle(tmp_path):
    save_tensor(tmp_path, compression=zipfile.ZIP_DEFLATED)
    refused(tmp_path, tmp_path / FILE, "data.pkl compressed", "torch.save")


def recompress(file, name, **change):
    """Writes the zip again with one record changed."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data, **(change if record.endswith(name) else {}))


def test_compressed_tensor(tmp_path):
    file = save_tensor(tmp_path)
    recompress(file, "data/0", compress_type=zipfile.ZIP_DEFLATED)
    refused(tmp_path, file, "data/0, the data of w, compressed", "torch.save")


@pytest.mark.parametrize("field", [38, 22])
def test_record_that_is_not_what_it_holds(tmp_path, field):
    """Encrypted, or of a size unlike its own: fields that many bytes before the last name."""
    file = save_tensor(tmp_path)
    data = bytearray(file.read_bytes())
    data[data.rindex(b"consolidated.00/data/0") - field] ^= 1
    file.write_bytes(data)
    refused(tmp_path, file, "data/0, the data of w, compressed or encrypted")


def test_pickle_too_large(tmp_path, monkeypatch):
    save(tmp_path, w=W)
    monkeypatch.setattr(pth, "_MAX_PICKLE", 100)
    refused(tmp_path, tmp_path / FILE, "data.pkl too large")


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 150, 400, -200, -1])
def test_truncated(tmp_path, keep):
    file = save(tmp_path, w=W)
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, file, "download it again")


def test_piece_missing_in_the_middle(tmp_path):
    file = save(tmp_path, a=W, b=W + 1)
    data = file.read_bytes()
    middle = data.index((W + 1).tobytes())
    file.write_bytes(data[: middle - 50] + data[middle + 50 :])
    refused(tmp_path, file, "download it again")


def test_record_that_is_not_where_the_directory_says(tmp_path):
    file = save(tmp_path, a=W)
    data = bytearray(file.read_bytes())
    data[data.index(b"consolidated.00/data/0") - 30] ^= 0xFF
    file.write_bytes(data)
    refused(tmp_path, file, "damaged at data/0, the data of a;")


def test_flipped_bit_in_the_pickle(tmp_path):
    """The zip has a checksum of it, so even a changed letter of a name is noticed."""
    file = save(tmp_path, **{WQKV: W})
    data = bytearray(file.read_bytes())
    data[data.index(WQKV.encode())] ^= 1
    file.write_bytes(data)
    refused(tmp_path, file, "damaged at data.pkl")


def test_flipped_byte_anywhere_but_in_data(tmp_path):
    """Refused, or read as if nothing had happened; never another exception."""
    file = save_pth(tmp_path / FILE, {"w": W, "e": EXTRA_STATE})
    good = file.read_bytes()
    data = range(good.index(W.tobytes()), good.index(W.tobytes()) + W.nbytes)
    for position in set(range(len(good))) - set(data):
        file.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        try:
            folder = PthFolder(tmp_path)
            assert folder.read("0:w", 0, 24).tobytes() == W.tobytes(), position
        except UserError as error:
            assert FILE in str(error)


def test_format_before_torch_1_6(tmp_path):
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    (tmp_path / FILE).write_bytes(magic + bytes(1000))
    refused(tmp_path, tmp_path / FILE, "before 1.6", "torch.save")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>"])
def test_no_zip(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    refused(tmp_path, tmp_path / FILE, "no file of torch.save")


@pytest.mark.parametrize("names", [["a.txt"], ["data.pkl"], ["a/data.pkl", "b/data.pkl"]])
def test_zip_of_something_else(tmp_path, names):
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    refused(tmp_path, tmp_path / FILE, "not of torch.save")


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    file = save(tmp_path, w=W)
    folder = PthFolder(tmp_path)
    file.write_bytes(file.read_bytes()[: folder.tensors["0:w"].start + 10])
    with pytest.raises(UserError, match=rf"{FILE} ends inside 0:w"):
        folder.read("0:w", 0, 24)


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
