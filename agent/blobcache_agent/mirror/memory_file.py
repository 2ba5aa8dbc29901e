"""What the mirror knows, kept across restarts: so that an emptied node pulls while a registry is
down. No secret, no private repository; anything that does not verify counts as absent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json

from blobcache_agent.logs import get_logger
from blobcache_agent.mirror.mirror import Mirror
from blobcache_agent.state_file import StateFile, StateFileCorrupt

NAME = "mirror-memory"
SAVE_SECONDS = 5.0
"""At most what a power cut takes: tags and public repositories are only asked for again."""

log = get_logger(__name__)


class MemoryFile:
    """The mirror's file in the cache root. `save` and `load` in one task at a time.

    Args:
        mirror: Whose memory it is.
        directory_fd: The cache root; stays the caller's.
    """

    def __init__(self, mirror: Mirror, directory_fd: int) -> None:
        self._mirror = mirror
        self._file = StateFile(directory_fd, NAME)
        self._saved_changes = 0

    async def load(self) -> None:
        """Read it, if it is there and sound."""
        with contextlib.suppress(OSError, StateFileCorrupt, ValueError, RecursionError):
            content = await asyncio.to_thread(self._file.read)
            if content is not None:
                self._mirror.load(json.loads(content))

    async def save(self) -> None:
        """Write it if something has changed; a disk that fails costs nothing but the memory."""
        changes = self._mirror.changes
        if changes == self._saved_changes:
            return
        content = json.dumps(self._mirror.dump()).encode()
        try:
            await asyncio.to_thread(self._file.write, content)
        except OSError as error:
            log.warning("Could not save what the mirror knows", error=str(error))
            return
        self._saved_changes = changes
