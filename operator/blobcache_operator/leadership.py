"""
Who may act: a Lease, and the epoch that fences this leadership's pushes.

The Lease follows the rules of client-go's leader election: a holder renews every `retry_seconds`;
whoever sees the same record for `duration_seconds` of its own clock may take it; a holder that
could not renew for `renew_deadline_seconds` stops by itself, before anybody else may start. Every
write carries the resourceVersion it was decided on, so two takers cannot both win.

The epoch is the wall clock's microseconds, forced above the one the Lease remembers, so it rises
even if clocks do not; agents remember it too, so it survives the Lease's deletion.
"""

import asyncio
import datetime
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from blobcache_operator import errors, metrics
from blobcache_operator.kube import JSONObject, Kube

EPOCH_ANNOTATION = "blobcache.dev/epoch"
TRANSITIONS_MAX = 2**31 - 1  # the API server takes no more, and the Lease must remain takeable
# An agent's epoch further ahead than this is nonsense, not a leader we missed: following it would
# let one broken agent lock every later leader out.
EPOCH_AHEAD_MICROSECONDS_MAX = 24 * 3600 * 1_000_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds; the order duration > renew deadline > retry is what makes it safe."""

    duration: float = 15.0
    renew_deadline: float = 10.0
    retry: float = 2.0

    @classmethod
    def of(cls, duration: float) -> "LeaseTimes":
        """Return the usual proportions, 15 to 10 to 2."""
        return cls(duration, duration * 2 / 3, duration * 2 / 15)


class Term:
    """
    One leadership, from acquisition to loss.

    Args:
        epoch: Fences everything this leadership sends.
        deadline: The loop time until which the Lease is surely ours.
    """

    def __init__(self, epoch: int, deadline: float) -> None:
        self.epoch = epoch
        self.deadline = deadline

    def is_valid(self) -> bool:
        """Say whether acting is still allowed; a suspended process finds out here."""
        return asyncio.get_running_loop().time() < self.deadline

    def check(self) -> None:
        """Raise `LeadershipLost` when the Lease may be somebody else's."""
        if not self.is_valid():
            raise errors.LeadershipLost("the Lease was not renewed in time")


Lead = Callable[[Term], Awaitable[None]]


