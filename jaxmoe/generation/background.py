"""Iterators that run in a thread while an event loop consumes what they yield."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_END = object()


class Background:
    """A thread that runs iterators, one at a time, in the order in which they were asked for."""

    def __init__(self):
        """Starts no thread yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxmoe")

    async def iterate(self, start: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:
        """Yields what an iterator yields that `start` makes in the thread.

        It runs on whether or not that is consumed. Where the consumer leaves or is cancelled, the
        iterator is closed after what it is about to yield; one that has not begun never does.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        left = threading.Event()

        def tell(item: Any, error: BaseException | None = None) -> None:
            if not left.is_set():
                loop.call_soon_threadsafe(queue.put_nowait, (item, error))

        future = self._thread.submit(_run, start, tell, left)
        try:
            while True:
                item, error = await queue.get()
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            left.set()
            future.cancel()


def _run(start: Callable[[], Any], tell: Callable[..., None], left: threading.Event) -> None:
    """Tells all that an iterator yields, then `_END`, or the error that it ends with."""
    try:
        with contextlib.closing(start()) as items:
            for item in items:
                tell(item)
                if left.is_set():
                    return
        tell(_END)
    except BaseException as error:
        tell(None, error)
