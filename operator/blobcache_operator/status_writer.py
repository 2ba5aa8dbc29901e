"""
Writes statuses, the most urgent first, no faster than the cluster's budget.

Between two writes of an object only the newest wanted status is kept, so however fast things
change, nothing queues up.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from blobcache_api.v1alpha1.common import Model
from blobcache_operator import errors, metrics
from blobcache_operator.budget import Urgency, WriteBucket
from blobcache_operator.kube import JSONObject, Kube
from blobcache_operator.leadership import Term

RETRY_SECONDS_MIN = 1.0
RETRY_SECONDS_MAX = 60.0
# A rollout passes through many states a second; each object shows at most one of them per second.
INTERVAL_SECONDS_MIN = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """A status that should be written."""

    kind: str
    path: str
    uid: str
    status: Model
    urgency: Urgency


@dataclass(slots=True)
class Written:
    """What an object's status is since our last write in this leadership."""

    uid: str
    status: Model
    time: float


class StatusWriter:
    """
    One leadership's writer.

    Args:
        kube: The API server.
        term: Checked before each write.
        bucket: The budget of all writers.
        missing: Called with the path when the object is not there any more.
    """

    def __init__(
        self,
        kube: Kube,
        term: Term,
        bucket: WriteBucket,
        missing: Callable[[str], None],
    ) -> None:
        self._kube = kube
        self._term = term
        self._bucket = bucket
        self._missing = missing
        self._offers: dict[str, Offer] = {}
        self._written: dict[str, Written] = {}
        self._not_before: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._bell = asyncio.Event()

    def written(self, path: str, uid: str) -> Written | None:
        """Return the last write in this leadership of the object that has this uid."""
        found = self._written.get(path)
        return found if found is not None and found.uid == uid else None

    def offer(self, offer: Offer) -> None:
        """Replace what should be written to an object; with nothing to say, withdraw it."""
        if offer.urgency is Urgency.NOTHING:
            self._offers.pop(offer.path, None)
            return
        self._offers[offer.path] = offer
        self._bell.set()

    def forget(self, path: str) -> None:
        """Drop all that is known of an object."""
        for table in (self._offers, self._written, self._not_before, self._failures):
            table.pop(path, None)

    def forget_all_but(self, paths: set[str]) -> None:
        """Drop all that is known of other objects; they are gone."""
        for table in (self._offers, self._written, self._not_before, self._failures):
            for gone in table.keys() - paths:
                del table[gone]

    async def run(self) -> None:
        """Write until cancelled or the leadership is over."""
        loop = asyncio.get_running_loop()
        while True:
            chosen = self._choose(loop.time())
            if chosen is None:
                await self._wait(self._next_time(loop.time()))
                continue
            await take_token(self._bucket)
            # Something more urgent, or newer, may have come meanwhile.
            chosen = self._choose(loop.time())
            if chosen is not None:
                await self._write(chosen)

    def _choose(self, now: float) -> Offer | None:
        due = (
            offer for path, offer in self._offers.items() if self._not_before.get(path, 0.0) <= now
        )
        return min(due, key=self._order, default=None)

    def _order(self, offer: Offer) -> tuple[int, bool, float, str]:
        """Sort the most urgent first, people's own objects before nodes, then the longest wait."""
        last = self._written.get(offer.path)
        waited_since = last.time if last else 0.0
        return (offer.urgency.value, offer.kind != "config", waited_since, offer.path)

    def _next_time(self, now: float) -> float | None:
        times = [self._not_before.get(path, now) for path in self._offers]
        return max(min(times) - now, 0.01) if times else None

    async def _wait(self, seconds: float | None) -> None:
        self._bell.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._bell.wait()
        except TimeoutError:
            return

    async def _write(self, offer: Offer) -> None:
        loop = asyncio.get_running_loop()
        self._term.check()
        body = {"metadata": {"uid": offer.uid}, "status": status_patch(offer.status)}
        try:
            await self._kube.merge_patch(f"{offer.path}/status", body)
        except (errors.NotFound, errors.Conflict):
            # Deleted, or made again with another uid: the next LIST tells.
            self.forget(offer.path)
            self._missing(offer.path)
            return
        except errors.KubeError as error:
            metrics.STATUS_WRITES.labels(kind=offer.kind, result="failed").inc()
            failures = self._failures[offer.path] = self._failures.get(offer.path, 0) + 1
            delay = min(RETRY_SECONDS_MAX, RETRY_SECONDS_MIN * 2.0 ** min(failures - 1, 10))
            self._not_before[offer.path] = loop.time() + delay
            log.warning("Status was not written", path=offer.path, error=str(error))
            return
        metrics.STATUS_WRITES.labels(kind=offer.kind, result="ok").inc()
        self._failures.pop(offer.path, None)
        self._written[offer.path] = Written(offer.uid, offer.status, loop.time())
        self._not_before[offer.path] = loop.time() + INTERVAL_SECONDS_MIN
        if self._offers.get(offer.path) is offer:
            del self._offers[offer.path]


async def take_token(bucket: WriteBucket, *, spare: float = 0.0) -> None:
    """Wait for one write of the budget; with `spare`, let those without it go first."""
    loop = asyncio.get_running_loop()
    delay = bucket.take(loop.time(), spare=spare)
    while delay > 0:
        await asyncio.sleep(delay)
        delay = bucket.take(loop.time(), spare=spare)


def status_patch(status: Model) -> JSONObject:
    """
    Return a merge patch that makes a status equal to this one, whatever it was.

    Absent fields are nulls, which remove; lists are replaced whole, so inside them what is absent
    is left out.
    """
    patch = _with_nulls(status)
    assert isinstance(patch, dict)
    return patch


def _with_nulls(value: object) -> Any:
    if not isinstance(value, Model):
        return value
    dumped = value.to_api()
    fields = type(value).model_fields
    patch: JSONObject = {}
    for name, field in fields.items():
        alias = field.serialization_alias or field.alias or name
        inner = getattr(value, name)
        patch[alias] = _with_nulls(inner) if isinstance(inner, Model) else dumped.get(alias)
    return patch
