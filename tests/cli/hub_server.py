"""A server of the Hugging Face hub's public HTTP interface for one data set, as far as streaming requires it."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "owner/name"
REVISION = "a" * 40
_API, _FILES = f"/api/datasets/{NAME}/", f"/datasets/{NAME}/resolve/"


@contextmanager
def hub(
    files: Mapping[str, bytes], *, gated: bool = False, revision: str = REVISION
) -> Iterator[tuple[str, list[str]]]:
    """Serve `files` (content by path) as the data set `owner/name`. Yields the address and the requests so far.

    gated: every file requires an account.
    """
    requests: list[str] = []

    class Handler(_Handler):
        content, is_gated, seen, commit = files, gated, requests, revision

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content: Mapping[str, bytes]
    is_gated: bool
    seen: list[str]
    commit: str

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.seen.append(f"{self.command} {path}")
        if path.startswith(f"{_API}tree/"):
            self._tree(path.removeprefix(f"{_API}tree/").partition("/")[2])
        elif path.startswith(_API):
            siblings = [{"rfilename": name} for name in self.content]
            self._json({"id": NAME, "sha": self.commit, "siblings": siblings})
        elif path.startswith(_FILES):
            self._file(path.removeprefix(_FILES).partition("/")[2], with_body=with_body)
        else:
            self._send(404, {"x-error-code": "RepoNotFound"})

    def _tree(self, folder: str) -> None:
        start = f"{folder}/" if folder else ""
        below = [name for name in self.content if name.startswith(start)]
        folders = {start + name.removeprefix(start).split("/")[0] for name in below} - set(below)
        entries = [{"type": "directory", "path": name, "size": 0, "oid": REVISION} for name in sorted(folders)]
        for name in below:
            if "/" not in name.removeprefix(start):
                size = len(self.content[name])
                entries.append({"type": "file", "path": name, "size": size, "oid": _digest(self.content[name])})
        self._json(entries) if entries else self._send(404, {"x-error-code": "EntryNotFound"})

    def _file(self, name: str, *, with_body: bool) -> None:
        if self.is_gated:
            self._send(401, {"x-error-code": "GatedRepo"})
        elif name not in self.content:
            self._send(404, {"x-error-code": "EntryNotFound"})
        else:
            body, code = self.content[name], 200
            headers = {"etag": f'"{_digest(body)}"', "x-repo-commit": self.commit, "accept-ranges": "bytes"}
            if asked := self.headers.get("range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                span = range(int(first), min(int(last or len(body)), len(body) - 1) + 1)
                headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{len(body)}"
                body, code = body[span.start : span.stop], 206
            self._send(code, headers, body, with_body=with_body)

    def _json(self, value: Any) -> None:
        self._send(200, {"content-type": "application/json"}, json.dumps(value).encode())

    def _send(self, code: int, headers: Mapping[str, str], body: bytes = b"", *, with_body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
