"""The pickle of a torch file, read without torch and without running what it names.

A pickle says by calls what it holds. Here those calls are noted, not made: the unpickler knows a
fixed list of names, each standing for a value of this module.
"""

import dataclasses
import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxmoe.errors import UserError

_DTYPES = (  # name in an Entry, bytes, torch's dtype, torch's class of storages
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
    """A record of numbers, as the pickle names it."""

    dtype: str
    key: str


class Tensor(NamedTuple):
    """A tensor as the pickle describes it; nothing in it has been checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What the pickle has in place of a function.

    A function itself would not do: a pickle may set attributes of all it names, defaults included.
    """

    result: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.result(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a function has no state")


class _Dict(dict):
    """What the pickle has in place of an OrderedDict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drops attributes, such as torch's `_metadata` of a state dict."""


class ExtraState:
    """What the pickle has in place of a BytesIO; a class, as only classes are made by NEWOBJ."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Drops the contents, which are a pickle too."""


def _rebuild_v2(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides, storage.dtype)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """For dtypes without a class of storages, which are stored as bytes."""
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
    # How the contents of a BytesIO are pickled; they are dropped.
    ("_codecs", "encode"): _Call(lambda text, encoding: b""),
    ("__builtin__", "bytes"): _Call(lambda: b""),
}


class _Unpickler(pickle.Unpickler):
    """Makes values of this module, and none else."""

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
    """The object that a file's pickle describes, out of dicts and this module's values.

    Raises:
        UserError: if it is damaged, or names what no file of weights needs.
    """
    try:
        _check_sizes(pickled)
        return _Unpickler(file, pickled).load()
    except UserError:
        raise
    except Exception:  # a damaged pickle can raise almost anything
        raise UserError(f"{file} has a damaged data.pkl; download it again.") from None


def _check_sizes(pickled: bytes) -> None:
    """Refuses what would make the unpickler allocate more than a pickle of this size can need.

    The walk itself finds strings that would end behind the pickle.
    """
    for opcode, argument, _ in pickletools.genops(pickled):
        index = argument if opcode.name in ("PUT", "LONG_BINPUT") else None
        if isinstance(index, int) and index > len(pickled):
            raise pickle.UnpicklingError("a list of that many values is allocated for this")
