"""An object store on this machine: moto's S3, behind a proxy that can fail as networks do."""

import contextlib
import http.client
import http.server
import itertools
import logging
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server.

    Attributes:
        faults: what befalls the next requests of a method, first to last: "busy" is a reply 503,
            "lost" a request that is done and has no reply, "slow" one that takes a while.
        asked: the methods of all requests so far.
    """

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.faults, self.asked = port, {}, []

    def handle_error(self, request, client_address):
        """Says nothing of connections that this proxy has cut."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(self.command)
        faults = self.server.faults.get(self.command, [])
        fault = faults.pop(0) if faults else "ok"
        if fault == "slow":
            time.sleep(0.3)
        if fault == "busy":
            return self._reply(503, {}, b"")
        server = http.client.HTTPConnection("127.0.0.1", self.server.port)
        with contextlib.closing(server):
            server.request(self.command, self.path, body, dict(self.headers))
            reply = server.getresponse()
            content = reply.read()
        if fault == "lost":
            self.close_connection = True
            return self.connection.close()
        self._reply(reply.status, dict(reply.getheaders()), content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

    def _reply(self, status, headers, content):
        self.send_response_only(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(content)
        kept = {k: v for k, v in headers.items() if k.title() not in _HOP}
        for name, value in (kept | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


_NUMBERS = itertools.count()  # of buckets
_HOP = ("Content-Length", "Transfer-Encoding", "Connection")


@pytest.fixture(scope="session")
def proxy() -> Iterator[Proxy]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    front = Proxy(moto.get_host_and_port()[1])
    threading.Thread(target=front.serve_forever, daemon=True).start()
    yield front
    front.shutdown()
    moto.stop()


@pytest.fixture
def store(proxy, monkeypatch) -> str:
    """The URL of an empty folder on the store, which fails as `proxy.faults` says."""
    endpoint = f"http://127.0.0.1:{proxy.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    proxy.faults.clear()
    bucket = f"bucket-{next(_NUMBERS)}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).read()
    proxy.asked.clear()
    return f"s3://{bucket}/some/folder"
