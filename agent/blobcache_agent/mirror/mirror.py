"""The mirror: from a request below `/v2/` to the cached manifest or blob that answers it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from blobcache_agent.configs import Configs, Running
from blobcache_agent.data.answer import Answer, BlobAnswer, DocumentAnswer
from blobcache_agent.data.rejection import Rejection
from blobcache_agent.data.request import Request
from blobcache_agent.data.responses import Failure
from blobcache_agent.logs import get_logger
from blobcache_agent.mirror.bindings import Binding, Bindings
from blobcache_agent.mirror.caller import CallerKeys
from blobcache_agent.mirror.manifests import Manifest, ManifestReader
from blobcache_agent.mirror.memory import RegistryMemory
from blobcache_agent.mirror.oci_errors import oci_document
from blobcache_agent.mirror.oci_path import (
    OCIPath,
    is_mirror_path,
    parse_host_asked,
    parse_oci_path,
)
from blobcache_agent.mirror.upstream import Resolved, Upstream
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.backend.registry_inquiry import RegistryInquiry
from blobcache_storage.config import BackendConfig
from blobcache_storage.credentials import Anonymous
from blobcache_storage.errors import BlobNotFound, OriginDenied

API_VERSION_LINE = "Docker-Distribution-Api-Version: registry/2.0\r\n"
STALE_LINE = 'Warning: 110 blobcache "Response is Stale"\r\n'
"""RFC 7234 section 5.5.1; gone from RFC 9111, and still what says it best."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Bound:
    """A binding in use: the registry it had when it was first asked, and what asks it."""

    backend: BackendConfig
    """Without credentials: those that change concern nobody here."""
    upstream: Upstream


