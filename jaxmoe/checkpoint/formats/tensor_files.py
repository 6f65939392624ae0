"""Tensors in files, read piece by piece: what the readers of all formats have in common."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import UserError

DTYPES = {  # dtypes that can be read, by the names that safetensors gives them
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: the file that holds it.
        dtype: the name of its dtype in safetensors, such as `BF16`; perhaps none of `DTYPES`.
        shape: its shape.
        start: the offset of its first byte in the file.
        nbytes: its size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFiles:
    """The tensors of a checkpoint's files, in any format.

    Attributes:
        folder: the folder of the files.
        tensors: where every tensor lies, by name.
        files: of each file its name, its size in bytes and the SHA-256 of its header.
    """

    folder: Path
    tensors: dict[str, Entry]
    files: list[dict[str, Any]]

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
            UserError: if it is none of `DTYPES`.
        """
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file} holds {name} as {entry.dtype}, but only {', '.join(DTYPES)} can "
                "be read; use the model's bfloat16 release."
            )
        return DTYPES[entry.dtype]

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """Reads the elements `start` to `start + count` of a flat tensor.

        Raises:
            UserError: if the file cannot be read, or is shorter than when it was opened.
        """
        entry, dtype = self.tensors[name], self.dtype(name)
        data = np.empty(count, dtype)
        read_into(data.view(np.uint8), entry.file, entry.start + start * dtype.itemsize, name)
        return data

    def confirm(self) -> None:
        """Checks what was read against the checksums of the format, if it has any.

        Raises:
            UserError: if a file is damaged.
        """


def read_into(data: np.ndarray, file: Path, start: int, name: str) -> None:
    """Fills an array of bytes from a file.

    Args:
        data: the array, [bytes] uint8.
        file: the file.
        start: the offset of the first byte in the file.
        name: the tensor that lies there, for error messages.

    Raises:
        UserError: if the file cannot be read, or ends too early.
    """
    buffer = memoryview(data)
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start)
            while buffer:
                done = stream.readinto(buffer)
                if not done:
                    raise UserError(f"{file} ends inside {name}; download it again.")
                buffer = buffer[done:]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read at {name} ({error.strerror}); check its disk and run again."
        ) from None
