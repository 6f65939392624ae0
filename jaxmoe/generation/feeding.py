"""Generation from requests that come while others run, as those of a long job do."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxmoe.config import Llama4Config
from jaxmoe.generation.completion import CompletionToken
from jaxmoe.generation.engine import Engine
from jaxmoe.generation.request import Request

More = Callable[[bool], Sequence[Request]]


def generate_from(
    config: Llama4Config,
    params: dict,
    more: More,
    *,
    rows: int = 8,
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Iterator[CompletionToken]:
    """Runs requests on the current mesh as they come; yields tokens, requests interleaved.

    A request that is too long for the cache waits until all before it have ended; the cache is then
    made anew, as long as it needs. So memory does not grow with the number of requests.

    Args:
        more: the next requests, which fit the context and have their sampling; none if there are
            none now. It is told whether nothing runs: then it waits, and returns none at the end.
        rows: requests that are in work at once, at most.
        stop: asked once before each step whether to end early.
        options: others of `jaxmoe.generate`, but no document.

    Raises:
        UserError: as `jaxmoe.generate`.
    """
    stopped = False

    def asked() -> bool:
        nonlocal stopped
        stopped = stopped or stop()
        return stopped

    longer = list(more(True))
    while longer and not stopped:
        engine = Engine(config, params, longer, rows=rows, grows=True, **options)
        longer = []

        def feed(engine: Engine = engine, longer: list[Request] = longer) -> list[Request]:
            found = [] if longer else more(False)
            longer += [request for request in found if not engine.fits(request)]
            return [request for request in found if engine.fits(request)]

        yield from engine.run(asked, feed)
        del engine, feed  # and its cache, before there is another one
        longer = longer or ([] if stopped else list(more(True)))
