"""A local stand-in for the hub: speaks the endpoints that huggingface_hub's downloads and uploads use."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WRITER = "hf_secretsecretsecret"
"""The token that may write, and see what is gated."""
PARQUET = "refs%2Fconvert%2Fparquet"
"""Where the hub exports the rows of a data set to, as it stands in addresses."""


@dataclass
class Hub:
    """What the server offers and what it was asked.

    Attributes:
        address: for HF_ENDPOINT.
        repositories: model id to the folder that holds its files.
        data_sets: the same for data sets.
        failures: answers of 503 before the next proper one.
        requests: "METHOD path" of every request.
        gated: models that only ``WRITER`` sees.
        sizes: files that claim to be larger than they are.
        cut: connections that break off in the middle of a file, before one that does not.
        lost: PUTs answered with 403, before one that is taken.
        made: repositories that were made: private or not, branches, tags, and files by branch.
        commits: commits of main of all models, the newest last.
        large: uploaded contents by their SHA-256.
        pushed: whether somebody pushes whenever a data set's main branch was asked for.
    """

    repositories: dict[str, Path]
    data_sets: dict[str, Path] = field(default_factory=dict)
    address: str = ""
    failures: int = 0
    requests: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    lost: int = 0
    made: dict[str, "Made"] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [COMMIT])
    large: dict[str, bytes] = field(default_factory=dict)
    pushed: bool = False

    def take(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        """Answers a request that writes."""
        if path.startswith("/lfs/"):
            if self.lost:
                self.lost -= 1
                return 403, {}, b"{}"
            self.large[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if path == "/api/validate-yaml":
            return 200, {}, b"{}"
        if token != f"Bearer {WRITER}":
            return 401, {}, b'{"error": "Invalid credentials"}'
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.made:
                return 409, {}, json.dumps({"url": f"{self.address}/{name}"}).encode()
            self.made[name] = Made(name, asked.get("private", asked.get("visibility") == "private"))
            return 200, {}, json.dumps({"url": f"{self.address}/{name}"}).encode()
        for name, made in self.made.items():
            if path == f"/{name}.git/info/lfs/objects/batch":
                return 200, {}, json.dumps({"objects": self._wanted(json.loads(body))}).encode()
            if path.startswith(f"/api/models/{name}/"):
                verb, _, rest = path.removeprefix(f"/api/models/{name}/").partition("/")
                return made.take(verb, rest, body, self)
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _wanted(self, asked: dict) -> list[dict]:
        objects = []
        for item in asked["objects"]:
            have = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.large:
                have["actions"] = {"upload": {"href": f"{self.address}/lfs/{item['oid']}"}}
            objects.append(have)
        return objects

    def answer(self, path: str, token: str = "") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self.failures:
            self.failures -= 1
            return 503, {}, b"{}"
        for name, made in self.made.items():
            if f"{path}/".startswith(f"/api/models/{name}/"):
                verb, _, rest = path.removeprefix(f"/api/models/{name}").strip("/").partition("/")
                return made.take(verb or "revision", rest, b"", self)
        for kind, names in (("models", self.repositories), ("datasets", self.data_sets)):
            for name, folder in names.items():
                found = self._of(path, kind, name, folder)
                if found is None:
                    continue
                if name in self.gated and "/resolve/" in path and token != f"Bearer {WRITER}":
                    return 401, {"X-Error-Code": "GatedRepo"}, b"{}"
                return found
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _of(
        self, path: str, kind: str, name: str, folder: Path
    ) -> tuple[int, dict[str, str], bytes] | None:
        files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
        as_json = {"Content-Type": "application/json"}
        about = f"/api/{kind}/{name}"
        asked = path.removeprefix(f"{about}/revision/")
        if path == about or asked in ("main", PARQUET, *self.commits):
            sha = asked if asked in self.commits else self.commits[-1]
            if self.pushed and path == about:
                self.commits.append(f"{len(self.commits):040x}")
            info = {"id": name, "sha": sha, "siblings": [{"rfilename": str(f)} for f in files]}
            return 200, as_json, json.dumps(info).encode()
        if path.removeprefix(f"{about}/paths-info/") in self.commits or path.startswith(
            f"{about}/tree/"
        ):
            below = unquote(path.partition("/tree/")[2].partition("/")[2])
            return 200, as_json, json.dumps(self._listed(folder, files, below)).encode()
        place = name if kind == "models" else f"datasets/{name}"
        for revision in ("main", PARQUET, *self.commits):
            sha = revision if revision in self.commits else self.commits[-1]
            start = f"/{place}/resolve/{revision}/"
            if path.startswith(start) and (folder / unquote(path.removeprefix(start))).is_file():
                body = (folder / unquote(path.removeprefix(start))).read_bytes()
                return (
                    200,
                    {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha},
                    body,
                )
            if path.startswith(start):
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b"{}"
        if f"/{kind}/{name}/" in path or path.startswith(f"/{place}/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return None

    def _listed(self, folder: Path, files: list[Path], below: str) -> list[dict]:
        """What stands in a folder of the repository, as the hub lists it: files and folders."""
        entries = {}
        for file in files:
            if file.is_relative_to(below or "."):
                name = str(Path(below) / file.relative_to(below or ".").parts[0])
                entries[name] = {"type": "directory", "path": name, "oid": "0"}
                if name == str(file):
                    entries[name] = {
                        "type": "file", "path": name, "size": (folder / file).stat().st_size, "oid": "0"
                    }  # fmt: skip
        return list(entries.values())


@dataclass
class Made:
    """A repository that an upload made.

    Attributes:
        name: hub id.
        private: whether it is.
        branches: branch to its files by path.
        tags: tag to the commit.
        heads: branch to its newest commit.
    """

    name: str
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    tags: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def take(
        self, verb: str, rest: str, body: bytes, hub: Hub
    ) -> tuple[int, dict[str, str], bytes]:
        """Answers a request for it."""
        if verb == "tree":
            files = self.branches[rest.partition("/")[0]]
            listed = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files]
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        if verb == "revision":
            about = {
                "id": self.name,
                "private": self.private,
                "sha": self.heads.get(rest or "main", "0" * 40),
            }
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps({**about, "siblings": []}).encode(),
            )
        if verb == "refs":
            tags = [
                {"name": n, "ref": f"refs/tags/{n}", "targetCommit": c}
                for n, c in self.tags.items()
            ]
            listed = {"branches": [], "converts": [], "tags": tags}
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        if verb == "tag" and json.loads(body)["tag"] in self.tags:
            return 409, {}, b"{}"
        if verb == "branch":
            self.branches.setdefault(rest, {})
        elif verb == "tag":
            self.tags[json.loads(body)["tag"]] = rest
        elif verb == "preupload":
            asked = json.loads(body)["files"]
            files = [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in asked
            ]  # fmt: skip
            return 200, {}, json.dumps({"files": files}).encode()
        elif verb == "commit":
            before = dict(self.branches[rest])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.branches[rest][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.branches[rest][value["path"]]
                elif line["key"] == "lfsFile":
                    self.branches[rest][value["path"]] = hub.large[value["oid"]]
            if before != self.branches[rest]:
                new = f"{len(self.heads) + len(self.tags) + 1:040x}"
                self.heads[rest] = new if rest in self.heads else COMMIT
            made = self.heads[rest]
            done = {
                "commitUrl": f"{hub.address}/{self.name}/commit/{made}", "commitOid": made, "success": True,
            }  # fmt: skip
            return 200, {}, json.dumps(done).encode()
        return 200, {}, b"{}"


@contextlib.contextmanager
def serve(repositories: dict[str, Path], data_sets: dict[str, Path] | None = None) -> Iterator[Hub]:
    """Runs the server for the length of the block."""
    hub = Hub(repositories, data_sets or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {self.path}")
            self.reply(*hub.answer(path, self.headers.get("Authorization", "")))

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            begin, total = 0, len(body)
            if status == 200 and "Range" in self.headers:
                begin = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
                status = 206
                headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            if self.command == "HEAD":
                total = hub.sizes.get(self.path.rpartition("/")[2], total)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(total - begin))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut and self.path.endswith(".safetensors"):
                hub.cut -= 1
                self.wfile.write(body[begin : begin + 100])
                self.close_connection = True
                return
            self.wfile.write(body[begin:])

        do_HEAD = do_GET

        def do_POST(self) -> None:
            size = self.headers.get("Content-Length")
            body = self.rfile.read(int(size)) if size else self.chunks()
            if "/paths-info/" in self.path:
                self.do_GET()
                return
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            self.reply(*hub.take(path, body, self.headers.get("Authorization", "")))

        do_PUT = do_POST

        def chunks(self) -> bytes:
            """A body sent in chunks."""
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

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
