"""Between a job and the engine: rows become requests as rows of the batch get free, and end."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.batch.answering import Answering
from jaxmoe.batch.folder import Ended
from jaxmoe.batch.formats import Envelope
from jaxmoe.batch.job import Job
from jaxmoe.generation.jobs import RequestReader
from jaxmoe.generation.request import Request

IDLE = 0.5  # seconds between looks at a job whose last blocks other programs have
STEPS = 16  # the same while rows are in work; counted, so that a program's processes agree


class Feed:
    """Gives the engine the requests of a job, and the job the lines of their answers.

    Attributes:
        failed: the first row that failed, of those that this program ran; None if none did.
    """

    def __init__(
        self,
        job: Job,
        reader_of: Callable[[Path], RequestReader],
        *,
        stop: Callable[[], bool] = lambda: False,
        noticed: Callable[[Envelope], None] = lambda envelope: None,
        ended: Callable[[int], object] = lambda rows: None,
        ends_with_errors: bool = False,
    ):
        """Takes nothing yet.

        Args:
            job: which has been entered.
            reader_of: makes the reader of rows whose files are in a folder.
            stop: whether to take no more.
            noticed: called with the envelope of each row.
            ended: called with how many rows have ended since the last call, of all programs.
            ends_with_errors: whether a row that fails ends the rest early.
        """
        self._job, self._reader_of, self._stop = job, reader_of, stop
        self._ends_with_errors = ends_with_errors
        self._noticed, self._report = noticed, ended
        self._works: dict[str, Answering] = {}  # by the id of a request
        self._begun: list[Answering] = []  # those of them that have not ended
        self._reported = job.ended
        self._rests = 0  # steps until the next look
        self.failed: Ended | None = None

    def more(self, waits: bool) -> Sequence[Request]:
        """The requests of the next block that has any, as `generate_from` asks for them."""
        if not waits and self._rests:
            self._rests -= 1
            return ()
        while not self.stops():
            work = self._job.take()
            if work is not None:
                answering = Answering(work, self._reader_of, self._noticed, self._works)
                for row in answering.ended.values():
                    self._note(row)
                self._end(answering)
                if answering.requests:
                    return self._begin(answering)
            elif self._job.done or not waits:
                self._rests = STEPS
                break
            else:
                time.sleep(IDLE)
            self._count()
        return ()

    def stops(self) -> bool:
        """Whether to end early."""
        return self._stop() or (self._ends_with_errors and self.failed is not None)

    def _begin(self, answering: Answering) -> Sequence[Request]:
        self._works |= {str(request.id): answering for request in answering.requests}
        self._begun.append(answering)
        self._count()
        return answering.requests

    def take_in(self, record: dict[str, Any]) -> None:
        """Takes the record of an answer, as `jaxmoe.generation.jobs.finished` yields it.

        Once this returns, killing the program does not lose a row that ended with it.
        """
        answering = self._works.pop(str(record["id"]))
        row = answering.answered(record)
        if row is not None:
            self._job.keep(answering.work, row)
            self._note(row)
            self._end(answering)
            self._count()

    def _note(self, row: Ended) -> None:
        self.failed = self.failed or (row if row.failed else None)

    def _end(self, answering: Answering) -> None:
        if answering.is_done:
            self._job.publish(answering.work, list(answering.in_order))
            self._begun = [other for other in self._begun if other is not answering]

    def _count(self) -> None:
        known = self._job.ended + sum(len(answering.ended) for answering in self._begun)
        self._report(max(0, known - self._reported))
        self._reported = max(known, self._reported)
