"""A registry that misbehaves on purpose: tokens, private repositories, wrong bytes, silence."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def digest_of(data: bytes) -> str:
    """Return the OCI digest of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def basic(user: str) -> str:
    """Return the Authorization header of a user of the registry; the password is `secret-USER`."""
    return "Basic " + base64.b64encode(f"{user}:secret-{user}".encode()).decode()


def manifest_of(*layers: bytes, **more: object) -> bytes:
    """Return an OCI manifest without a media type of its own."""
    described = [
        {"mediaType": "application/octet-stream", "digest": digest_of(layer), "size": len(layer)}
        for layer in layers
    ]
    body = {"schemaVersion": 2, "config": described[:1], "layers": described, **more}
    return json.dumps(body).encode()


@dataclass(frozen=True)
class Seen:
    """One request that arrived."""

    method: str
    path: str
    authorization: str | None


@dataclass
class FakeRegistry:
    """Speaks tokens: `Bearer USER` after `Basic USER` at its realm, `Bearer nobody` for others."""

    host: str = ""
    blobs: dict[tuple[str, str], bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[bytes, str]] = field(default_factory=dict)
    """By repository and digest: what is sent, and as what."""
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    private: dict[str, set[str]] = field(default_factory=dict)
    """Repositories and who may pull from them."""
    status: int | None = None
    """Answered to everything, if set."""
    tells_digests: bool = True
    storage: str = ""
    """Where blobs are redirected to, if anywhere."""
    seen: list[Seen] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.host}"

    def push(self, repository: str, layer: bytes, *, tag: str = "v1", **more: object) -> bytes:
        """Have an image of one layer and return its manifest."""
        manifest = manifest_of(layer, **more)
        self.blobs[repository, digest_of(layer)] = layer
        self.manifests[repository, digest_of(manifest)] = manifest, OCI_MANIFEST
        self.tags[repository, tag] = digest_of(manifest)
        return manifest

    def bodies(self) -> list[Seen]:
        """Return the requests for whole manifests and blobs."""
        return [seen for seen in self.seen if seen.method == "GET" and seen.path != "/token"]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer anything."""
        authorization = request.headers.get("Authorization")
        self.seen.append(Seen(request.method, request.path, authorization))
        if self.status is not None:
            return web.Response(status=self.status)
        if request.path == "/token" and request.method == "POST":
            return web.Response(status=405)
        if request.path == "/token":
            return self._token(authorization)
        if request.path.startswith("/storage/"):
            _, _, repository, digest = request.path.split("/", 3)
            return _ranged(request, self.blobs[repository.replace("~", "/"), digest])
        parts = request.path.removeprefix("/v2/").split("/")
        repository, kind, reference = "/".join(parts[:-2]), parts[-2], parts[-1]
        if not self._may(repository, authorization):
            realm = f'Bearer realm="{self.url}/token",service="fake",scope="odd:scope:pull"'
            return web.Response(status=401, headers={"WWW-Authenticate": realm})
        if kind == "manifests":
            return self._manifest(request, repository, reference)
        blob = self.blobs.get((repository, reference))
        if blob is None:
            return web.Response(status=404)
        if self.storage:
            place = f"{self.storage}/storage/{repository.replace('/', '~')}/{reference}"
            return web.Response(status=307, headers={"Location": place})
        return _ranged(request, blob)

    def _token(self, authorization: str | None) -> web.Response:
        user = "nobody"
        if authorization is not None:
            user = base64.b64decode(authorization.split()[1]).decode().split(":")[0]
            if authorization != basic(user):
                return web.Response(status=401)
        return web.json_response({"token": user, "expires_in": 300})

    def _may(self, repository: str, authorization: str | None) -> bool:
        if authorization is None:
            return False
        allowed = self.private.get(repository)
        return allowed is None or authorization.removeprefix("Bearer ") in allowed

    def _manifest(self, request: web.Request, repository: str, reference: str) -> web.Response:
        digest = self.tags.get((repository, reference), reference)
        found = self.manifests.get((repository, digest))
        if found is None:
            return web.Response(status=404)
        headers = {"Docker-Content-Digest": digest} if self.tells_digests else {}
        return web.Response(body=found[0], content_type=found[1], headers=headers)


def _ranged(request: web.Request, blob: bytes) -> web.Response:
    wanted = request.http_range
    start = wanted.start or 0
    if not request.headers.get("Range") or start >= len(blob):
        return web.Response(body=blob, content_type="application/octet-stream")
    end = min(len(blob), wanted.stop or len(blob))
    headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(blob)}"}
    return web.Response(
        status=206, body=blob[start:end], headers=headers, content_type="application/octet-stream"
    )


@asynccontextmanager
async def running_registry() -> AsyncIterator[FakeRegistry]:
    """Run one on a free port of loopback."""
    registry = FakeRegistry()
    runner = web.ServerRunner(web.Server(registry.answer), shutdown_timeout=0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        registry.host = f"127.0.0.1:{runner.addresses[0][1]}"
        yield registry
    finally:
        await runner.cleanup()
