"""Fetches a file from the network, with limits; only where the user allows it."""

import time
import urllib.error
import urllib.request
from http.client import HTTPException

from jaxmoe.errors import UserError

SECONDS = 60  # for the whole file
MAX_BYTES = 64 * 2**20

_PIECE = 2**16  # bytes that are read at once
_HANDLERS = (  # those of http and https alone: a redirection must not lead to a file or to ftp
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)


def fetch(url: str, name: str) -> bytes:
    """The content of an http or https URL.

    Args:
        url: the URL.
        name: of the picture, for error messages.

    Raises:
        UserError: if it cannot be had, is larger than `MAX_BYTES`, or takes more than `SECONDS`.
    """
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    end = time.monotonic() + SECONDS
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "jaxmoe"})
        with opener.open(request, timeout=SECONDS) as response:
            pieces, size = [], 0
            while piece := response.read1(_PIECE):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_BYTES:
                    raise UserError(f"{name} has more than {MAX_BYTES} bytes; get a smaller one.")
                if time.monotonic() > end:
                    raise UserError(f"{name} takes more than {SECONDS} s to fetch; save it before.")
    except UserError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UserError(f"{name} cannot be fetched: {reason:.200}; check its URL.") from None
    return b"".join(pieces)
