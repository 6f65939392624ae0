"""Finished checkpoints, of a model or a document, and the manifest that lists their checksums.

The manifest lists the SHA-256 of the metadata and, under every array's name, of its `zarr.json`,
with shape and dtype, and of its file of checksums. Files that differ from it are refused. Its lines
are those of `sha256sum`, which can check them too.
"""

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint.zarr.arrays import StoredArray, open_array
from jaxmoe.checkpoint.zarr.checksums import CHECKSUMS
from jaxmoe.errors import UserError
from jaxmoe.parsing import parse_json, read_text

FORMAT = 3  # of checkpoints and documents; before 3 there was no manifest
MANIFEST = "manifest.sha256"
MARKER = "_CHECKPOINT_METADATA"  # Orbax's own file in every finished checkpoint
STATE = "state"  # the folder that Orbax gives to the tree of `ocp.save`
ZARR = "zarr.json"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished checkpoint, to be read.

    Attributes:
        path: its folder.
        metadata: the custom metadata, compared with the manifest.
        digests: the SHA-256 of its files, by their paths in the folder; None if it has no manifest,
            as before format 3.
    """

    path: Path
    metadata: dict[str, Any]
    digests: Mapping[str, str] | None

    def field(self, name: str, kind: type) -> Any:
        """A value of the metadata.

        Args:
            name: its key.
            kind: its type.

        Raises:
            UserError: if it is missing or of another type.
        """
        value = self.metadata.get(name)
        if type(value) is not kind:
            raise UserError(
                f"{self.path} has {value!r:.80} as {name} in its metadata; make it again."
            )
        return value

    def count_arrays(self) -> int:
        """The number of arrays in the folder."""
        return sum(1 for _ in self.path.glob(f"{STATE}/*/{ZARR}"))

    def open_array(self, name: str, shape: tuple[int, ...], dtypes: Collection[str]) -> StoredArray:
        """Opens an array; the chunks that are read of it are compared with the manifest.

        Args:
            name: its dotted name.
            shape: the shape that it must have.
            dtypes: the names of the dtypes that it may have.

        Raises:
            UserError: if it is missing, damaged, or has another shape or dtype.
        """
        description = self._listed(f"{STATE}/{name}/{ZARR}")
        described = parse_json(description, str(self.path / STATE / name / ZARR))
        _check_description(described, f"{self.path} holds {name}", shape, dtypes)
        listed = None if self.digests is None else self._listed(f"{STATE}/{name}/{CHECKSUMS}")
        return open_array(self.path / STATE / name, listed)

    def _listed(self, file: str) -> bytes:
        """The content of a file of the checkpoint.

        Raises:
            UserError: if it cannot be read or differs from the manifest.
        """
        try:
            content = (self.path / file).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.path / file} cannot be read: {error.strerror}; make {self.path} again."
            ) from None
        if self.digests is not None and self.digests.get(file) != _sha256(content):
            raise UserError(
                f"{self.path / file} is not the file that {MANIFEST} lists; make {self.path} again."
            )
        return content


def is_finished(path: str | Path) -> bool:
    """Whether a folder is a finished checkpoint or saved document; False for any other path."""
    return os.path.isfile(Path(path) / MARKER)


def open_finished(path: Path, key: str, remedy: str) -> Finished:
    """Opens a finished checkpoint by its metadata; unlike Orbax, without opening every array.

    Args:
        path: its folder.
        key: the key of its custom metadata, which says whose checkpoint it is.
        remedy: how to make such a checkpoint, for error messages.

    Raises:
        UserError: if `path` is no finished checkpoint with such metadata, was written by a newer
            version, or differs from its manifest.
    """
    if not (path / MARKER).is_file():
        raise UserError(f"{path} is no finished checkpoint; {remedy}.")
    metadata: Any = parse_json(read_text(path / MARKER), str(path / MARKER))
    for part in ("custom_metadata", key):
        metadata = metadata.get(part) if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is no checkpoint of this kind; {remedy}.")
    finished = Finished(path, metadata, None)
    if finished.field("format", int) > FORMAT:
        raise UserError(f"{path} was written by jaxmoe {metadata.get('version')!r}; update jaxmoe.")
    if metadata["format"] < FORMAT and not (path / MANIFEST).exists():
        _warn(path)
        return finished
    finished = dataclasses.replace(finished, digests=_read_manifest(path))
    finished._listed(MARKER)
    return finished


def digest_of(path: Path) -> str:
    """A SHA-256 that differs between checkpoints with different content.

    It is that of the manifest; without a manifest that of the metadata.
    """
    listed = path / MANIFEST
    return _sha256((listed if listed.exists() else path / MARKER).read_bytes())


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Writes the manifest of the checkpoint in `folder`, whose arrays have these names."""
    arrays = [f"{STATE}/{name}/{file}" for name in sorted(names) for file in (ZARR, CHECKSUMS)]
    lines = [f"{_sha256((folder / file).read_bytes())}  {file}\n" for file in (MARKER, *arrays)]
    listed = "".join(lines)
    (folder / MANIFEST).write_text(f"{listed}# {_sha256(listed.encode())}\n")


def _read_manifest(path: Path) -> dict[str, str]:
    """The digests that the manifest of a checkpoint lists, by file.

    Raises:
        UserError: if it is missing or damaged.
    """
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} lacks its {MANIFEST}; make it again.")
    listed, _, own = read_text(path / MANIFEST).rpartition("# ")
    if own != _sha256(listed.encode()) + "\n":
        raise UserError(f"{path / MANIFEST} is damaged; make {path} again.")
    parts = (line.partition("  ") for line in listed.splitlines())
    return {file: digest for digest, _, file in parts}


@functools.cache
def _warn(path: Path) -> None:
    """Logs, once per checkpoint, that it has no manifest."""
    logging.getLogger(__name__).warning(
        "%s has no %s, as an older jaxmoe made it: files that were exchanged would not be noticed; "
        "make it again.",
        path,
        MANIFEST,
    )


def _check_description(
    described: Any, subject: str, shape: tuple[int, ...], dtypes: Collection[str]
) -> None:
    """Refuses a `zarr.json` that contradicts the metadata, before TensorStore acts on it.

    Wrong sizes could make TensorStore allocate more than the memory has.
    """
    try:
        stored, dtype = described["shape"], described["data_type"]
        block = described["chunk_grid"]["configuration"]["chunk_shape"]
    except (KeyError, TypeError):
        raise UserError(f"{subject} in a way that cannot be read; make it again.") from None
    if stored != list(shape):
        said = f"with shape {stored!r:.80}, but its metadata say {list(shape)}"
    elif dtype not in dtypes:
        said = f"in {dtype!r:.40}, but its metadata say {' or '.join(dtypes)}"
    elif not isinstance(block, list) or len(block) != len(shape):
        said = f"in blocks of {block!r:.80}, which are no shape"
    elif not all(isinstance(b, int) and 0 < b <= n for b, n in zip(block, shape, strict=True)):
        said = f"in blocks of {block!r:.80}, which are larger than it is"
    else:
        return
    raise UserError(f"{subject} {said}; make it again.")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
