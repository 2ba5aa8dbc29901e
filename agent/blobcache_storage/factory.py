"""The factory: from a configuration and a blob to a handle on its cache.

It keeps one cache manager per `ManagerKey`. Everything here runs in one event loop's thread and
never waits in the middle of a decision, so there is no lock, and none is held over network or disk:
managers open blobs when they are read, and end in the background.

`gc` closes and drops what nobody uses and deletes nothing; deleting data is eviction.

Nydus: `storage/src/factory.rs`. Differs in the key (a rotated credential does not make a second
manager over the same files), in that managers can be retained, and in that empty pass-through
managers are dropped as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.backend.open import BackendEnvironment, open_backend
from blobcache_storage.cache.base import BlobCache, BlobCacheMgr
from blobcache_storage.cache.dummycache import DummyCacheMgr
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.cache.runtime import StorageRuntime
from blobcache_storage.config import (
    BackendConfig,
    ConfigV2,
    HTTPProxyConfig,
    LocalFSConfig,
    OSSConfig,
    PrefetchConfig,
    RegistryConfig,
    S3Config,
)
from blobcache_storage.device import BlobInfo
from blobcache_storage.errors import CacheBusy, CacheError, ConfigError

CHECK_INTERVAL_SECONDS: Final = 5.0
"""How often managers look after themselves; Nydus's."""

FILE_CACHE_TYPES: Final = ("blobcache", "filecache")
FS_CACHE_TYPE: Final = "fscache"

_log = logging.getLogger(__name__)

_OriginSection = S3Config | OSSConfig | RegistryConfig | HTTPProxyConfig | LocalFSConfig | None


class OpenBackend(Protocol):
    """Makes the backend of a configuration; no network, no disk."""

    def __call__(self, config: BackendConfig, *, environment: BackendEnvironment) -> BlobBackend:
        """Return the backend, or raise ConfigError."""


@dataclass(frozen=True, slots=True)
class ManagerKey:
    """What makes two configurations the same manager: all that decides bytes or their place.

    TLS trust belongs to it, for it decides whose bytes are taken. Secrets do not, nor what
    `BlobCacheMgr.reconfigure` changes in place.
    """

    id: str
    uid: str
    backend_type: str
    origin: _OriginSection
    ca_bundle_pem: str
    insecure_skip_verify: bool
    cache_type: str
    work_dir: str
    chunk_size_bytes: int
    validate: bool

    @classmethod
    def of(cls, config: ConfigV2) -> ManagerKey:
        """Return the key of a configuration.

        Raises:
            ConfigError: The backend or the cache section is missing.
        """
        backend, cache = config.get_backend_config(), config.get_cache_config()
        return cls(
            id=config.id,
            uid=config.uid,
            backend_type=backend.type,
            origin=(
                backend.s3
                or backend.oss
                or backend.registry
                or backend.http_proxy
                or backend.localfs
            ),
            ca_bundle_pem=backend.ca_bundle_pem,
            insecure_skip_verify=backend.insecure_skip_verify,
            cache_type=cache.type,
            work_dir=cache.work_dir,
            chunk_size_bytes=cache.chunk_size_bytes,
            validate=cache.validate,
        )

    @property
    def place(self) -> tuple[str, str] | None:
        """Cache root and owner of the folder, which one manager at a time may have."""
        if self.cache_type not in FILE_CACHE_TYPES:
            return None
        return _normal(self.work_dir), self.uid or self.id


@dataclass(slots=True)
class _Managed:
    """A manager in use, and the configuration it has now."""

    config: ConfigV2
    manager: BlobCacheMgr
    retained: bool = False
    released: bool = False
    """Its configuration is gone: it goes with its last reader."""


