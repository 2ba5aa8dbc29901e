"""The mirror's beginning and end within the process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from blobcache_agent.configs import Configs
from blobcache_agent.logs import get_logger
from blobcache_agent.mirror.bindings import Bindings
from blobcache_agent.mirror.memory_file import SAVE_SECONDS, MemoryFile
from blobcache_agent.mirror.mirror import Mirror, misbinding
from blobcache_agent.settings import AgentSettings
from blobcache_agent.translate import Wanted, translate
from blobcache_storage.backend.connector import AddressPolicy

Every = Callable[[float, Callable[[], Awaitable[None]]], None]
"""Takes a step every so many seconds until the end."""

log = get_logger(__name__)


async def start_mirror(
    bindings: Bindings,
    configs: Configs,
    policy: AddressPolicy,
    cache_root: Path,
    stack: AsyncExitStack,
    every: Every,
) -> Mirror | None:
    """Return the mirror with what it knew before, or None if no host is bound.

    Args:
        stack: Ends it.
    """
    if not len(bindings):
        return None
    mirror = Mirror(bindings, configs, policy)
    directory_fd = await asyncio.to_thread(_open_directory, cache_root)
    stack.callback(os.close, directory_fd)
    memory = MemoryFile(mirror, directory_fd)
    await memory.load()
    stack.push_async_callback(mirror.close)
    stack.push_async_callback(memory.save)
    every(SAVE_SECONDS, memory.save)
    log.info("Mirrors registries", hosts=[binding.host for binding in bindings])
    return mirror


def misbindings(settings: AgentSettings, wanted: Sequence[Wanted]) -> Iterator[str]:
    """Yield what stands against the bound hosts, where all configurations are known."""
    found = {item.resource.id: item for item in wanted}
    for binding in settings.mirrored:
        item = found.get(binding.config_id)
        if item is None:
            yield f"--containerd-mirror: there is no BlobCacheConfig '{binding.config_id}'"
            continue
        config = translate(item.resource, item.credentials, settings.permissions)
        problem = misbinding(binding, config.get_backend_config())
        if problem:
            yield f"--containerd-mirror: {problem}"


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
