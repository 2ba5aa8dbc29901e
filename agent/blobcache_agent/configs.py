"""The configurations in force: what readers are served from, and how one set follows another.

The table readers are looked up in changes first, bytes follow: a configuration that is gone
answers 404 from the moment its successor set is applied, whatever its manager still has to finish.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from blobcache_agent.data.catalog import NotReady, Readers, UnknownConfig
from blobcache_agent.errors import Refusal
from blobcache_agent.logs import get_logger
from blobcache_agent.settings import Permissions
from blobcache_agent.translate import Wanted, translate
from blobcache_api.v1alpha1.config import Readers as ReadersOfSpec
from blobcache_storage.cache.base import BlobCache, BlobCacheMgr, Hit
from blobcache_storage.config import ConfigV2
from blobcache_storage.device import BlobInfo
from blobcache_storage.errors import StorageError
from blobcache_storage.factory import BlobFactory, ManagerKey

APPLY_AT_ONCE_MAX = 8
"""Configurations whose managers are made at a time."""

log = get_logger(__name__)


class Running:
    """A configuration as it is: served by a manager, or refused with a reason.

    It is what the data server calls an entry.
    """

    def __init__(self, wanted: Wanted, factory: BlobFactory) -> None:
        self.wanted = wanted
        self._factory = factory
        self.config: ConfigV2 | None = None
        self.manager: BlobCacheMgr | None = None
        self.refusal: Refusal | None = None

    @property
    def namespace(self) -> str:
        """The configuration's namespace."""
        return self.wanted.resource.namespace

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.wanted.resource.name

    @property
    def uid(self) -> str:
        """The configuration's uid."""
        return self.wanted.resource.uid

    @property
    def readers(self) -> Readers:
        """Whose pods may read."""
        is_open = self.wanted.resource.spec.readers is ReadersOfSpec.CLUSTER
        return "Cluster" if is_open else "Namespace"

    def open(self, blob_id: str) -> BlobCache:
        """Return a handle on a blob."""
        assert self.config is not None, "a refused configuration is not resolved"
        return self._factory.new_blob_cache(self.config, BlobInfo(blob_id))

    def hit(self, blob_id: str, first: int, last: int | None) -> Hit | None:
        """Return bytes that can go out at once."""
        return None if self.manager is None else self.manager.hit(blob_id, first, last)


class Configs:
    """All configurations of this process; the data server's catalog.

    Args:
        factory: Makes and drops managers.
        permissions: What the administrator allows.
        cache_root: Where file caches are; the factory has opened it.
    """

    def __init__(self, factory: BlobFactory, permissions: Permissions, cache_root: str) -> None:
        self._factory = factory
        self._permissions = permissions
        self._cache_root = cache_root
        self._running: dict[tuple[str, str], Running] = {}
        self.is_applied = False
        """Whether any set has been applied; before that nothing is known to be unknown."""

    def __iter__(self) -> Iterator[Running]:
        """Iterate over all of them, refused ones too."""
        return iter(tuple(self._running.values()))

    def resolve(self, namespace: str, name: str) -> Running:
        """Return a configuration that can serve.

        Raises:
            UnknownConfig: There is none of that name.
            NotReady: There is, but it was refused; or no set was applied yet.
        """
        found = self._running.get((namespace, name))
        if found is None:
            if not self.is_applied:
                raise NotReady(
                    "NoStateApplied", "this agent has not been told what to serve yet; try again"
                )
            raise UnknownConfig(f"{namespace}/{name}")
        if found.refusal is not None:
            raise NotReady(
                found.refusal.reason,
                f"`{namespace}/{name}` cannot be served on this node; its status says why",
            )
        if found.config is None:
            raise NotReady("NotApplied", f"`{namespace}/{name}` is being applied; try again")
        return found

    async def check(self, wanted: Sequence[Wanted]) -> list[str]:
        """Return what stands against this set, without changing anything: one line each."""
        problems = []
        for item in wanted:
            try:
                config = self._translate(item)
                backend = self._factory.new_backend(config.get_backend_config(), "")
            except (Refusal, StorageError) as error:
                problems.append(f"{item.place or item.resource.id}: {error}")
            else:
                await backend.shutdown()
        return problems

    def _translate(self, wanted: Wanted) -> ConfigV2:
        return translate(wanted.resource, wanted.credentials, self._permissions, self._cache_root)

    async def replace(self, wanted: Sequence[Wanted]) -> list[Running]:
        """Make this set the one in force and return it, in the same order.

        One that cannot be used has a refusal and keeps none of the others. Calls must not overlap.
        """
        before = self._running
        after: dict[tuple[str, str], Running] = {}
        for item in wanted:
            key = (item.resource.namespace, item.resource.name)
            known = before.get(key)
            if known is not None and known.uid == item.resource.uid:
                after[key] = known
            else:
                after[key] = Running(item, self._factory)
        leaving = [running for key, running in before.items() if after.get(key) is not running]
        self._running = after
        self.is_applied = True
        for running in leaving:
            await self._release(running)
        slots = asyncio.Semaphore(APPLY_AT_ONCE_MAX)

        async def apply(running: Running, item: Wanted) -> None:
            async with slots:
                await self._apply(running, item)

        pairs = zip(after.values(), wanted, strict=True)
        await asyncio.gather(*(apply(running, item) for running, item in pairs))
        return list(after.values())

    async def _apply(self, running: Running, wanted: Wanted) -> None:
        try:
            config = self._translate(wanted)
            manager = await self._factory.ensure_manager(config)
        except Refusal as refusal:
            await self._refuse(running, wanted, refusal)
        except StorageError as error:
            await self._refuse(running, wanted, Refusal(error.reason, str(error)))
        except Exception as error:
            # One configuration that meets a bug must not keep the others from being applied.
            log.exception("Failed to apply a configuration", config=wanted.resource.id)
            why = f"the agent met an unforeseen error ({type(error).__name__}); see its log"
            await self._refuse(running, wanted, Refusal("InternalError", why))
        else:
            replaced = running.config
            running.wanted, running.config, running.manager = wanted, config, manager
            running.refusal = None
            if replaced is not None and ManagerKey.of(replaced) != ManagerKey.of(config):
                await self._factory.release_manager(replaced)

    async def _refuse(self, running: Running, wanted: Wanted, refusal: Refusal) -> None:
        """Serve the configuration no longer: what it says now cannot be done, what it said
        before is not wanted any more.
        """
        log.warning(
            "Refused a configuration",
            config=wanted.resource.id,
            reason=refusal.reason,
            why=refusal.message,
        )
        running.refusal = refusal
        running.wanted = wanted
        await self._release(running)

    async def _release(self, running: Running) -> None:
        config, running.config, running.manager = running.config, None, None
        if config is not None:
            await self._factory.release_manager(config)