class Mirror:
    """See the module; a service of the data server. Belongs to one event loop.

    Args:
        bindings: Who answers for which host.
        configs: The configurations in force.
        policy: Which addresses registries may have.
    """

    def __init__(self, bindings: Bindings, configs: Configs, policy: AddressPolicy) -> None:
        self._bindings = bindings
        self._configs = configs
        self._policy = policy
        self._keys = CallerKeys()
        self._manifests = ManifestReader()
        self._bound: dict[str, _Bound] = {}
        self._misbound: dict[str, str] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._kept: dict[str, Any] = {}
        """What a former process knew of hosts that were not asked for yet."""

    def owns(self, path: str) -> bool:
        """Whether a request target is below `/v2/`."""
        return is_mirror_path(path)

    def error_document(self, failure: Failure) -> Mapping[str, object]:
        """Return an error as registries say it."""
        return oci_document(failure)

    @asynccontextmanager
    async def answering(self, request: Request) -> AsyncIterator[Answer]:
        """Find what a request asks for, for who asks."""
        caller = self._keys.caller(request.headers.get(b"authorization"))
        path = parse_oci_path(request.path)
        host = parse_host_asked(request.path, request.headers.get(b"oci-namespace"))
        binding = self._bindings.find(host)
        if binding is None and (host is not None or path is not None):
            raise Rejection(404, "UnknownHost", "no configuration is bound to this registry host")
        if path is None:
            yield DocumentAnswer(b"{}", "application/json", API_VERSION_LINE)
            return
        assert binding is not None, "refused above"
        entry = self._configs.resolve(binding.namespace, binding.name)
        repository, backend = self._registry_of(binding, entry)
        if repository and repository != path.repository:
            raise Rejection(404, "NameInvalid", "the configuration serves another repository")
        upstream = await self._upstream(binding, backend)
        resolved = await upstream.resolve(path, caller)
        headers = _headers(binding, resolved)
        if path.kind == "blobs":
            blob_id = resolved.digest if repository else f"{path.repository}/{resolved.digest}"
            yield BlobAnswer(entry, blob_id, headers)
            return
        async with self._manifest(entry, path, resolved) as manifest:
            yield DocumentAnswer(
                manifest.body,
                manifest.media_type,
                headers,
                manifest.version,
                manifest.cache_status,
                entry.namespace,
                entry.name,
                f"{path.repository}@{resolved.digest}",
            )

    @asynccontextmanager
    async def _manifest(
        self, entry: Running, path: OCIPath, resolved: Resolved
    ) -> AsyncIterator[Manifest]:
        """Read a manifest, telling apart what only the configuration may not do."""
        with entry.open(f"{path.repository}@{resolved.digest}") as cache:
            try:
                async with self._manifests.reading(cache, resolved.digest) as manifest:
                    yield manifest
            except BlobNotFound:
                raise Rejection(
                    404, "ManifestNotFound", "the registry has no such manifest"
                ) from None
            except OriginDenied:
                raise Rejection(
                    403,
                    "OriginDenied",
                    "the caller may pull this, but the configuration of this mirror may not: "
                    "pull it from the registry itself",
                ) from None

    def _registry_of(self, binding: Binding, entry: Running) -> tuple[str, BackendConfig]:
        """Return the only repository ("" = any) and the registry of a bound configuration.

        Raises:
            Rejection: It is of another registry than the administrator bound.
        """
        assert entry.config is not None, "a configuration that cannot serve is not resolved"
        backend = entry.config.get_backend_config()
        problem = misbinding(binding, backend)
        if problem:
            if self._misbound.get(binding.host) != problem:
                self._misbound[binding.host] = problem
                log.warning("Refused to mirror a registry", host=binding.host, why=problem)
            raise Rejection(404, "MirrorMisbound", problem)
        self._misbound.pop(binding.host, None)
        assert backend.registry is not None, "checked by misbinding"
        return backend.registry.repository, backend

    async def _upstream(self, binding: Binding, backend: BackendConfig) -> Upstream:
        """Return who asks the registry; a new one if where or how it is asked has changed."""
        backend = dataclasses.replace(backend, credentials=Anonymous())
        bound = self._bound.get(binding.host)
        if bound is not None and bound.backend == backend:
            return bound.upstream
        # Reads the system's certificates, once.
        inquiry = await asyncio.to_thread(RegistryInquiry, backend, policy=self._policy)
        raced = self._bound.get(binding.host)
        if raced is not None and raced is not bound and raced.backend == backend:
            self._close_in_background(Upstream(inquiry, RegistryMemory()))
            return raced.upstream
        memory = RegistryMemory()
        place = _place(binding, backend)
        memory.load(self._kept.pop(place, None))
        if raced is not None and _place(binding, raced.backend) == place:
            # Time-outs or trust have changed, not where the public repositories are.
            memory.load(raced.upstream.memory.dump())
        upstream = Upstream(inquiry, memory)
        if raced is not None:
            self._close_in_background(raced.upstream)
        self._bound[binding.host] = _Bound(backend, upstream)
        return upstream

    def _close_in_background(self, upstream: Upstream) -> None:
        task = asyncio.create_task(upstream.close(), name="close-upstream")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    @property
    def changes(self) -> int:
        """Moves when `dump` would return something else."""
        return sum(bound.upstream.memory.changes for bound in self._bound.values())

    def dump(self) -> dict[str, Any]:
        """Return what is to be known after a restart, for JSON; it holds no secret."""
        known = dict(self._kept)
        for host, bound in self._bound.items():
            binding = self._bindings.find(host)
            assert binding is not None, "only bound hosts are asked for"
            known[_place(binding, bound.backend)] = bound.upstream.memory.dump()
        return known

    def load(self, known: object) -> None:
        """Take over what a former process knew, for hosts and registries that still fit."""
        if isinstance(known, dict):
            self._kept = {str(place): document for place, document in known.items()}

    async def close(self) -> None:
        """End inquiries under way."""
        for bound in self._bound.values():
            self._close_in_background(bound.upstream)
        self._bound.clear()
        while self._closing:
            await asyncio.wait(self._closing)


def misbinding(binding: Binding, backend: BackendConfig) -> str:
    """Return why a configuration may not answer for a host; "" if it may."""
    if backend.registry is None:
        return f"'{binding.config_id}' must be of type Registry to answer for '{binding.host}'"
    registry = backend.registry
    if binding.fits(registry.host, registry.scheme):
        return ""
    return (
        f"'{binding.config_id}' is bound to '{binding.host}' and must name the registry host "
        f"'{binding.registry}'; it names '{registry.host}'. Where that is right, the administrator "
        f"binds {binding.host}@{registry.host}={binding.config_id}"
    )


def _place(binding: Binding, backend: BackendConfig) -> str:
    """Name what is known: of this host, at this registry, by this scheme."""
    assert backend.registry is not None, "only registries are bound"
    return f"{binding.host} {backend.registry.scheme}://{backend.registry.host}"


def _headers(binding: Binding, resolved: Resolved) -> str:
    lines = (
        f"Docker-Content-Digest: {resolved.digest}\r\n"
        f"OCI-Namespace: {binding.host}\r\n{API_VERSION_LINE}"
    )
    if resolved.age_seconds is not None:
        lines += f"Age: {resolved.age_seconds}\r\n"
    return lines + STALE_LINE if resolved.is_stale else lines
