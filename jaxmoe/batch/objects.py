"""Files on an object store, S3, Google Cloud Storage or Azure, through the package obstore."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from jaxmoe.errors import UserError

HIDDEN = "."  # begins the names of files that are being written, which no storage lists
PATIENCE = 60.0  # seconds during which a store may refuse requests or lose its replies

_SCHEMES = ("s3", "gs", "az")
_PAUSE = 0.2  # seconds between two tries
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")


class ObjectStorage:
    """A folder of an object store, as `jaxmoe.batch.storage.Storage`."""

    def __init__(self, url: str):
        """The storage at a URL.

        Raises:
            UserError: as `open_store`.
        """
        self._url = url.rstrip("/")
        self._store = open_store(self._url)

    def __str__(self) -> str:
        return self._url

    def read(self, name: str) -> bytes | None:
        """As `Storage.read`."""
        import obstore

        with self._asking(name, "read"), contextlib.suppress(FileNotFoundError):
            return bytes(obstore.get(self._store, checked_name(name)).bytes())
        return None

    def put(self, name: str, content: bytes) -> None:
        """As `Storage.put`."""
        import obstore

        with self._asking(name, "written"):
            obstore.put(self._store, checked_name(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """As `Storage.create`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def create() -> bool:
            try:
                obstore.put(self._store, checked_name(name), content, mode="create")
            except AlreadyExistsError:  # perhaps by this call, when the store's reply was lost
                return self.read(name) == content
            return True

        with self._asking(name, "written"):
            return _patiently(create)

    def names(self, prefix: str = "") -> list[str]:
        """As `Storage.names`."""
        inner = prefix.rpartition("/")[0]
        with self._asking(prefix, "listed"):
            found = [entry["path"] for entry in entries(self._store, inner)]
        return sorted(name for name in found if name.startswith(prefix))

    def delete(self, name: str) -> None:
        """As `Storage.delete`."""
        import obstore

        with self._asking(name, "deleted"), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, checked_name(name))

    def sweep(self) -> None:
        """As `Storage.sweep`; the store keeps nothing that is not whole."""

    def append(self, name: str) -> None:
        """None: no object can be appended to."""

    def _asking(self, name: str, done: str) -> contextlib.AbstractContextManager[None]:
        return asking(f"{self._url}/{name}", done)


def is_url(place: str) -> bool:
    """Whether a place is a URL, which is then one of an object store."""
    return "://" in place and not place.startswith("file:")


def open_store(url: str) -> Any:
    """The store of the package obstore at a URL, which tries again what fails for `PATIENCE`.

    Credentials, region and endpoint come from the environment, as for the stores' own tools.

    Raises:
        UserError: if the URL is no object store's, or obstore is not installed.
    """
    if url.partition("://")[0] not in _SCHEMES:
        raise UserError(f"{url!r:.80} is no place; give a path, or {_words()}.")
    try:
        from obstore.store import from_url
    except ImportError:
        raise UserError(
            f"{url!r:.80} needs obstore: pip install '.[batch]', or give a path."
        ) from None
    plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    with asking(url, "opened"):
        return from_url(
            url,
            client_options={
                "allow_http": plain,
                "timeout": datetime.timedelta(seconds=2 * PATIENCE),  # a large part takes a while
            },
            retry_config={
                "retry_timeout": datetime.timedelta(seconds=PATIENCE),
                "max_retries": 100,
                "backoff": {"max_backoff": datetime.timedelta(seconds=5)},
            },
        )


def entries(store: Any, folder: str = "") -> Iterator[Mapping[str, Any]]:
    """What a store says of each object in a folder and those inside it: path, size, e_tag."""
    import obstore

    for page in obstore.list(store, folder or None):
        yield from cast(list[Mapping[str, Any]], page)


@contextlib.contextmanager
def asking(place: str, done: str) -> Iterator[None]:
    """Makes one UserError of all that a store raises within the context.

    Args:
        place: the URL of what is asked for.
        done: what cannot be done, such as "read".
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise UserError(f"{place} cannot be {done}: {_reason(error)}.") from error


def _patiently[T](call: Callable[[], T]) -> T:
    """What a call returns that may be done twice, tried for `PATIENCE` while replies are lost.

    The package itself repeats such calls only if the store says that it has not done them.
    """
    from obstore.exceptions import GenericError

    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except GenericError:
            if time.monotonic() > end:
                raise
        time.sleep(_PAUSE)


def _reason(error: Exception) -> str:
    """What a store's error says, without the debugging text that follows it."""
    text = " ".join(str(error).partition("\n")[0].split())
    return (text or type(error).__name__)[:300].rstrip(" .:")


def _words() -> str:
    return ", ".join(f"{scheme}://bucket/folder" for scheme in _SCHEMES)


def checked_name(name: str) -> str:
    """The name of a file in a storage, or else a ValueError: hidden parts are not listed."""
    parts = name.split("/")
    if not all(parts) or any(part.startswith(HIDDEN) for part in parts):
        raise ValueError(f"{name!r} is no name of a file in a storage")
    return name
