"""A batch job: rows of many files, answered once each by any number of programs that come and go.

All state is in the job's folder (`jaxmoe.batch.folder`), which every program sees. Where a program
has several processes the first one reads and writes, and tells the others what to work on.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxmoe.batch.folder import Ended, JobFolder, check_round
from jaxmoe.batch.leases import EXPIRY, Leases
from jaxmoe.batch.manifest import Manifest, make_manifest, open_manifest
from jaxmoe.batch.sources import find_sources, outside
from jaxmoe.batch.storage import storage_of
from jaxmoe.batch.work import Work, Worker, blocks_of, decode_work
from jaxmoe.processes import is_first, on_first

AGAIN = 2.0  # seconds after which free blocks are looked for again where there were none


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """What a program says of a job, beside its settings and inputs.

    Attributes:
        form: of the files of answers.
        limit: rows of the job, at most; None for all.
        block: rows that are taken at once; None leaves it to the number of rows.
        shard: the blocks that this program may take: which of how many shares.
        retry: whether failed rows run again.
        expiry: seconds without a sign of life, after which a program's blocks are free.
    """

    form: Literal["jsonl", "parquet"] = "jsonl"
    limit: int | None = None
    block: int | None = None
    shard: tuple[int, int] = (0, 1)
    retry: bool = False
    expiry: float = EXPIRY


class Job:
    """A context in which this program takes part in a job.

    Attributes:
        rows: how many rows its blocks have.
        ended: how many of these have ended, of all programs, as it last saw.
        done: whether all had ended then.
    """

    def __init__(
        self,
        place: str,
        digest: str,
        inputs: Sequence[str],
        options: JobOptions = JobOptions(),
        read: Callable[[int, int], object] = lambda done, total: None,
    ):
        """Opens nothing yet.

        Args:
            place: the folder, a path or a URL.
            digest: of the settings that answers depend on.
            inputs: paths, patterns and URLs of files with rows.
            read: called while the rows are read for the first time, with how many bytes of how many
                were; of compressed files it may be more.
        """
        self._place, self._digest, self._inputs = place, digest, inputs
        self._options, self._read = options, read
        self.rows = self.ended = 0
        self.done = False
        self._folder: JobFolder | None = None  # of the first process, as the next two
        self._leases: Leases | None = None
        self._worker: Worker | None = None
        self._looked = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Job":
        """Reads the job's folder, or makes it.

        Raises:
            UserError: if an input or the folder cannot be used, or it is of another job.
        """
        with contextlib.ExitStack() as stack:
            self._update(on_first(lambda: self._open(stack)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        """Gives back what was taken and has not ended; its rows that have are kept."""
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        options, storage = self._options, storage_of(self._place)
        sources = outside(find_sources(self._inputs), self._place)

        def make() -> Manifest:
            sizes = {"limit": options.limit, "block": options.block}
            return make_manifest(self._digest, sources, read=self._read, **sizes)

        manifest = open_manifest(storage, self._digest, sources, make)
        self._leases = leases = stack.enter_context(Leases(storage, options.expiry))
        self._folder = folder = JobFolder(storage, options.form, leases.owner)
        blocks = blocks_of(manifest, options.shard)
        round_ = check_round(folder, folder.parts(), blocks, options.retry)
        self._worker = stack.enter_context(
            Worker(folder, manifest, sources, leases, round_, blocks)
        )
        self._worker.look()
        return self._state()

    def _state(self) -> dict[str, Any]:
        assert self._worker is not None
        return {name: getattr(self._worker, name) for name in ("rows", "ended", "done")}

    def _update(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def take(self) -> Work | None:
        """The next block; None if there is none that is free now.

        Raises:
            UserError: if rows cannot be read, or the folder cannot be written.
        """
        found = on_first(self._take)
        self._update(found["state"])
        return decode_work(found["work"]) if found["work"] else None

    def _take(self) -> dict[str, Any]:
        assert self._worker is not None
        work = None
        if time.monotonic() - self._looked > AGAIN:
            work = self._worker.take()
            self._looked = 0.0 if work is not None else time.monotonic()
        return {"work": work and dataclasses.asdict(work), "state": self._state()}

    def keep(self, work: Work, ended: Ended) -> None:
        """Keeps a row's line of output; killing the program does not lose it then."""
        if is_first():
            assert self._worker is not None
            self._worker.keep(work, ended)

    def publish(self, work: Work, ended: Sequence[Ended]) -> None:
        """Writes the part of work whose rows have all ended, in their order."""
        if is_first():
            assert self._worker is not None
            self._worker.publish(work, ended)

    def summarize(self) -> dict[str, Any]:
        """The report of the job, which is written to its folder with a picture."""

        def summarize() -> dict[str, Any]:
            assert self._folder is not None and self._leases is not None
            self._leases.sweep()
            return self._folder.summarize()

        return on_first(summarize)
