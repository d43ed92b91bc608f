"""A web server whose files end late, trickle, or are longer than it said."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MOST_SENT = 200 * 2**20
"""Where even what never ends does end, so that a reader that reads on fails instead of hanging."""
MOST_TRICKLED = 100
_PIECE = b" " * 2**16
_TRICKLE_SECONDS = 0.01


@dataclass
class EndlessServer:
    """Serves a folder; the faults of a path are those named for it, none at first."""

    url: str = ""
    endless: set[str] = field(default_factory=set)
    """Goes on after its contents."""
    trickled: set[str] = field(default_factory=set)
    """Comes a byte at a time, after its headers."""
    never_answered: set[str] = field(default_factory=set)
    """Its headers come a byte at a time."""
    forbidden: set[str] = field(default_factory=set)
    sent: int = 0
    """Bytes of endless files, counted as they go out."""
    stopping: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[EndlessServer]:
    """Serves the files of a folder at `url`, by names such as `index.json`; "" is the listing."""
    state = EndlessServer()

    class Handler(_Handler):
        server_state = state

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield state
        finally:
            state.stopping.set()
            server.shutdown()
            thread.join()


class _Handler(SimpleHTTPRequestHandler):
    server_state: EndlessServer

    def do_HEAD(self) -> None:
        with contextlib.suppress(OSError):
            if self._name in self.server_state.never_answered:
                self._trickle(b"HTTP/1.0 200 OK\r\nX-Padding: " + b"x" * MOST_TRICKLED)
            else:
                super().do_HEAD()

    def do_GET(self) -> None:
        state = self.server_state
        with contextlib.suppress(OSError):  # the client has hung up, as it should
            if self._name in state.never_answered:
                self._trickle(b"HTTP/1.0 200 OK\r\nX-Padding: " + b"x" * MOST_TRICKLED)
            elif self._name in state.forbidden:
                self.send_error(403)
            else:
                super().do_GET()

    @property
    def _name(self) -> str:
        return self.path.strip("/")

    def send_header(self, keyword: str, value: str) -> None:
        endless = self._name in self.server_state.endless
        # to a HEAD what never ends tells the length that it should have
        if not endless or keyword != "Content-Length" or self.command == "HEAD":
            super().send_header(keyword, value)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        state, contents = self.server_state, source.read()
        if self._name in state.trickled:
            self._trickle(contents)
            return
        outputfile.write(contents)
        own = 0
        while self._name in state.endless and own < MOST_SENT and not state.stopping.is_set():
            outputfile.write(_PIECE)
            own += len(_PIECE)
            state.sent += len(_PIECE)

    def _trickle(self, contents: bytes) -> None:
        for place in range(min(len(contents), MOST_TRICKLED)):
            self.wfile.write(contents[place : place + 1])
            self.wfile.flush()
            if self.server_state.stopping.wait(_TRICKLE_SECONDS):
                return

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""
