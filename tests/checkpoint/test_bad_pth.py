"""Bad and hostile .pth files run no code, and every one is refused."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from jaxmoe.checkpoint.formats import pth
from jaxmoe.checkpoint.formats.pth import PthFolder
from jaxmoe.errors import UserError
from tests import pth_files
from tests.checkpoint.test_pth import (
    FILE,
    WQKV,
    W,
    refused,
    save,
    save_pickle,
    save_ranks,
    save_tensor,
)
from tests.pth_files import EXTRA_STATE, Parameter, call, named, plain, save_pth


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
        ("jaxmoe.checkpoint.formats.pth", "PthFolder"),
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
    """The opcode BUILD sets attributes, and with a pair as its state it does so by setattr."""
    state = pickle.EMPTY_DICT + pickle.MARK + plain(attribute) + plain(()) + pickle.SETITEMS
    for build in (state, pth_files.tuple_of(plain(None), state)):
        save_pickle(tmp_path, named(module, name) + build + pickle.BUILD + pickle.STOP)
        refused(tmp_path, tmp_path / FILE, "damaged data.pkl")
    save(tmp_path, w=Parameter(W), e=EXTRA_STATE)
    np.testing.assert_array_equal(PthFolder(tmp_path).read("0:w", 0, 24), W.reshape(-1))


def test_bytes_of_any_length_are_not_made(tmp_path):
    """torch's files only call `bytes()`; `bytes(10**11)` could fill the memory."""
    made = call(named("__builtin__", "bytes"), plain(3))
    save_pickle(tmp_path, pth_files.as_pickle({"w": made}))
    refused(tmp_path, tmp_path / FILE, "damaged data.pkl")


@pytest.mark.parametrize("put", [b"p1048576\n", b"r\0\0\x10\0"])
def test_large_memo_is_not_made(tmp_path, put):
    """A memo index of a million could as well be 2**32, for which no machine has the memory."""
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
    """Changes the flags or sizes in the zip's directory, some bytes before the last name."""
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
    """Its checksum in the zip shows even a changed letter of a name."""
    file = save(tmp_path, **{WQKV: W})
    data = bytearray(file.read_bytes())
    data[data.index(WQKV.encode())] ^= 1
    file.write_bytes(data)
    refused(tmp_path, file, "damaged at data.pkl")


def test_flipped_byte_anywhere_but_in_data(tmp_path):
    """The file is refused or read correctly, and nothing else is raised."""
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


def flip(file, data, position):
    """Flips one bit of some data that occurs in the file once."""
    content = bytearray(file.read_bytes())
    assert content.count(data) == 1
    content[content.index(data) + position] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("position", [0, 50, 95])
def test_flipped_bits_of_data_are_found(tmp_path, position):
    """Damage is found with the last piece of a record, or, if a part was read, by `confirm`."""
    flip(save(tmp_path, **{WQKV: W}), W.tobytes(), position)
    words = rf"{FILE} is damaged in the data of {WQKV} .*CRC-32"
    pieces = PthFolder(tmp_path)
    for start in (0, 8):
        pieces.read(f"0:{WQKV}", start, 8)
    with pytest.raises(UserError, match=words):
        pieces.read(f"0:{WQKV}", 16, 8)
    part = PthFolder(tmp_path)
    part.confirm()  # nothing was read
    part.read(f"0:{WQKV}", 6, 6)
    with pytest.raises(UserError, match=words):
        part.confirm()


def test_tensors_of_one_record_are_checked_together(tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "_PIECE", 10)
    rows = {name: pth_files.View(W, 6 * n, (1, 6), (6, 1)) for n, name in enumerate("abc")}
    file = save(tmp_path, **rows)
    folder = PthFolder(tmp_path)
    for name in "cab":  # in any order, and again
        folder.read(f"0:{name}", 0, 6)
        folder.confirm()
    flip(file, W.tobytes(), 30)  # in b
    folder = PthFolder(tmp_path)
    folder.read("0:a", 0, 6)
    with pytest.raises(UserError, match=r"CRC-32"):
        folder.read("0:c", 0, 6)
        folder.confirm()
