"""Gives this process blocks of a job to work on, and keeps what comes of them."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxmoe.batch.folder import Ended, JobFolder, Journal, part_name
from jaxmoe.batch.leases import LEASES, Leases
from jaxmoe.batch.manifest import Manifest, RowReader
from jaxmoe.batch.sources import Source


@dataclasses.dataclass(frozen=True)
class JobRow:
    """A row of the job.

    Attributes:
        number: from 1 on, in the job.
        file: the path of its file.
        line: its number there.
        content: one JSON object; characters stand for bytes, as in Latin-1.
        repeated: whether an earlier row has its id.
    """

    number: int
    file: str
    line: int
    content: str
    repeated: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows of a block that have to be answered in a round, in their order.

    Attributes:
        ended: the rows that an earlier run has answered.
    """

    block: int
    round: int
    rows: list[JobRow]
    ended: list[Ended]

    @property
    def name(self) -> str:
        """Names its part and its leases."""
        return part_name(self.block, self.round)


def decode_work(record: Any) -> Work:
    """The work whose `dataclasses.asdict` went through JSON."""
    rows = [JobRow(**row) for row in record.pop("rows")]
    ended = [Ended(*row) for row in record.pop("ended")]
    return Work(rows=rows, ended=ended, **record)


class _Taken(NamedTuple):
    """A block in work: its journal, and when it was taken, in seconds since 1970."""

    journal: Journal
    begun: float


class Worker:
    """Takes blocks that no living process has, and publishes their parts.

    Attributes:
        blocks: those of the job that this process may take.
        rows: how many rows they have.
        ended: how many of these had ended, of all processes, when `look` was called last.
        done: whether all had then.
    """

    def __init__(
        self,
        folder: JobFolder,
        manifest: Manifest,
        sources: Sequence[Source],
        leases: Leases,
        round_: int,
        blocks: Iterable[int],
    ):
        """Takes nothing yet.

        Args:
            round_: as `check_round` says.
        """
        self._folder, self._manifest, self._leases = folder, manifest, leases
        self._reader, self._round = RowReader(manifest, sources), round_
        self._repeated = frozenset(manifest.repeated)
        self.blocks = list(blocks)
        self.rows = sum(map(manifest.size, self.blocks))
        self.ended, self.done = 0, False
        self._unanswered: set[int] = set()  # blocks that have no part of an earlier round
        self._taken: dict[int, _Taken] = {}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        for taken in self._taken.values():
            taken.journal.close()

    def take(self) -> Work | None:
        """The next block; None if there is none that is free now.

        Raises:
            UserError: if rows cannot be read, or the storage refuses.
        """
        leased = self._folder.storage.names(LEASES)
        for block in self.look():
            name = part_name(block, self._round)
            if block in self._taken or not self._leases.take(name, leased):
                continue
            if self._folder.is_published(block, self._round):  # by a process that was just ahead
                self._leases.end(name, leased)
                continue
            return self._begin(block)
        return None

    def look(self) -> list[int]:
        """The blocks without a part of this round; counts the rows of the others."""
        parts = self._folder.parts()
        wanted = self.blocks
        self._unanswered = set(wanted) - parts.answered(self._round)
        if self._round:
            again = self._unanswered | parts.failed(self._round)
            wanted = [block for block in wanted if block in again]
        left = [block for block in wanted if (block, self._round) not in parts.answers]
        self.ended, self.done = self.rows - sum(map(self._manifest.size, left)), not left
        return left

    def _begin(self, block: int) -> Work:
        first = block * self._manifest.block + 1
        read = self._reader.read(block)
        rows = [
            JobRow(
                number, file, row.number, row.content.decode("latin-1"), number in self._repeated
            )
            for number, (file, row) in enumerate(read, start=first)
        ]
        if block not in self._unanswered:
            failed = self._folder.failed_rows(block, self._round)
            rows = [row for row in rows if row.number in failed]
        self._taken[block] = _Taken(self._folder.journal(block, self._round), time.time())
        kept = self._folder.journaled(block, self._round)
        return Work(
            block, self._round, rows, [kept[row.number] for row in rows if row.number in kept]
        )

    def keep(self, work: Work, ended: Ended) -> None:
        """Adds a row's line to the journal; killing the process does not lose it then."""
        self._taken[work.block].journal.write(ended)

    def publish(self, work: Work, ended: Sequence[Ended]) -> None:
        """Writes the part of work whose rows have all ended, in their order."""
        taken = self._taken[work.block]
        leased = self._folder.storage.names(f"{LEASES}{work.name}.")
        if self._leases.has(work.name, leased):
            self._folder.publish(work.block, work.round, ended, taken.begun)
            self._leases.end(work.name, leased)
        del self._taken[work.block]
        taken.journal.close()


def blocks_of(manifest: Manifest, shard: tuple[int, int]) -> list[int]:
    """The blocks of one of several shards of a job.

    Args:
        shard: its number from 0 on, and how many there are.
    """
    return list(range(shard[0], manifest.blocks, shard[1]))
