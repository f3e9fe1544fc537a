"""A local stand-in for the hub: speaks the endpoints that huggingface_hub's downloads use, over loopback."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server offers and what it was asked.

    Attributes:
        address: for HF_ENDPOINT.
        repositories: model id to the folder that holds its files.
        data_sets: the same for data sets.
        failures: answers of 503 before the next proper one.
        requests: "METHOD path" of every request.
    """

    repositories: dict[str, Path]
    data_sets: dict[str, Path] = field(default_factory=dict)
    address: str = ""
    failures: int = 0
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self.failures:
            self.failures -= 1
            return 503, {}, b"{}"
        for kind, names in (("models", self.repositories), ("datasets", self.data_sets)):
            for name, folder in names.items():
                found = self._of(path, kind, name, folder)
                if found is not None:
                    return found
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _of(self, path: str, kind: str, name: str, folder: Path) -> tuple[int, dict[str, str], bytes] | None:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        as_json = {"Content-Type": "application/json"}
        about = f"/api/{kind}/{name}"
        if path in (about, f"{about}/revision/main", f"{about}/revision/{COMMIT}"):
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
            return 200, as_json, json.dumps(info).encode()
        if path == f"{about}/paths-info/{COMMIT}" or path.startswith(f"{about}/tree/"):
            listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files]
            return 200, as_json, json.dumps(listed).encode()
        place = name if kind == "models" else f"datasets/{name}"
        for revision in ("main", COMMIT):
            start = f"/{place}/resolve/{revision}/"
            if path.startswith(start) and (folder / path.removeprefix(start)).is_file():
                body = (folder / path.removeprefix(start)).read_bytes()
                return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body
            if path.startswith(start):
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}"
        if f"/{kind}/{name}/" in path or path.startswith(f"/{place}/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return None


@contextlib.contextmanager
def serve(repositories: dict[str, Path], data_sets: dict[str, Path] | None = None) -> Iterator[Hub]:
    """Runs the server for the length of the block."""
    hub = Hub(repositories, data_sets or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path.partition("?")[0])
            begin = 0
            if status == 200 and "Range" in self.headers:
                begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
                status = 206
                headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[begin:])

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
