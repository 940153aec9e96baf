"""A web server on this machine: plain files and pages that list folders, as nginx and Python's own server give them."""

import os
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """What a server is asked for, and how it answers."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    """Paths as they were asked for."""
    knows_ranges: bool = True
    statuses: dict[str, int] = field(default_factory=dict)
    """Answers to paths that are not the file."""
    cut: set[str] = field(default_factory=set)
    """Paths of which half is sent, after which the connection is closed."""


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, served: Served, directory: str) -> None:
        self.served = served
        super().__init__(*arguments, directory=directory)

    def do_GET(self) -> None:
        self.served.requests.append(self.path)
        if (status := self.served.statuses.get(self.path)) is not None:
            self.send_error(status)
            return
        path = Path(self.translate_path(self.path))
        told = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not path.is_file() or not (self.path in self.served.cut or (told and self.served.knows_ranges)):
            super().do_GET()
            return
        data = path.read_bytes()
        begin, end = (int(told[1]), min(int(told[2]) + 1, len(data))) if told else (0, len(data))
        self.send_response(206 if told else 200)
        if told:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        end = (begin + end) // 2 if self.path in self.served.cut else end
        self.wfile.write(data[begin:end])
        self.close_connection = True

    def do_HEAD(self) -> None:
        if (status := self.served.statuses.get(self.path)) is not None:
            self.send_error(status)
            return
        super().do_HEAD()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Generator[Served]:
    """Serve a folder on the loopback interface until the block ends."""
    served = Served()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, served=served, directory=os.fspath(folder)))
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
