"""What is known of one registry: who may pull which repository, and what tags stand for.

Bounded, least lately used first out. Verdicts on credentials are kept by keyed hash and only in
memory. What anybody may pull (public repositories and their tags) is kept by wall clock, so that
it can outlive the process.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from blobcache_storage.backend.blob_id import is_repository
from blobcache_storage.backend.registry_inquiry import is_reference

VERDICT_SECONDS = 300.0
"""How long a yes of the registry holds for this caller, or for everybody."""
TAG_SECONDS = 5.0
"""How long a tag is not asked for again."""
DOWN_SECONDS_MAX = 24 * 3600.0
"""How long public repositories and their tags hold while the registry is down."""
ENTRIES_MAX = 4096
"""Of each kind, for each registry."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Tag:
    """What a tag stood for, and when (unix seconds)."""

    digest: str
    time: float


class _Bounded(OrderedDict[K, V], Generic[K, V]):
    """A table that forgets what was written longest ago."""

    def put(self, key: K, value: V) -> None:
        """Write an entry."""
        self[key] = value
        self.move_to_end(key)
        if len(self) > ENTRIES_MAX:
            self.popitem(last=False)


class RegistryMemory:
    """See the module.

    Args:
        now: Unix seconds; ages that would be negative count as too old.
        monotonic: Seconds that never jump, for verdicts on credentials.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._monotonic = monotonic
        self._accepted: _Bounded[tuple[str, bytes], float] = _Bounded()
        self._public: _Bounded[str, float] = _Bounded()
        self._tags: _Bounded[tuple[str, str], Tag] = _Bounded()
        self.changes = 0
        """Counts what would be written differently."""

    def accept(self, repository: str, key: bytes) -> None:
        """The registry accepted this credential for this repository."""
        self._accepted.put((repository, key), self._monotonic() + VERDICT_SECONDS)

    def is_accepted(self, repository: str, key: bytes) -> bool:
        """Whether it did so lately."""
        return self._monotonic() < self._accepted.get((repository, key), 0.0)

    def note_public(self, repository: str, *, is_public: bool) -> None:
        """The registry gave, or refused, the repository to who shows nothing."""
        if is_public:
            self._public.put(repository, self._now())
            self.changes += 1
        elif self._public.pop(repository, None) is not None:
            self.changes += 1

    def is_public(self, repository: str, *, within_seconds: float = VERDICT_SECONDS) -> bool:
        """Whether it was given to anybody lately."""
        seen_time = self._public.get(repository)
        return seen_time is not None and self._is_younger(seen_time, within_seconds)

    def note_tag(self, repository: str, tag: str, digest: str | None) -> None:
        """The registry said what a tag stands for; None = it has none of that name."""
        if digest is None:
            self._tags.pop((repository, tag), None)
        else:
            self._tags.put((repository, tag), Tag(digest, self._now()))
        if repository in self._public:
            self.changes += 1

    def tag(self, repository: str, tag: str, *, within_seconds: float = TAG_SECONDS) -> Tag | None:
        """Return what a tag stood for lately."""
        found = self._tags.get((repository, tag))
        return found if found and self._is_younger(found.time, within_seconds) else None

    def age_seconds(self, tag: Tag) -> int:
        """Return how long ago that was."""
        return max(0, int(self._now() - tag.time))

    def _is_younger(self, seen_time: float, within_seconds: float) -> bool:
        # A second of grace: wall clocks are set back by fractions all the time.
        return -1.0 <= self._now() - seen_time <= within_seconds

    def dump(self) -> dict[str, Any]:
        """Return what anybody may know, for JSON: no private repository and no credential."""
        return {
            "public": dict(self._public),
            "tags": [
                [repository, tag, found.digest, found.time]
                for (repository, tag), found in self._tags.items()
                if repository in self._public
            ],
        }

    def load(self, document: object) -> None:
        """Take over what was dumped; what is malformed is left out."""
        if not isinstance(document, dict):
            return
        public, tags = document.get("public"), document.get("tags")
        for repository, seen in public.items() if isinstance(public, dict) else ():
            if isinstance(seen, int | float) and is_repository(repository):
                self._public.put(repository, float(seen))
        for item in tags if isinstance(tags, list) else ():
            match item:
                case [str(repository), str(tag), str(digest), int(seen) | float(seen)] if (
                    repository in self._public
                    and is_reference("manifests", tag)
                    and is_reference("blobs", digest)
                ):
                    self._tags.put((repository, tag), Tag(digest, float(seen)))
