"""Reads Meta's `consolidated.NN.pth` files, one per model-parallel rank, piece by piece.

Torch is not used: it would be a dependency of 2 GB for one format, it maps files into memory, where
every page that was touched counts as the process's, and its unpickler can run code from the file
unless told not to. A .pth file is a zip whose `data.pkl` describes the tensors (`pickles` reads it)
and whose records `data/<key>` hold their bytes, uncompressed. Bytes are read at their offsets, and
each record is compared with its CRC-32 in the zip while it is read.
"""

import hashlib
import io
import math
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxmoe.checkpoint.formats.pickles import ITEMSIZE, ExtraState, Storage, Tensor, unpickle
from jaxmoe.checkpoint.formats.tensor_files import Entry, TensorFiles, read_into
from jaxmoe.errors import UserError

CONSOLIDATED = "consolidated.{:02d}.pth"
FP8_SCALES = "fp8_scales_{}.pt"
INT4_SCALES = "int4_scales_{}.pt"

_EXTRA_STATE = "._extra_state"  # settings of Meta's training, no weights
_PIECE = 2**22  # bytes that are read at once when they are only checked
_MAX_PICKLE = 100 * 2**20  # bytes; Meta's have less than 1 MiB
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_ENCRYPTED = 1  # the flag of an encrypted record
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, length of the name, length of the extra field


class PthFolder(TensorFiles):
    """The tensors of `consolidated.00.pth`, `consolidated.01.pth` and so on.

    A tensor is called `{rank}:{key}`, such as `0:layers.3.attention.wqkv.weight`. Tensors of
    `fp8_scales_{rank}.pt`, if such files are there, are called `{rank}:{key}.scale`.

    Attributes:
        ranks: the number of model-parallel ranks.
    """

    def __init__(self, folder: str | Path):
        """Reads the descriptions of all tensors.

        Raises:
            UserError: if a file is missing, damaged, cut short, or tries to run code; if a tensor
                is not contiguous; or if the weights are int4.
        """
        self.folder = Path(folder)
        self.tensors: dict[str, Entry] = {}
        self.files: list[dict[str, Any]] = []
        self._records: dict[str, _Record] = {}
        weights = _find_ranks(self.folder, CONSOLIDATED)
        if not weights:
            raise UserError(f"{self.folder} holds no {CONSOLIDATED.format(0)}; is it a model?")
        self.ranks = len(weights)
        for rank, file in enumerate(weights):
            self._add_file(file, rank, "")
        for rank, file in enumerate(_find_scales(self.folder, self.ranks)):
            self._add_file(file, rank, ".scale")

    def _add_file(self, file: Path, rank: int, suffix: str) -> None:
        tensors, about = _read_file(file)
        for key, (entry, record) in tensors.items():
            name = f"{rank}:{key}{suffix}"
            if name in self.tensors:
                raise UserError(
                    f"{file} and {self.tensors[name].file} both hold {name}; download both again."
                )
            self.tensors[name], self._records[name] = entry, record
        self.files.append(about)

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """Reads as `TensorFiles.read`, and checks the tensor's record once all of it was read."""
        data = super().read(name, start, count)
        first = self.tensors[name].start + start * data.itemsize
        self._records[name].add(first, data.view(np.uint8))
        return data

    def confirm(self) -> None:
        """Reads the rest of the records that were read in part, and checks them."""
        for record in self._records.values():
            record.finish()


def _find_ranks(folder: Path, template: str) -> list[Path]:
    """The files whose names are the template with the ranks 0, 1 and so on, in that order.

    Raises:
        UserError: if two files are of one rank, or a rank is missing.
    """
    before, after = re.split(r"\{.*\}", template)
    pattern = re.compile(f"{re.escape(before)}([0-9]+){re.escape(after)}")
    files: dict[int, Path] = {}
    for file in sorted(folder.glob(f"{before}*{after}")):
        if match := pattern.fullmatch(file.name):
            other = files.setdefault(int(match[1]), file)
            if other != file:
                raise UserError(f"{other} and {file} are both of one rank; remove the wrong one.")
    for rank in range(len(files)):
        if rank not in files:
            last = files[max(files)].name
            raise UserError(
                f"{folder} holds {last} but no {template.format(rank)}; download that too."
            )
    return [files[rank] for rank in range(len(files))]


