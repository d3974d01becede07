"""Show runs in a browser while they train: the page of `hark report`, which follows the runs.

    hark watch RUN [RUN ...] [--port 8765]

It answers this machine alone. To look from another one, forward the port: ssh -L 8765:localhost:8765 MACHINE
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from hark.data.errors import DataError
from hark.launch.common.entry import run
from hark.launch.page.collect import Bounds, Collection
from hark.launch.page.document import as_json, document, policy
from hark.launch.report import add_bounds
from hark.shown import say

# Names by which a browser may ask; another would be that of a foreign page. A forwarded port may be another.
HOSTS = ("localhost", "127.0.0.1")


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)  # the run needs the others
    bounds = Bounds(arguments.steps, arguments.groups, arguments.clips, arguments.questions)
    with server(Collection(arguments.runs, bounds), arguments.port) as serving:
        say(f"http://localhost:{serving.server_address[1]}/ follows the run; Ctrl-C ends it")
        serving.serve_forever()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the run.directory of a training run")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    add_bounds(parser)
    return parser.parse_args(argv)


class Server(ThreadingHTTPServer):
    """Serves one collection on the loopback interface."""

    daemon_threads = True

    def __init__(self, collection: Collection, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.collection, self.lock = collection, Lock()

    def answer(self, path: str) -> tuple[str, str] | None:
        """The type and the text of what a path names; None if it names nothing. No path is one of a file."""
        if path == "/":
            return "text/html", document({"live": True}, {}, connect="'self'")
        name = path.removeprefix("/").removesuffix(".json")
        with self.lock:
            value = self._live() if path == "/main.json" else self.collection.part(name)
        return None if value is None or not path.endswith(".json") else ("application/json", as_json(value))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves before it has read its answer is no error; others are printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def _live(self) -> dict[str, Any]:
        return self.collection.main() | {"live": True}


class Handler(BaseHTTPRequestHandler):
    """Answers GET alone, to a browser on this machine alone."""

    server: Server
    server_version, sys_version = "hark", ""
    timeout = 10.0  # seconds without a byte from who has connected, or into what is not read

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0] not in HOSTS:
            self.send_error(HTTPStatus.FORBIDDEN, f"this server answers only to {' and '.join(HOSTS)}")
            return
        found = self.server.answer(self.path)
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND, "there is no such part")
            return
        self._send(*found)

    def _send(self, kind: str, text: str) -> None:
        """Send a text, or say that the browser has it already."""
        body = text.encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        known = self.headers.get("If-None-Match") == tag
        self.send_response(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK)
        self.send_header("ETag", tag)
        if not known:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not known:
            self.wfile.write(body)

    def end_headers(self) -> None:
        """Every answer, errors too, forbids what the page does not need."""
        self.send_header("Content-Security-Policy", policy(connect="'self'") + "; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing for each request."""


def server(collection: Collection, port: int) -> Server:
    """The server on a port of the loopback interface. Raises DataError if the port is taken."""
    try:
        return Server(collection, port)
    except (OSError, OverflowError) as error:
        raise DataError(f"--port {port}: cannot be used ({error}); choose another, or 0 for a free one") from error


if __name__ == "__main__":
    run(main)
