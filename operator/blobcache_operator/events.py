"""Events: few, about what the operator did, for people who look at a config."""

import asyncio
import itertools

import structlog

from blobcache_operator import errors, metrics
from blobcache_operator.budget import WriteBucket
from blobcache_operator.kube import JSONObject, Kube
from blobcache_operator.status_writer import take_token

log = structlog.get_logger(__name__)


class EventPoster:
    """
    Posts Events, at most one per object and reason in `interval_seconds`.

    Args:
        kube: The API server.
        bucket: The budget of all writers.
        reporter: This process.
    """

    QUEUED_MAX = 256

    def __init__(
        self, kube: Kube, bucket: WriteBucket, reporter: str, *, interval_seconds: float = 600.0
    ) -> None:
        self._kube = kube
        self._bucket = bucket
        self._reporter = reporter
        self._interval_seconds = interval_seconds
        self._last: dict[tuple[str, str], float] = {}
        self._queue: asyncio.Queue[JSONObject] = asyncio.Queue(self.QUEUED_MAX)
        self._serial = itertools.count()

    def post(self, regarding: JSONObject, *, reason: str, action: str, note: str, now: str) -> bool:
        """Queue an Event; return whether it was not too soon, or too many."""
        loop = asyncio.get_running_loop()
        slot = (str(regarding["uid"]), reason)
        recent = loop.time() - self._interval_seconds
        self._last = {key: time for key, time in self._last.items() if time > recent}
        if slot in self._last or self._queue.full():
            return False
        self._last[slot] = loop.time()
        name = f"{regarding['name'][:200]}.{abs(hash((slot, now))):x}.{next(self._serial)}"
        self._queue.put_nowait(
            {
                "apiVersion": "events.k8s.io/v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": regarding["namespace"]},
                "eventTime": now,
                "type": "Normal",
                "reason": reason,
                "action": action,
                "note": note[:1024],
                "reportingController": "blobcache.dev/operator",
                "reportingInstance": self._reporter[:128],
                "regarding": regarding,
            }
        )
        return True

    async def run(self) -> None:
        """Post what is queued until cancelled."""
        while True:
            event = await self._queue.get()
            await take_token(self._bucket)
            path = f"/apis/events.k8s.io/v1/namespaces/{event['metadata']['namespace']}/events"
            try:
                await self._kube.create(path, event)
                metrics.EVENTS.labels(result="ok").inc()
            except errors.KubeError as error:
                metrics.EVENTS.labels(result="failed").inc()
                log.warning("Event was not posted", reason=event["reason"], error=str(error))