def _find_scales(folder: Path, ranks: int) -> list[Path]:
    """The files of fp8 scales, one per rank, or none.

    Raises:
        UserError: if the weights are int4, or there are scales of some ranks only.
    """
    if int4 := _find_ranks(folder, INT4_SCALES):
        # Nothing else shows it: the files of weights declare packed int4 as float8.
        raise UserError(
            f"{int4[0]} says that the weights are int4, which cannot be read; use the model's "
            "bfloat16 or float8 release."
        )
    scales = _find_ranks(folder, FP8_SCALES)
    if scales and len(scales) != ranks:
        missing = FP8_SCALES if len(scales) < ranks else CONSOLIDATED
        name = missing.format(min(ranks, len(scales)))
        raise UserError(
            f"{folder} holds the weights of {ranks} ranks but the scales of {len(scales)}; "
            f"download {name} too."
        )
    return scales


class _Record:
    """A range of a file with a known CRC-32, which is computed while the range is read."""

    def __init__(self, file: Path, name: str, start: int, nbytes: int, crc: int):
        """Describes the range.

        Args:
            file: the file.
            name: a tensor in the range, for error messages.
            start: the offset of its first byte.
            nbytes: its size.
            crc: its CRC-32.
        """
        self.start, self.nbytes = start, nbytes
        self._file, self._name, self._expected = file, name, crc
        self._done, self._crc = start, 0

    def add(self, start: int, data: np.ndarray) -> None:
        """Takes bytes that were read at offset `start`; first reads those that were skipped.

        Raises:
            UserError: if the record is complete now and its CRC-32 is wrong.
        """
        self._read_to(start)
        new = memoryview(data)[self._done - start :]
        if not new:
            return
        self._crc = zlib.crc32(new, self._crc)
        self._done += len(new)
        if self._done == self.start + self.nbytes and self._crc != self._expected:
            raise UserError(
                f"{self._file} is damaged in the data of {self._name} (its CRC-32 is another than "
                "when it was written); download it again."
            )

    def finish(self) -> None:
        """Reads the rest of a record that was read in part, and checks it."""
        if self._done > self.start:
            self._read_to(self.start + self.nbytes)

    def _read_to(self, end: int) -> None:
        while self._done < end:
            piece = np.empty(min(_PIECE, end - self._done), np.uint8)
            read_into(piece, self._file, self._done, self._name)
            self.add(self._done, piece)


def _read_file(file: Path) -> tuple[dict[str, tuple[Entry, _Record]], dict[str, Any]]:
    """The tensors of one file, and its entry in `TensorFiles.files`.

    The header is everything but the data.
    """
    try:
        with open(file, "rb") as stream:
            archive = _Archive(file, stream)
            pickled = archive.read_pickle()
            archive.check_byte_order()
            tensors = _tensors(file, unpickle(file, pickled))
            located = {name: _entry(archive, name, tensor) for name, tensor in tensors.items()}
            digest = hashlib.sha256(pickled + archive.read_directory()).hexdigest()
            size = stream.seek(0, io.SEEK_END)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; download it again.") from None
    return located, {"name": file.name, "bytes": size, "header_sha256": digest}


