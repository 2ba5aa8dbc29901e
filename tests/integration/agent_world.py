"""What tests of real agent processes share: origin, standalone agent, pretended operator."""

from __future__ import annotations

import base64
import hashlib
import http.client
import http.server
import json
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from tests.harness.installation import Answer, ask
from tests.harness.process import Child, environment, free_port, is_listening
from tests.unit.agent.certificates import AGENT, Authority, Leaf, client_context, write_tls_dir

from blobcache_api.agent import DesiredState, dump_for_push, seal_config, seal_state

START_TIMEOUT_SECONDS = 30.0
REPOSITORY_ROOT = Path(__file__).resolve().parents[2]


def content(name: str, size: int) -> bytes:
    """Return the bytes a blob of this name has; no two pieces are alike."""
    seed = hashlib.sha256(name.encode()).digest()
    blocks = (
        hashlib.sha256(seed + index.to_bytes(8, "big")).digest() for index in range(size // 32 + 1)
    )
    return b"".join(blocks)[:size]


class Origin:
    """An HTTP server with ranges and entity tags, which counts, and is slow or strict on demand."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.authorization: str | None = None
        """What requests must show, if anything."""
        self.pause_seconds = 0.0
        """Between pieces of 64 KiB."""
        origin = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                origin._answer(self, has_body=True)

            def do_HEAD(self) -> None:
                origin._answer(self, has_body=False)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Origin:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: http.server.BaseHTTPRequestHandler, *, has_body: bool) -> None:
        self.requests.append(request.path)
        if self.authorization and request.headers.get("Authorization") != self.authorization:
            self._send_empty(request, 401)
            return
        blob = self.blobs.get(request.path.removeprefix("/"))
        if blob is None:
            self._send_empty(request, 404)
            return
        first, last, status = 0, len(blob) - 1, 200
        asked = request.headers.get("Range", "").removeprefix("bytes=")
        if asked:
            start, _, end = asked.partition("-")
            status = 206
            if start:
                first, last = int(start), min(int(end or last), last)
            else:
                first = max(0, len(blob) - int(end))
            if first > last:
                self._send_empty(request, 416, {"Content-Range": f"bytes */{len(blob)}"})
                return
        body = blob[first : last + 1]
        request.send_response(status)
        request.send_header("ETag", f'"{hashlib.sha256(blob).hexdigest()[:16]}"')
        request.send_header("Content-Length", str(len(body)))
        if status == 206:
            request.send_header("Content-Range", f"bytes {first}-{last}/{len(blob)}")
        request.end_headers()
        if has_body:
            self._send_body(request, body)

    def _send_body(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        try:
            for offset in range(0, len(body), 65536):
                request.wfile.write(body[offset : offset + 65536])
                time.sleep(self.pause_seconds)
        except OSError:
            request.close_connection = True

    @staticmethod
    def _send_empty(
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()


@dataclass
class Standalone:
    """A `blobcache-agent standalone`; its ports and cache outlive restarts."""

    folder: Path
    files: Sequence[Path]
    extra: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)
    child: Child | None = None

    @property
    def cache_root(self) -> Path:
        """Where the cache is."""
        return self.folder / "cache"

    @property
    def log(self) -> Path:
        """Both output streams of all its lives."""
        return self.folder / "agent.log"

    def run(self) -> Child:
        """Start it and do not wait."""
        self.child = Child(
            [
                *(sys.executable, "-m", "blobcache_agent", "standalone"),
                f"--cache-root={self.cache_root}",
                "--min-free=1Mi",
                f"--listen=127.0.0.1:{self.port}",
                f"--health-listen=127.0.0.1:{self.health_port}",
                *self.extra,
                *map(str, self.files),
            ],
            log=self.log,
            env=environment(),
            cwd=self.folder,
        )
        return self.child

    def start(self) -> Child:
        """Start it and wait until it listens."""
        child = self.run()
        child.wait_until(lambda: is_listening(self.port), timeout=START_TIMEOUT_SECONDS)
        return child

    def stop(self) -> int:
        """End it with SIGTERM and return its exit code."""
        assert self.child is not None
        self.child.stop(timeout=30)
        code = self.child.returncode
        assert code is not None
        return code

    def read(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        """GET `/v1/blobs/{path}`."""
        return ask(f"http://127.0.0.1:{self.port}/v1/blobs/{path}", headers=headers)

    def health(self, path: str) -> Answer:
        """GET a path of the health port."""
        return ask(f"http://127.0.0.1:{self.health_port}{path}")


def config_yaml(
    name: str, backend: dict[str, Any], namespace: str = "default", **sections: Any
) -> str:
    """Return a BlobCacheConfig as YAML (JSON is YAML)."""
    return json.dumps(
        {
            "apiVersion": "blobcache.dev/v1alpha1",
            "kind": "BlobCacheConfig",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"backend": backend, **sections},
        }
    )


def http_backend(origin: Origin, **extra: Any) -> dict[str, Any]:
    """Return the backend section for an origin."""
    return {"type": "HTTPProxy", "httpProxy": {"address": origin.url}, **extra}


def local_backend(directory: Path) -> dict[str, Any]:
    """Return the backend section for a directory."""
    return {"type": "LocalFS", "localFS": {"directory": str(directory)}}


class Readers:
    """Issues readers' tokens as a cluster's API server does."""

    issuer = "https://kubernetes.default.svc.cluster.local"

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    @property
    def jwks(self) -> dict[str, Any]:
        """The public key set."""
        numbers = self._key.public_key().public_numbers()
        point = {"x": _base64(numbers.x.to_bytes(32)), "y": _base64(numbers.y.to_bytes(32))}
        key = {"kty": "EC", "crv": "P-256", "kid": "k", "use": "sig", "alg": "ES256"}
        return {"keys": [{**key, **point}]}

    def token(self, namespace: str) -> str:
        """Return a token of a pod of that namespace."""
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": ["blobcache.dev"],
            "iat": now,
            "nbf": now,
            "exp": now + 3600,
            "sub": f"system:serviceaccount:{namespace}:default",
            "kubernetes.io": {"namespace": namespace},
        }
        head = _base64(json.dumps({"alg": "ES256", "kid": "k"}).encode())
        signed = f"{head}.{_base64(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64(r.to_bytes(32) + s.to_bytes(32))}"


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def pushed(
    name: str, backend: dict[str, Any], *, namespace: str = "demo", **extra: Any
) -> dict[str, Any]:
    """Return a config as it is pushed; `spec` adds sections beside the backend."""
    spec = {"backend": backend, **extra.pop("spec", {})}
    return {
        "namespace": namespace,
        "name": name,
        "uid": f"uid-{namespace}-{name}",
        "generation": 1,
        "spec": spec,
        **extra,
    }


class Operator:
    """Speaks the operator's side of the control API to one agent."""

    def __init__(self, folder: Path, node: str, port: Callable[[], int]) -> None:
        self.authority = Authority()
        self.readers = Readers()
        self.tls_dir = write_tls_dir(
            folder / "agent-tls", self.authority.certificate, self.authority.agent()
        )
        self._folder = folder / "client"
        self._node = node
        self._port = port

    def state(
        self, epoch: int, revision: int, *configs: dict[str, Any], **extra: Any
    ) -> DesiredState:
        """Return a sealed state."""
        plain = DesiredState.model_validate(
            {
                "epoch": epoch,
                "revision": revision,
                "node": self._node,
                "configs": list(configs),
                "jwks": self.readers.jwks,
                "issuer": self.readers.issuer,
                **extra,
            }
        )
        sealed = tuple(seal_config(config, secret_version="1") for config in plain.configs)
        return seal_state(plain.model_copy(update={"configs": sealed}))

    def push(
        self, epoch: int, revision: int, *configs: dict[str, Any], **extra: Any
    ) -> tuple[int, dict[str, Any]]:
        """Push a state and return status and answer."""
        state = self.state(epoch, revision, *configs, **extra)
        return self.ask("PUT", "/v1/state", dump_for_push(state))

    def report(self, wait: int = 0, after: int | None = None) -> dict[str, Any]:
        """Return a report."""
        query = f"wait={wait}" + (f"&after={after}" if after is not None else "")
        status, body = self.ask("GET", f"/v1/report?{query}")
        assert status == 200, body
        return body

    def config_report(self, name: str) -> dict[str, Any]:
        """Return one config's part of a report."""
        return next(found for found in self.report()["configs"] if found["name"] == name)

    def evict(self, *victims: dict[str, Any]) -> list[dict[str, Any]]:
        """Ask for evictions and return the results."""
        status, body = self.ask(
            "POST", "/v1/evictions", json.dumps({"victims": list(victims)}).encode()
        )
        assert status == 200, body
        results: list[dict[str, Any]] = body.get("results", [])
        return results

    def ask(
        self, method: str, path: str, body: bytes | None = None, leaf: Leaf | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Ask once, as the operator unless another certificate is given."""
        context = client_context(
            self._folder, self.authority.certificate, leaf or self.authority.operator()
        )
        connection = _NamedConnection(self._port(), context)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


class _NamedConnection(http.client.HTTPSConnection):
    """Dials loopback and expects the agents' common name."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__("127.0.0.1", port, context=context, timeout=70)
        self._named_context = context

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        plain = self.sock
        try:
            self.sock = self._named_context.wrap_socket(plain, server_hostname=AGENT)
        except OSError:
            plain.close()
            raise
