"""A stand-in for Google Cloud Storage: as much of its JSON API as gcsfs, TensorStore and google-cloud-storage use here,
over real HTTP. Objects lie in memory; writes are atomic and conditional on generations, as there. It knows no
permissions, quotas, delays or failures.

`python tests/fake_gcs.py` serves until its standard input ends, and prints its address first.
"""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)$")


@dataclass(frozen=True)
class Stored:
    data: bytes
    generation: int
    updated: str


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[tuple[str, str], Stored] = {}
        self.uploads: dict[str, tuple[str, str, str | None, bytes]] = {}
        self.lock = threading.Lock()
        self.numbers = count(1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """By which every library in a process comes here."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask the real service, by another protocol
        }

    def names(self, prefix: str = "") -> list[str]:
        """Of all objects: BUCKET/NAME."""
        with self.lock:
            return sorted(name for bucket, key in self.objects if (name := f"{bucket}/{key}").startswith(prefix))

    def write(self, bucket: str, name: str, data: bytes, match: str | None = None) -> dict[str, Any] | int:
        """What is written, or the status of a condition that does not hold."""
        with self.lock:
            there = self.objects.get((bucket, name))
            if match is not None and int(match) != (there.generation if there else 0):
                return 412
            stored = Stored(data, next(self.numbers), datetime.now(UTC).isoformat().replace("+00:00", "Z"))
            self.objects[bucket, name] = stored
        return told(bucket, name, stored)

    def delete(self, bucket: str, name: str, match: str | None = None) -> int:
        with self.lock:
            there = self.objects.get((bucket, name))
            if there is None:
                return 404 if match in (None, "0") else 412
            if match is not None and int(match) != there.generation:
                return 412
            del self.objects[bucket, name]
        return 204

    def listing(self, bucket: str, asked: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        items, prefixes = [], set()
        with self.lock:
            there = sorted(
                (name, o) for (b, name), o in self.objects.items() if b == bucket and name.startswith(prefix)
            )
        for name, stored in there:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            elif name >= asked.get("startOffset", "") and not ("endOffset" in asked and name >= asked["endOffset"]):
                items.append(told(bucket, name, stored))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


@contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread, to which every library in this process comes."""
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server
        server.shutdown()


def told(bucket: str, name: str, stored: Stored) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{stored.generation}",
        "bucket": bucket,
        "name": name,
        "size": str(len(stored.data)),
        "generation": str(stored.generation),
        "metageneration": "1",
        "updated": stored.updated,
        "timeCreated": stored.updated,
        "storageClass": "STANDARD",
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and data in one piece: apart, each answer waits 40 ms for the client's word of the first
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def tell(self, found: dict[str, Any] | int) -> None:
        if isinstance(found, int):
            words = {404: "No such object", 412: "conditionNotMet"}.get(found, "")
            error = {"error": {"code": found, "message": words, "errors": [{"message": words}]}}
            self.answer(found, b"" if found in (204, 304) else json.dumps(error).encode())
        else:
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {name: values[-1] for name, values in parse_qs(parts.query).items()}

    def do_GET(self) -> None:
        path, asked = self.asked()
        if found := OBJECT.match(path):
            self.read(unquote(found[1]), unquote(found[2]), asked, path.startswith("/download"))
        elif found := re.match(r"/storage/v1/b/([^/]+)/o/?$", path):
            self.tell(self.server.listing(unquote(found[1]), asked))
        elif found := re.match(r"/storage/v1/b/([^/]+)/?$", path):
            self.tell({"kind": "storage#bucket", "name": found[1], "id": found[1], "location": "NOWHERE"})
        else:
            self.tell(404)

    def read(self, bucket: str, name: str, asked: dict[str, str], media: bool) -> None:
        with self.server.lock:
            stored = self.server.objects.get((bucket, name))
        if stored is None:
            return self.tell(404)
        if (match := asked.get("ifGenerationMatch")) is not None and int(match) != stored.generation:
            return self.tell(412)
        if (match := asked.get("ifGenerationNotMatch")) is not None and int(match) == stored.generation:
            return self.tell(304)
        if not media and asked.get("alt") != "media":
            return self.tell(told(bucket, name, stored))
        data, size, headers = stored.data, len(stored.data), {"x_goog_generation": str(stored.generation)}
        part = re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", ""))
        if part is None:
            return self.answer(200, data, **headers)
        start, end = (int(part[1]), int(part[2] or size - 1)) if part[1] else (size - int(part[2]), size - 1)
        if start >= size:
            return self.answer(416, Content_Range=f"bytes */{size}")
        end = min(end, size - 1)
        self.answer(206, data[start : end + 1], Content_Range=f"bytes {start}-{end}/{size}", **headers)

    def do_DELETE(self) -> None:
        path, asked = self.asked()
        body, found = self.body(), OBJECT.match(path)
        assert not body
        match = asked.get("ifGenerationMatch")
        self.tell(self.server.delete(unquote(found[1]), unquote(found[2]), match) if found else 404)

    def do_POST(self) -> None:
        (path, asked), body = self.asked(), self.body()
        if path.startswith("/batch"):
            self.batch(body)
        elif "upload_id" in asked:
            self.go_on(asked, body)
        elif found := re.match(r"/upload/storage/v1/b/([^/]+)/o/?$", path):
            self.upload(unquote(found[1]), asked, body)
        elif found := re.match(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewrite|copy)To/b/([^/]+)/o/([^/]+)$", path):
            there, name, bucket, new = map(unquote, found.groups())
            with self.server.lock:
                stored = self.server.objects.get((there, name))
            made = self.server.write(bucket, new, stored.data) if stored else 404
            self.tell({"done": True, "resource": made} if isinstance(made, dict) and "rewriteTo" in path else made)
        elif found := re.match(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)$", path):
            self.move(*map(unquote, found.groups()))
        else:
            self.tell(404)

    def move(self, bucket: str, name: str, new: str) -> None:
        with self.server.lock:
            stored = self.server.objects.pop((bucket, name), None)
        self.tell(self.server.write(bucket, new, stored.data) if stored else 404)

    def upload(self, bucket: str, asked: dict[str, str], body: bytes) -> None:
        match, kind = asked.get("ifGenerationMatch"), asked["uploadType"]
        if kind == "media":
            return self.tell(self.server.write(bucket, asked["name"], body, match))
        if kind == "multipart":
            mark = re.search('boundary="?([^";]+)', self.headers["Content-Type"])
            assert mark
            about, rest = (part for part in body.split(b"--" + mark[1].encode(), 2)[1:])
            data = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1]
            data = data[: data.rindex(b"\n--" + mark[1].encode() + b"--")].removesuffix(b"\r")
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            return self.tell(self.server.write(bucket, name, data, match))
        name = asked.get("name") or json.loads(body)["name"]
        number = str(next(self.server.numbers))
        self.server.uploads[number] = bucket, name, match, b""
        self.answer(200, Location=f"{self.server.address}/upload/storage/v1/b/{bucket}/o?upload_id={number}")

    def do_PUT(self) -> None:
        (_, asked), body = self.asked(), self.body()
        self.go_on(asked, body)

    def go_on(self, asked: dict[str, str], body: bytes) -> None:
        """With a resumable upload."""
        bucket, name, match, before = self.server.uploads[asked["upload_id"]]
        data = before + body
        if self.headers["Content-Range"].endswith("/*"):  # more is to come
            self.server.uploads[asked["upload_id"]] = bucket, name, match, data
            return self.answer(308, Range=f"bytes=0-{len(data) - 1}")
        total = int(self.headers["Content-Range"].rpartition("/")[2])
        if len(data) < total:
            self.server.uploads[asked["upload_id"]] = bucket, name, match, data
            return self.answer(308, Range=f"bytes=0-{len(data) - 1}")
        self.tell(self.server.write(bucket, name, data, match))

    def batch(self, body: bytes) -> None:
        parts = []
        for bucket, name in re.findall(rb"DELETE /storage/v1/b/([^/]+)/o/([^ ?]+)[^ ]* HTTP", body):
            status = self.server.delete(unquote(bucket.decode()), unquote(name.decode()))
            parts.append(f"--end\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} .\r\n\r\n\r\n")
        self.answer(200, ("".join(parts) + "--end--").encode(), Content_Type="multipart/mixed; boundary=end")


if __name__ == "__main__":
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.address, flush=True)
        sys.stdin.read()
