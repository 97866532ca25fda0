"""A hub of models on this machine: the few endpoints of the real one that loading and pushing ask for."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub(ThreadingHTTPServer):
    """Models are {name: {revision: {file: bytes}}}; `asked` are (path, Authorization) of all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, revision: str, directory: Path) -> None:
        files = {
            file.relative_to(directory).as_posix(): file.read_bytes()
            for file in Path(directory).rglob("*")
            if file.is_file()
        }
        self.models.setdefault(name, {"main": {}})[revision] = files


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._note()
        path = self.path.split("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"] and path[4:5] in ([], ["revision"]):
            self._describe("/".join(path[2:4]), path[5] if path[4:] else "main")
        elif path[4:5] == ["tree"]:  # of a folder: no model here has any
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        elif path[2:3] == ["resolve"]:
            self._send_file("/".join(path[:2]), path[3], "/".join(path[4:]))
        else:
            self._send(404)

    def do_POST(self) -> None:
        self._note()
        path = self.path.split("?")[0].strip("/").split("/")
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        if path == ["api", "repos", "create"]:
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            self.server.models.setdefault(name, {"main": {}})
            self._send_json({"url": f"{self.server.url}/{name}"})
        elif path == ["api", "validate-yaml"]:
            self._send_json({"errors": [], "warnings": []})
        elif path[4:5] == ["branch"]:
            self.server.models["/".join(path[2:4])].setdefault(path[5], {})
            self._send_json({})
        elif path[4:5] == ["preupload"]:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._send_json({"files": modes})
        elif path[4:5] == ["commit"]:
            name, revision = "/".join(path[2:4]), path[5]
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            files = self.server.models[name].setdefault(revision, {})
            files |= {value["path"]: base64.b64decode(value["content"]) for value in values}
            commit = _commit(name, revision, files)
            url = f"{self.server.url}/{name}/commit/{commit}"
            self._send_json({"commitUrl": url, "commitOid": commit})
        else:
            self._send(404)

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for known, files in self.server.models.get(name, {}).items():
            commit = _commit(name, known, files)
            if revision in (known, commit):
                return commit, files
        return None

    def _describe(self, name: str, revision: str) -> None:
        found = self._find(name, revision)
        if found is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound" if name in self.server.models else "RepoNotFound"})
        else:
            commit, files = found
            self._send_json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})

    def _send_file(self, name: str, revision: str, file: str) -> None:
        found = self._find(name, revision)
        if found is None:
            self._send(404, {"X-Error-Code": "RevisionNotFound" if name in self.server.models else "RepoNotFound"})
        elif file not in found[1]:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
        else:
            content = found[1][file]
            tag = hashlib.sha256(content).hexdigest()
            self._send(200, {"X-Repo-Commit": found[0], "ETag": f'"{tag}"'}, content)

    def _send_json(self, content: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _send(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _note(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))

    def log_message(self, *_: object) -> None:
        pass


def _commit(name: str, revision: str, files: dict[str, bytes]) -> str:
    parts = [name, revision, *(part for file in sorted(files.items()) for part in (file[0], file[1].hex()))]
    return hashlib.sha1("\0".join(parts).encode()).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
