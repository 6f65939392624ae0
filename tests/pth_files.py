"""Writes files as torch.save does, and others that only look so, without torch.

A pickle is put together from its opcodes, because pickle itself refuses to name what is not
installed. Unlike torch, it writes everything out in place and refers back to nothing.
"""

import dataclasses
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np

EXTRA_STATE = object()  # as a value: a BytesIO, as in Meta's entries that end in `._extra_state`

STORAGES = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
}


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor that is a part of `base`; several may share one base, as they may in torch."""

    base: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A tensor as torch.nn.Parameter."""

    data: np.ndarray


def save_pth(path, tensors, byteorder=b"little"):
    """Writes tensors by name: arrays, views, parameters, or `EXTRA_STATE`; returns the path.

    Values that are or view the same array share its data.
    """
    bases = _bases(tensors)
    keys = {id(base): str(n) for n, base in enumerate(bases)}
    values = {name: _value(value, keys) for name, value in tensors.items()}
    records = {f"data/{keys[id(base)]}": base.tobytes() for base in bases}
    return save_records(path, as_pickle(values), records, byteorder)


def save_records(path, data_pkl, records, byteorder=b"little", compression=zipfile.ZIP_STORED):
    """Writes a zip file of a pickle and records, named as torch names them; returns the path.

    Each record's own header has an extra field that the central directory does not have.
    """
    records = {"data.pkl": data_pkl, **records, "version": b"3\n"}
    if byteorder is not None:
        records["byteorder"] = byteorder
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            with archive.open(f"{Path(path).stem}/{name}", "w", force_zip64=True) as record:
                record.write(data)
    return Path(path)


def as_pickle(values):
    """A pickled dict of names and values, given as opcodes."""
    items = b"".join(plain(name) + value for name, value in values.items())
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + b"u."


def plain(value):
    """Opcodes of numbers, strings and tuples of them."""
    return pickle.dumps(value, protocol=2)[2:-1]


def named(module, name):
    """Opcodes of a function or class."""
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def tuple_of(*values):
    """Opcodes of a tuple of values, given as opcodes."""
    return pickle.MARK + b"".join(values) + pickle.TUPLE


def call(function, *args):
    """Opcodes of a call, the function and its arguments given as opcodes."""
    return function + tuple_of(*args) + pickle.REDUCE


def tensor(dtype, key, numel, offset, shape, strides):
    """Opcodes of a tensor whose data is the record `data/{key}`."""
    typed = dtype in STORAGES
    size = numel if typed else numel * np.dtype(dtype).itemsize
    storage = named("torch", STORAGES[dtype]) if typed else named("torch.storage", "UntypedStorage")
    persistent_id = tuple_of(plain("storage"), storage, *map(plain, (key, "cpu", size)))
    args = [persistent_id + pickle.BINPERSID, *map(plain, (offset, shape, strides, False)), hooks()]
    if typed:
        return call(named("torch._utils", "_rebuild_tensor_v2"), *args)
    return call(named("torch._utils", "_rebuild_tensor_v3"), *args, named("torch", dtype))


def hooks():
    """Opcodes of the empty dict that every tensor has."""
    return call(named("collections", "OrderedDict"))


def extra_state(contents="settings"):
    """Opcodes of a BytesIO."""
    text = call(named("_codecs", "encode"), plain(contents), plain("latin1"))
    content = text if contents else call(named("__builtin__", "bytes"))
    state = tuple_of(content, plain(0), plain(None))
    return named("_io", "BytesIO") + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD


def contiguous(shape):
    """The strides of a tensor in one piece."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _bases(tensors):
    bases = {}
    for value in tensors.values():
        if value is not EXTRA_STATE:
            base = _as_view(value).base
            bases[id(base)] = base
    return list(bases.values())


def _as_view(value):
    if isinstance(value, View):
        return value
    array = value.data if isinstance(value, Parameter) else value
    return View(array, 0, array.shape, contiguous(array.shape))


def _value(value, keys):
    if value is EXTRA_STATE:
        return extra_state()
    view = _as_view(value)
    place = (view.offset, view.shape, view.strides)
    code = tensor(str(view.base.dtype), keys[id(view.base)], view.base.size, *place)
    if isinstance(value, Parameter):
        return call(named("torch._utils", "_rebuild_parameter"), code, plain(True), hooks())
    return code