class BlobFactory:
    """Cache managers by configuration. Belongs to one event loop.

    Args:
        runtime: Threads and memory which all managers share; the caller closes it after `close`.
        environment: What the administrator permits to backends.
        environment_of: The same for one configuration, where permissions differ by tenant.
        open_backend: Makes backends; tests put others here.
    """

    def __init__(
        self,
        runtime: StorageRuntime,
        environment: BackendEnvironment,
        *,
        environment_of: Callable[[ConfigV2], BackendEnvironment] | None = None,
        open_backend: OpenBackend = open_backend,
    ) -> None:
        self._runtime = runtime
        self._environment = environment
        self._environment_of = environment_of or (lambda config: environment)
        self._open_backend = open_backend
        self._managed: dict[ManagerKey, _Managed] = {}
        self._roots: dict[str, asyncio.Task[CacheRoot]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._ending_by_place: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._checker: asyncio.Task[None] | None = None
        self._closed = False

    async def open_root(
        self, path: str, *, capacity_bytes: int | None = None, min_free_bytes: int = 0
    ) -> CacheRoot:
        """Open a cache root, once per path; file caches below it can be made from then on.

        Args:
            path: What configurations call their `work_dir`.
            capacity_bytes: Bound of what all configurations use together; None = the disk's.
            min_free_bytes: Free space of the file system that is left alone.

        Raises:
            ConfigError: The directory cannot be used.
        """
        self._check_open()
        place = _normal(path)
        if place not in self._roots:
            opening = asyncio.to_thread(
                CacheRoot.open,
                place,
                self._runtime,
                capacity_bytes=capacity_bytes,
                min_free_bytes=min_free_bytes,
            )
            self._roots[place] = asyncio.create_task(opening, name="open-cache-root")
        task = self._roots[place]
        try:
            # Shielded: who gives up waiting must not take the root from the others.
            return await asyncio.shield(task)
        except ConfigError:
            if self._roots.get(place) is task:
                del self._roots[place]
            raise

    def new_blob_cache(self, config: ConfigV2, blob_info: BlobInfo) -> BlobCache:
        """Return a handle on a blob, making the manager if there is none. No network, no disk.

        Raises:
            ConfigError: The configuration cannot be used.
            CacheBusy: The folder's former manager is still ending; soon it will work.
            InvalidBlobId: The backend can have no such blob.
        """
        key = ManagerKey.of(config)
        managed = self._find(key, config)
        if managed is None:
            if key.place in self._ending_by_place:
                raise CacheBusy(f"the former cache manager of '{config.id}' is still ending")
            managed = self._add(key, config, blob_info.id)
        return managed.manager.get_blob_cache(blob_info)

    async def ensure_manager(self, config: ConfigV2) -> BlobCacheMgr:
        """Return the configuration's manager and keep it, even with no blob, until released.

        Another manager of the same folder (the configuration's former endpoint, say) is ended
        first, whoever reads through it.

        Raises:
            ConfigError: The configuration cannot be used.
        """
        key = ManagerKey.of(config)
        while (managed := self._find(key, config)) is None:
            for rival in [k for k in self._managed if k.place is not None and k.place == key.place]:
                self._end(rival)
            ending = self._ending_by_place.get(key.place) if key.place is not None else None
            if ending is None:
                managed = self._add(key, config, "")
                break
            await asyncio.wait([ending])
        managed.retained, managed.released = True, False
        return managed.manager

    async def release_manager(self, config: ConfigV2) -> None:
        """Let a configuration's manager go: now if nobody reads, else after the last reader.

        Returns without waiting for either. A configuration without a manager is no error.
        """
        key = ManagerKey.of(config)
        managed = self._managed.get(key)
        if managed is None:
            return
        managed.retained, managed.released = False, True
        # A prefetch under way would hold its blobs, and so the manager, until all was fetched.
        cache = managed.config.get_cache_config()
        cache = dataclasses.replace(cache, prefetch=PrefetchConfig())
        self._find(key, dataclasses.replace(managed.config, cache=cache))
        self._collect(key, None)

    def managers(self) -> dict[ManagerKey, BlobCacheMgr]:
        """Return all managers, as of now."""
        return {key: managed.manager for key, managed in self._managed.items()}

    def gc(self, victim: tuple[ConfigV2, str] | None) -> None:
        """Close and drop unused blobs, and managers that are left without one.

        Args:
            victim: A configuration and a blob id; None = everything.
        """
        if victim is None:
            for key in list(self._managed):
                self._collect(key, None)
        else:
            config, blob_id = victim
            self._collect(ManagerKey.of(config), blob_id)

    def start_mgr_checker(self) -> None:
        """Have managers look after themselves, now and every 5 s; idempotent."""
        self._check_open()
        if self._checker is None:
            self._checker = asyncio.create_task(self._check_forever(), name="manager-checker")

    def check_cache_stat(self) -> None:
        """Let managers, and roots without one, look after themselves.

        One that fails does not stop the others.
        """
        for key, managed in list(self._managed.items()):
            try:
                managed.manager.check_stat()
                if managed.released:
                    self._collect(key, None)
            except Exception:
                _log.exception("Cache manager's check failed", extra={"config_id": key.id})
        for opening in self._roots.values():
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                root = opening.result()
                if not root.members:  # else they do it
                    root.check_stat()

    def new_backend(
        self, config: BackendConfig, blob_id: str, *, environment: BackendEnvironment | None = None
    ) -> BlobBackend:
        """Return a backend of its own.

        Args:
            config: oss, s3, registry, http-proxy or localfs.
            blob_id: The blob it is opened for; as Nydus's interface has it, for the log only.
            environment: What it is permitted; the factory's own by default.

        Raises:
            ConfigError: `unsupported backend type '…'`, or the section is missing or wrong.
        """
        _log.debug("Opening a backend", extra={"backend": config.type, "blob_id": blob_id})
        return self._open_backend(config, environment=environment or self._environment)

    async def close(self) -> None:
        """End the checker and every manager, then close the roots; idempotent."""
        self._closed = True
        if self._checker is not None:
            self._checker.cancel()
            await asyncio.wait([self._checker])
        for key in list(self._managed):
            self._end(key)
        while self._ending:
            await asyncio.wait(self._ending)
        while self._roots:
            _, opening = self._roots.popitem()
            with contextlib.suppress(ConfigError):
                root = await opening
                await root.settled()
                await asyncio.to_thread(root.close)

    async def _check_forever(self) -> None:
        while True:
            self.check_cache_stat()
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError("the factory is closed")

    def _find(self, key: ManagerKey, config: ConfigV2) -> _Managed | None:
        """Return the key's manager, if there is one, with what may change in place as given."""
        managed = self._managed.get(key)
        if managed is not None and managed.config is not config:
            if managed.config != config:
                managed.manager.reconfigure(config)
            managed.config = config
        return managed

    def _add(self, key: ManagerKey, config: ConfigV2, blob_id: str) -> _Managed:
        """Make a manager; one that fails to start leaves nothing behind."""
        self._check_open()
        manager = self._new_manager(key, config, blob_id)
        try:
            manager.init()
        except BaseException:
            self._end_in_background(manager, key.place)
            raise
        managed = self._managed[key] = _Managed(config, manager)
        return managed

    def _new_manager(self, key: ManagerKey, config: ConfigV2, blob_id: str) -> BlobCacheMgr:
        """Make the manager that the cache type names; what no type names passes through."""
        if key.cache_type == FS_CACHE_TYPE:
            raise ConfigError("cache type 'fscache' is not supported yet: use 'filecache'")
        root = self._root_of(key)
        environment = self._environment_of(config)
        backend = self.new_backend(config.get_backend_config(), blob_id, environment=environment)
        try:
            if root is not None:
                return FileCacheMgr(config, backend, self._runtime, root)
            return DummyCacheMgr(config, backend)
        except BaseException:
            self._end_in_background(backend, None)
            raise

    def _root_of(self, key: ManagerKey) -> CacheRoot | None:
        if key.place is None:
            return None
        opening = self._roots.get(key.place[0])
        if opening is None or not opening.done() or opening.exception() is not None:
            raise ConfigError(f"the cache root '{key.work_dir}' has not been opened")
        return opening.result()

    def _collect(self, key: ManagerKey, blob_id: str | None) -> None:
        managed = self._managed.get(key)
        if managed is not None and managed.manager.gc(blob_id) and not managed.retained:
            self._end(key)

    def _end(self, key: ManagerKey) -> None:
        self._end_in_background(self._managed.pop(key).manager, key.place)

    def _end_in_background(
        self, ended: BlobCacheMgr | BlobBackend, place: tuple[str, str] | None
    ) -> None:
        task = asyncio.create_task(_destroy(ended), name="end-cache-manager")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        if place is not None:
            self._ending_by_place[place] = task
            task.add_done_callback(lambda _: self._ending_by_place.pop(place, None))


def _normal(path: str) -> str:
    """Name a directory in one way without asking the disk; links are told apart by the root."""
    return os.path.normpath(path)


async def _destroy(ended: BlobCacheMgr | BlobBackend) -> None:
    """End a manager, or a backend that got none; a failure is told and is nobody's problem."""
    try:
        if isinstance(ended, BlobCacheMgr):
            await ended.destroy()
        else:
            await ended.shutdown()
    except Exception:
        _log.exception("Cache manager did not end cleanly")
