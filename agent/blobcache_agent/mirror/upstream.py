"""One binding's registry: may this caller pull this, and which digest is it?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from blobcache_agent.data.rejection import Rejection
from blobcache_agent.mirror.caller import Caller
from blobcache_agent.mirror.memory import DOWN_SECONDS_MAX, RegistryMemory
from blobcache_agent.mirror.oci_path import OCIPath
from blobcache_storage.backend.registry_inquiry import Finding, RegistryInquiry
from blobcache_storage.errors import (
    BackendError,
    CircuitOpen,
    OriginServerError,
    OriginThrottled,
    OriginTimeout,
    OriginUnreachable,
)

DOWN_PAUSE_SECONDS = 10.0
"""After a failure: who can be answered by what is known is not made to wait for another."""

_OK = 200
_UNAUTHENTICATED = 401
_NOT_FOUND = 404
_UNAVAILABLE = 503


@dataclass(frozen=True, slots=True)
class Resolved:
    """A digest that the caller may pull."""

    digest: str
    age_seconds: int | None = None
    """How long ago the tag was resolved; None for a digest."""
    is_stale: bool = False
    """Whether the registry is down and could not confirm it."""


class Upstream:
    """See the module. Safe for many tasks of one loop.

    Args:
        inquiry: Asks the registry; closed by `close`.
        memory: What is known of it; may be filled from a file.
    """

    def __init__(
        self,
        inquiry: RegistryInquiry,
        memory: RegistryMemory,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inquiry = inquiry
        self.memory = memory
        self._clock = clock
        self._down_until = 0.0
        self._flights: dict[tuple[OCIPath, bytes], asyncio.Task[Finding]] = {}

    async def resolve(self, path: OCIPath, caller: Caller) -> Resolved:
        """Return the digest that a path names, if the caller may pull it.

        Raises:
            Rejection: 401 with the registry's challenge, 403 or 404.
            BackendError: The registry did not answer, and what is known does not suffice.
        """
        known = self._known(path, caller)
        if known is not None:
            return known
        if self._clock() < self._down_until:
            stale = self._known_while_down(path, caller)
            if stale is not None:
                return stale
        try:
            finding = await self._ask(path, caller)
        except BackendError as error:
            if not _is_down(error):
                raise
            self._down_until = self._clock() + DOWN_PAUSE_SECONDS
            stale = self._known_while_down(path, caller)
            if stale is None:
                raise
            return stale
        self._down_until = 0.0
        return self._judge(path, caller, finding)

    def _known(self, path: OCIPath, caller: Caller) -> Resolved | None:
        """Return what need not be asked."""
        memory = self.memory
        if not self._was_accepted(path, caller) and not memory.is_public(path.repository):
            return None
        if not path.is_tag:
            return Resolved(path.reference)
        tag = memory.tag(path.repository, path.reference)
        return Resolved(tag.digest, memory.age_seconds(tag)) if tag else None

    def _known_while_down(self, path: OCIPath, caller: Caller) -> Resolved | None:
        """Return what must do while the registry is down."""
        memory, repository = self.memory, path.repository
        if not self._was_accepted(path, caller) and not memory.is_public(
            repository, within_seconds=DOWN_SECONDS_MAX
        ):
            return None
        if not path.is_tag:
            return Resolved(path.reference, is_stale=True)
        tag = memory.tag(repository, path.reference, within_seconds=DOWN_SECONDS_MAX)
        return Resolved(tag.digest, memory.age_seconds(tag), is_stale=True) if tag else None

    def _was_accepted(self, path: OCIPath, caller: Caller) -> bool:
        return not caller.is_anonymous and self.memory.is_accepted(path.repository, caller.key)

    async def _ask(self, path: OCIPath, caller: Caller) -> Finding:
        """Ask the registry; callers with the same question and credential share one request."""
        key = (path, caller.key)
        flight = self._flights.get(key)
        if flight is None:
            asking = self._inquiry.ask(
                path.repository, path.kind, path.reference, caller.authorization
            )
            flight = self._flights[key] = asyncio.create_task(asking, name="mirror-inquiry")
            flight.add_done_callback(lambda done: self._land(key, done))
        # One who leaves must not take the answer away from those who wait for the same.
        return await asyncio.shield(flight)

    def _land(self, key: tuple[OCIPath, bytes], flight: asyncio.Task[Finding]) -> None:
        del self._flights[key]
        if not flight.cancelled():
            # Looked at here, so that an error nobody waits for any more is no warning.
            flight.exception()

    def _judge(self, path: OCIPath, caller: Caller, finding: Finding) -> Resolved:
        """Remember what the registry said, and say it."""
        memory, repository = self.memory, path.repository
        if finding.status == _OK:
            if caller.is_anonymous:
                memory.note_public(repository, is_public=True)
            else:
                memory.accept(repository, caller.key)
            if not path.is_tag:
                return Resolved(path.reference)
            memory.note_tag(repository, path.reference, finding.digest)
            return Resolved(finding.digest, 0)
        if finding.status == _NOT_FOUND:
            if path.is_tag:
                memory.note_tag(repository, path.reference, None)
            raise _not_found(path)
        if caller.is_anonymous:
            memory.note_public(repository, is_public=False)
        if finding.status == _UNAUTHENTICATED and finding.challenges:
            challenges = "".join(f"WWW-Authenticate: {line}\r\n" for line in finding.challenges)
            raise Rejection(
                401,
                "Unauthenticated",
                "the registry wants a credential that may pull from this repository",
                headers=challenges,
            )
        raise Rejection(403, "Forbidden", "the registry does not permit this caller to pull this")

    async def close(self) -> None:
        """End inquiries under way."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        await self._inquiry.close()


def _not_found(path: OCIPath) -> Rejection:
    if path.kind == "blobs":
        return Rejection(404, "BlobNotFound", "the registry has no such blob in this repository")
    return Rejection(404, "ManifestNotFound", "the registry has no such manifest")


def _is_down(error: BackendError) -> bool:
    """Whether the registry is out of service, rather than refusing or asking for patience."""
    if isinstance(error, OriginThrottled):
        return error.status == _UNAVAILABLE
    return isinstance(error, OriginUnreachable | OriginTimeout | OriginServerError | CircuitOpen)
