"""Reads the pickle of a torch file without torch and without running code that it names.

A pickle describes its content by calls of functions that it names. The unpickler here knows a fixed
list of names, and gives each a harmless value of this module in place of the function.
"""

import dataclasses
import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxmoe.errors import UserError

_DTYPES = (  # safetensors' name, bytes, torch's dtype, torch's class of storages
    ("BF16", 2, "bfloat16", "BFloat16Storage"),
    ("F16", 2, "float16", "HalfStorage"),
    ("F32", 4, "float32", "FloatStorage"),
    ("F64", 8, "float64", "DoubleStorage"),
    ("F8_E4M3", 1, "float8_e4m3fn", "Float8_e4m3fnStorage"),
    ("F8_E5M2", 1, "float8_e5m2", "Float8_e5m2Storage"),
    ("BOOL", 1, "bool", "BoolStorage"),
    ("U8", 1, "uint8", "ByteStorage"),
    ("I8", 1, "int8", "CharStorage"),
    ("I16", 2, "int16", "ShortStorage"),
    ("I32", 4, "int32", "IntStorage"),
    ("I64", 8, "int64", "LongStorage"),
)
ITEMSIZE = {name: itemsize for name, itemsize, _, _ in _DTYPES}


class Storage(NamedTuple):
    """A storage of torch, which one or several tensors share.

    Attributes:
        dtype: safetensors' name of its dtype.
        key: its record in the file is `data/<key>`.
    """

    dtype: str
    key: str


class Tensor(NamedTuple):
    """A tensor as the pickle describes it, unchecked: any value may be of any type.

    Attributes:
        storage: a `Storage`.
        offset: its first element in the storage.
        shape: its shape.
        strides: in elements, of each axis.
        dtype: safetensors' name of its dtype.
    """

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """Stands for a function that a pickle names.

    It is not a function itself, since a pickle may set attributes of what it names, such as a
    function's defaults.
    """

    result: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.result(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a function has no state")


class _Dict(dict):
    """Stands for an OrderedDict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drops attributes, such as torch's `_metadata` of a state dict."""


class ExtraState:
    """Stands for a BytesIO; a class, because the opcode NEWOBJ makes instances of classes only."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drops the content, which is a pickle too."""


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides, storage.dtype)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """A tensor whose dtype has no class of storages: its storage is one of bytes."""
    return Tensor(storage, offset, shape, strides, dtype)


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Call(_rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, requires_grad, hooks: tensor),
    ("torch.storage", "UntypedStorage"): "U8",
    **{("torch", storage): name for name, _, _, storage in _DTYPES},
    **{("torch", dtype): name for name, _, dtype, _ in _DTYPES},
    ("collections", "OrderedDict"): _Dict,
    ("_io", "BytesIO"): ExtraState,
    # Calls by which the content of a BytesIO is pickled, which is dropped.
    ("_codecs", "encode"): _Call(lambda text, encoding: b""),
    ("__builtin__", "bytes"): _Call(lambda: b""),
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that only makes dicts, plain values and the values of this module."""

    def __init__(self, file: Path, pickled: bytes):
        super().__init__(io.BytesIO(pickled))
        self._file = file

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"{self._file} asks to run {f'{module}.{name}'!r:.100}, which no file of weights "
                "needs; do not trust it, and download the model from its publisher."
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any, /) -> Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or dtype not in ITEMSIZE or not isinstance(key, str):
            raise pickle.UnpicklingError("not a storage")
        return Storage(dtype, key)


def unpickle(file: Path, pickled: bytes) -> Any:
    """The object that a pickle describes: dicts, plain values and this module's values.

    Args:
        file: where the pickle is from, for error messages.
        pickled: the pickle.

    Raises:
        UserError: if it is damaged, or names a function that no file of weights needs.
    """
    try:
        _check_sizes(pickled)
        return _Unpickler(file, pickled).load()
    except UserError:
        raise
    except Exception:  # a damaged pickle can raise almost anything
        raise UserError(f"{file} has a damaged data.pkl; download it again.") from None


def _check_sizes(pickled: bytes) -> None:
    """Refuses memo indices that would make the unpickler allocate more than the pickle's size.

    Raises:
        ValueError: from `pickletools`, for a string that would end behind the pickle.
        pickle.UnpicklingError: for such an index.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        index = argument if opcode.name in ("PUT", "LONG_BINPUT") else None
        if isinstance(index, int) and index > len(pickled):
            raise pickle.UnpicklingError("a list of that many values is allocated for this")