class Leadership:
    """
    Runs a function while this process leads.

    Args:
        kube: The API server.
        namespace: Where the Lease lives.
        name: The Lease.
        identity: Unique for this process.
        times: For tests.
    """

    def __init__(
        self,
        kube: Kube,
        *,
        namespace: str,
        name: str,
        identity: str,
        times: LeaseTimes | None = None,
    ) -> None:
        self._kube = kube
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._path = f"{self._collection}/{name}"
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._times = times or LeaseTimes()
        self._epoch_floor = 0
        self._observed: tuple[object, ...] | None = None
        self._observed_time = 0.0
        self.is_leading = False
        self.last_contact: float | None = None

    def raise_epoch_above(self, epoch: int) -> None:
        """Make the next acquisition's epoch higher than this."""
        self._epoch_floor = max(self._epoch_floor, epoch)

    def is_credible(self, epoch: int) -> bool:
        """Say whether an agent's epoch may be a leader's, from the distance to our clock."""
        return epoch <= max(_now_microseconds(), self._epoch_floor) + EPOCH_AHEAD_MICROSECONDS_MAX

    async def run(self, lead: Lead) -> None:
        """
        Acquire, lead, lose, again; until cancelled. Releases the Lease on the way out.

        `lead` is cancelled on loss and must then end within a few seconds. When it returns by
        itself (because an agent follows a higher epoch), the Lease is re-acquired at once.
        """
        while True:
            lease, term = await self._acquire()
            log.info("Leadership acquired", identity=self._identity, epoch=term.epoch)
            self._set_leading(leading=True)
            task = asyncio.ensure_future(lead(term))
            try:
                await self._hold(lease, term, task)
            finally:
                term.deadline = float("-inf")
                self._set_leading(leading=False)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await self._release()
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def _acquire(self) -> tuple[JSONObject, Term]:
        while True:
            try:
                taken = await self._try_acquire()
            except errors.KubeError as error:
                log.warning("Lease could not be read or taken", error=str(error))
                taken = None
            if taken is not None:
                return taken
            await asyncio.sleep(self._times.retry)

    async def _try_acquire(self) -> tuple[JSONObject, Term] | None:
        loop = asyncio.get_running_loop()
        try:
            lease: JSONObject | None = await self._kube.get(self._path)
        except errors.NotFound:
            lease = None
        self.last_contact = loop.time()
        if lease is not None and not self._may_take(lease, loop.time()):
            return None
        started = loop.time()
        epoch = max(_now_microseconds(), self._epoch_floor + 1, _epoch_of(lease) + 1)
        try:
            if lease is None:
                written = await self._kube.create(self._collection, self._record({}, epoch, 0))
            else:
                transitions = int((lease.get("spec") or {}).get("leaseTransitions") or 0) + 1
                transitions = min(transitions, TRANSITIONS_MAX)
                record = self._record(lease["metadata"], epoch, transitions)
                written = await self._kube.replace(self._path, record)
        except errors.Conflict:
            return None
        self._epoch_floor = epoch
        return written, Term(epoch, started + self._times.renew_deadline)

    def _may_take(self, lease: JSONObject, now: float) -> bool:
        """Say whether the holder let go, or has not moved for a whole lease duration."""
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self._identity):
            return True
        seen = (lease["metadata"].get("uid"), holder, spec.get("renewTime"))
        if seen != self._observed:
            self._observed, self._observed_time = seen, now
            return False
        return now - self._observed_time > self._times.duration

    async def _hold(self, lease: JSONObject, term: Term, task: "asyncio.Future[None]") -> None:
        """Renew until `task` ends or the Lease is lost."""
        loop = asyncio.get_running_loop()
        while True:
            remaining = term.deadline - loop.time()
            if remaining <= 0:
                log.warning("Leadership lost: the Lease could not be renewed in time")
                return
            done, _ = await asyncio.wait({task}, timeout=min(self._times.retry, remaining))
            if done:
                return
            started = loop.time()
            try:
                async with asyncio.timeout(max(term.deadline - started, 0.001)):
                    lease = await self._renew(lease, term.epoch)
            except errors.LeadershipLost as error:
                log.warning("Leadership lost", error=str(error))
                return
            except (errors.KubeError, TimeoutError) as error:
                log.warning("Lease was not renewed, trying again", error=str(error))
                continue
            self.last_contact = loop.time()
            term.deadline = started + self._times.renew_deadline

    async def _renew(self, lease: JSONObject, epoch: int) -> JSONObject:
        spec = lease.get("spec") or {}
        transitions = int(spec.get("leaseTransitions") or 0)
        acquired = spec.get("acquireTime")
        try:
            return await self._kube.replace(
                self._path, self._record(lease["metadata"], epoch, transitions, acquired)
            )
        except errors.Conflict:
            current = await self._kube.get(self._path)
            holder = (current.get("spec") or {}).get("holderIdentity")
            if holder != self._identity:
                raise errors.LeadershipLost(f"the Lease is held by '{holder}'") from None
            return await self._kube.replace(
                self._path, self._record(current["metadata"], epoch, transitions, acquired)
            )
        except errors.NotFound:
            # Somebody deleted it. Creating is the compare-and-swap: whoever is first leads.
            try:
                log.warning("Lease was deleted, creating it again")
                return await self._kube.create(
                    self._collection, self._record({}, epoch, transitions)
                )
            except errors.Conflict:
                raise errors.LeadershipLost("the Lease was deleted and taken") from None

    async def _release(self) -> None:
        """Let a standby start at once; failure only costs it the lease duration."""
        try:
            async with asyncio.timeout(self._times.retry):
                lease = await self._kube.get(self._path)
                if (lease.get("spec") or {}).get("holderIdentity") != self._identity:
                    return
                lease["spec"]["holderIdentity"] = ""
                await self._kube.replace(self._path, lease)
        except (errors.KubeError, TimeoutError) as error:
            log.info("Lease was not released", error=str(error))

    def _record(
        self, metadata: JSONObject, epoch: int, transitions: int, acquired: str | None = None
    ) -> JSONObject:
        now = _micro_time()
        kept = {key: metadata[key] for key in ("resourceVersion", "labels") if key in metadata}
        annotations = {**(metadata.get("annotations") or {}), EPOCH_ANNOTATION: str(epoch)}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                **kept,
                "name": self._name,
                "namespace": self._namespace,
                "annotations": annotations,
            },
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._times.duration)),
                "acquireTime": acquired or now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }

    def _set_leading(self, *, leading: bool) -> None:
        self.is_leading = leading
        metrics.LEADING.set(1 if leading else 0)


def _epoch_of(lease: JSONObject | None) -> int:
    """Return the epoch a Lease remembers; text that is no number counts as none."""
    if lease is None:
        return 0
    text = str((lease["metadata"].get("annotations") or {}).get(EPOCH_ANNOTATION) or "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else 0


def _now_microseconds() -> int:
    return time.time_ns() // 1000


def _micro_time() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