class _Archive:
    """An open .pth file, which is a zip."""

    def __init__(self, file: Path, stream: BinaryIO):
        self.file = file
        self._stream = stream
        magic = stream.read(len(_LEGACY_MAGIC))
        if magic == _LEGACY_MAGIC:
            raise UserError(
                f"{file} is in the format of torch before 1.6; load it with torch and save it "
                "again with torch.save."
            )
        if not magic.startswith(_ZIP_MAGIC):
            raise UserError(f"{file} is no file of torch.save; download it again.")
        try:
            self._zip = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
            raise UserError(f"{file} is damaged or cut short; download it again.") from None
        self._infos = {info.filename: info for info in self._zip.infolist()}
        self._data: dict[str, _Record] = {}
        self._root = self._find_root()

    def _find_root(self) -> str:
        """The one folder in the zip; torch names it after the file, or `archive/`.

        Raises:
            UserError: if there is not one with a `data.pkl`, or it has another rank's name.
        """
        roots = [name for name in self._infos if re.fullmatch("[^/]+/data\\.pkl", name)]
        if len(roots) != 1:
            raise UserError(f"{self.file} is a zip but not of torch.save; download it again.")
        root = roots[0].removesuffix("/data.pkl")
        if re.fullmatch(r"consolidated\.\d+|fp8_scales_\d+", root) and root != self.file.stem:
            raise UserError(
                f"{self.file} was written under the name {root}{self.file.suffix}: files of two "
                "ranks are exchanged; give them their own names."
            )
        return root + "/"

    def read_pickle(self) -> bytes:
        """The bytes of `data.pkl`.

        Raises:
            UserError: if it is damaged or too large, or the file has no checksums.
        """
        info = self._infos[f"{self._root}data.pkl"]
        if info.CRC == 0 and info.file_size:
            raise UserError(
                f"{self.file} was saved without checksums; load it with torch and save it again "
                "after torch.serialization.set_crc32_options(True)."
            )
        if info.file_size > _MAX_PICKLE:
            raise UserError(f"{self.file} has a data.pkl too large to be one; download it again.")
        return self._read("data.pkl")

    def check_byte_order(self) -> None:
        """Checks that the numbers are little-endian, as in older files, which do not state it.

        Raises:
            UserError: if they are big-endian.
        """
        if f"{self._root}byteorder" in self._infos and self._read("byteorder") != b"little":
            raise UserError(
                f"{self.file} does not have little-endian numbers; save it again with torch on a "
                "little-endian machine."
            )

    def read_directory(self) -> bytes:
        """The bytes of the zip's directory of its records."""
        self._stream.seek(self._zip.start_dir)
        return self._stream.read()

    def find(self, record: str, tensor: str) -> _Record:
        """The range of the record that holds a tensor; tensors may share a record.

        The zip's directory only gives the offset of the record's own header, and torch lets the
        extra field of that header differ from the directory's, to align the data behind it.

        Args:
            record: the record's name in the file's folder of the zip.
            tensor: the tensor, for error messages.

        Raises:
            UserError: if the record is missing, compressed or cut short.
        """
        if record in self._data:
            return self._data[record]
        info = self._infos.get(self._root + record)
        if info is None:
            raise UserError(f"{self.file} lacks {record}, the data of {tensor}; download it again.")
        self._check_stored(info, f", the data of {tensor},")
        self._stream.seek(min(info.header_offset, self._zip.start_dir))
        header = self._stream.read(_LOCAL_HEADER.size)
        if len(header) == _LOCAL_HEADER.size and header.startswith(_ZIP_MAGIC):
            _, name, extra = _LOCAL_HEADER.unpack(header)
            start = info.header_offset + _LOCAL_HEADER.size + name + extra
            if start + info.file_size <= self._zip.start_dir:
                self._data[record] = _Record(self.file, tensor, start, info.file_size, info.CRC)
                return self._data[record]
        raise UserError(
            f"{self.file} is damaged at {record}, the data of {tensor}; download it again."
        )

    def _read(self, record: str) -> bytes:
        info = self._infos[self._root + record]
        self._check_stored(info, "")
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error):
            raise UserError(f"{self.file} is damaged at {record}; download it again.") from None

    def _check_stored(self, info: zipfile.ZipInfo, whose: str) -> None:
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or info.flag_bits & _ENCRYPTED:
            raise UserError(
                f"{self.file} holds {info.filename}{whose} compressed or encrypted; load it with "
                "torch and save it again with torch.save."
            )


def _tensors(file: Path, values: Any) -> dict[str, Tensor]:
    """The tensors of an unpickled state dict, without extra states.

    Raises:
        UserError: if it is no dict of tensors by name.
    """
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no tensors by name; is it a file of weights?")
    tensors = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name.isprintable():
            raise UserError(f"{file} has a key that is no name of a tensor; download it again.")
        if isinstance(value, ExtraState) or name.endswith(_EXTRA_STATE):
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{file} holds {name}, which is no tensor; is it a file of weights?")
        tensors[name] = value
    return tensors


def _entry(archive: _Archive, name: str, tensor: Tensor) -> tuple[Entry, _Record]:
    """Where a tensor lies, and the record that it lies in.

    Raises:
        UserError: if its description makes no sense, or its record is too small.
    """
    _check(archive.file, name, tensor)
    itemsize, count = ITEMSIZE[tensor.dtype], math.prod(tensor.shape)
    record = archive.find(f"data/{tensor.storage.key}", name)
    needed = (tensor.offset + count) * itemsize
    if record.nbytes < needed:
        raise UserError(
            f"{archive.file} has {record.nbytes} bytes of data for {name}, which needs {needed}; "
            "download it again."
        )
    start = record.start + tensor.offset * itemsize
    return Entry(archive.file, tensor.dtype, tensor.shape, start, count * itemsize), record


def _check(file: Path, name: str, tensor: Tensor) -> None:
    """Refuses a tensor whose description makes no sense or that is not contiguous."""
    shape, strides = tensor.shape, tensor.strides
    sensible = (
        isinstance(tensor.storage, Storage)
        and isinstance(tensor.dtype, str)
        and tensor.dtype in ITEMSIZE
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides)
        and all(type(n) is int and 0 <= n < 2**63 for n in (tensor.offset, *shape, *strides))
        and math.prod(shape) < 2**63
    )
    if not sensible:
        raise UserError(f"{file} describes {name} as no tensor can be; download it again.")
    if not _is_contiguous(shape, strides):
        raise UserError(
            f"{file} holds {name} of shape {shape} with strides {strides}, so its elements are not "
            "in order; save its .contiguous() instead."
        )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= size
    return True
