"""How long what a registry said holds, while it is up and while it is down."""

from __future__ import annotations

import asyncio
import json

import pytest

from blobcache_agent.data.rejection import Rejection
from blobcache_agent.mirror.caller import Caller, CallerKeys
from blobcache_agent.mirror.memory import ENTRIES_MAX, RegistryMemory
from blobcache_agent.mirror.oci_path import OCIPath
from blobcache_agent.mirror.upstream import Resolved, Upstream
from blobcache_storage.backend.registry_inquiry import Finding
from blobcache_storage.errors import (
    BackendError,
    CircuitOpen,
    OriginProtocolError,
    OriginServerError,
    OriginThrottled,
    OriginTimeout,
    OriginUnreachable,
)

OLD, NEW = ("sha256:" + digit * 64 for digit in "12")
TAG = OCIPath("library/app", "manifests", "v1")
BLOB = OCIPath("library/app", "blobs", OLD)
CANARY = "Bearer canary-7f3a"
DAY = 24 * 3600.0


class Clock:
    """Both clocks, at one time."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.time


class ScriptedInquiry:
    """Answers what it is told to, and counts."""

    def __init__(self) -> None:
        self.answer: Finding | BackendError = Finding(200, OLD)
        self.asked = 0
        self.gate: asyncio.Event | None = None

    async def ask(self, *question: object) -> Finding:
        """Answer."""
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.answer, BackendError):
            raise self.answer
        return self.answer

    async def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def inquiry() -> ScriptedInquiry:
    """A registry that says yes."""
    return ScriptedInquiry()


@pytest.fixture
def upstream(clock: Clock, inquiry: ScriptedInquiry) -> Upstream:
    """What is tested."""
    return Upstream(inquiry, RegistryMemory(clock, clock), clock)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def keys() -> CallerKeys:
    """Names credentials."""
    return CallerKeys()


@pytest.fixture
def nobody(keys: CallerKeys) -> Caller:
    """Shows nothing."""
    return keys.caller(None)


@pytest.fixture
def ann(keys: CallerKeys) -> Caller:
    """Shows a credential."""
    return keys.caller(CANARY)


async def test_a_tag_is_at_most_5_seconds_old(
    upstream: Upstream, inquiry: ScriptedInquiry, clock: Clock, nobody: Caller
) -> None:
    """Then it is asked for again; a digest is not."""
    assert await upstream.resolve(TAG, nobody) == Resolved(OLD, 0)
    inquiry.answer = Finding(200, NEW)
    clock.time += 5
    assert await upstream.resolve(TAG, nobody) == Resolved(OLD, 5)
    clock.time += 0.1
    assert await upstream.resolve(TAG, nobody) == Resolved(NEW, 0)
    assert await upstream.resolve(BLOB, nobody) == Resolved(OLD)
    assert inquiry.asked == 2
    inquiry.answer = Finding(404)
    clock.time += 5.1
    for _ in range(2):
        with pytest.raises(Rejection) as caught:
            await upstream.resolve(TAG, nobody)
        assert caught.value.status == 404


@pytest.mark.parametrize(
    "error",
    [
        OriginUnreachable("x"),
        OriginTimeout("x"),
        OriginServerError("x", status=500),
        OriginThrottled("x", status=503),
        CircuitOpen("x"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_public_while_down(
    upstream: Upstream,
    inquiry: ScriptedInquiry,
    clock: Clock,
    nobody: Caller,
    error: BackendError,
) -> None:
    """For a day after the last yes, stale as such, and asked again every 10 s at most."""
    await upstream.resolve(TAG, nobody)
    inquiry.answer = error
    clock.time += 3600
    assert await upstream.resolve(TAG, nobody) == Resolved(OLD, 3600, is_stale=True)
    assert await upstream.resolve(BLOB, nobody) == Resolved(OLD, is_stale=True)
    assert inquiry.asked == 2
    clock.time += 10.1
    await upstream.resolve(BLOB, nobody)
    assert inquiry.asked == 3
    clock.time += DAY - 3600 - 10.1
    assert (await upstream.resolve(TAG, nobody)).is_stale
    clock.time += 1
    for path in (TAG, BLOB):
        with pytest.raises(type(error)):
            await upstream.resolve(path, nobody)
    inquiry.answer = Finding(200, NEW)
    assert await upstream.resolve(TAG, nobody) == Resolved(NEW, 0)


@pytest.mark.parametrize(
    "error",
    [OriginThrottled("x", status=429), OriginThrottled("x"), OriginProtocolError("x")],
    ids=["429", "own slots", "nonsense"],
)
async def test_not_down(
    upstream: Upstream,
    inquiry: ScriptedInquiry,
    clock: Clock,
    nobody: Caller,
    error: BackendError,
) -> None:
    """Asking for patience, or nonsense, makes nothing stale acceptable."""
    await upstream.resolve(TAG, nobody)
    inquiry.answer = error
    clock.time += 301
    with pytest.raises(type(error)):
        await upstream.resolve(TAG, nobody)


async def test_a_private_verdict_ends_with_its_minutes(
    upstream: Upstream, inquiry: ScriptedInquiry, clock: Clock, ann: Caller, nobody: Caller
) -> None:
    """Also, and above all, while the registry is down; it helps nobody else."""
    await upstream.resolve(TAG, ann)
    inquiry.answer = OriginUnreachable("x")
    clock.time += 299
    assert (await upstream.resolve(BLOB, ann)).digest == OLD
    assert await upstream.resolve(TAG, ann) == Resolved(OLD, 299, is_stale=True)
    with pytest.raises(OriginUnreachable):
        await upstream.resolve(BLOB, nobody)
    clock.time += 2
    with pytest.raises(OriginUnreachable):
        await upstream.resolve(BLOB, ann)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_repository_made_private(
    upstream: Upstream, inquiry: ScriptedInquiry, clock: Clock, nobody: Caller, status: int
) -> None:
    """One no ends the day of grace."""
    await upstream.resolve(BLOB, nobody)
    clock.time += 301
    inquiry.answer = Finding(status, challenges=("Basic",))
    with pytest.raises(Rejection) as caught:
        await upstream.resolve(BLOB, nobody)
    assert caught.value.status == status
    inquiry.answer = OriginUnreachable("x")
    with pytest.raises(OriginUnreachable):
        await upstream.resolve(BLOB, nobody)


async def test_a_401_without_a_challenge_is_a_403(
    upstream: Upstream, inquiry: ScriptedInquiry, ann: Caller
) -> None:
    """A 401 must say what it wants (RFC 9110 section 15.5.2)."""
    inquiry.answer = Finding(401)
    with pytest.raises(Rejection) as caught:
        await upstream.resolve(BLOB, ann)
    assert caught.value.status == 403


async def test_same_question_is_asked_once(
    upstream: Upstream, inquiry: ScriptedInquiry, nobody: Caller, ann: Caller
) -> None:
    """A crowd of one credential shares the answer; one who leaves takes it from nobody."""
    inquiry.gate = asyncio.Event()
    crowd = [asyncio.create_task(upstream.resolve(BLOB, nobody)) for _ in range(20)]
    crowd.append(asyncio.create_task(upstream.resolve(BLOB, ann)))
    await asyncio.sleep(0)
    crowd.pop(0).cancel()
    await asyncio.sleep(0)
    inquiry.gate.set()
    assert {found.digest for found in await asyncio.gather(*crowd)} == {OLD}
    assert inquiry.asked == 2


async def test_close_ends_inquiries(
    upstream: Upstream, inquiry: ScriptedInquiry, nobody: Caller
) -> None:
    """Nothing is left running."""
    inquiry.gate = asyncio.Event()
    waiting = asyncio.create_task(upstream.resolve(BLOB, nobody))
    await asyncio.sleep(0)
    await upstream.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_callers_do_not_print_themselves(keys: CallerKeys, ann: Caller) -> None:
    """Neither the credential nor a hash that somebody could compute."""
    assert "canary" not in f"{ann} {ann!r} {ann.authorization}"
    assert ann.key == keys.caller(CANARY).key
    assert ann.key != CallerKeys().caller(CANARY).key
    assert keys.caller("").is_anonymous


def test_memory_is_bounded_and_survives(clock: Clock) -> None:
    """What was written longest ago goes first; what anybody may know is read back."""
    memory = RegistryMemory(clock, clock)
    for number in range(ENTRIES_MAX + 10):
        memory.note_public(f"r{number}", is_public=True)
        memory.note_tag(f"r{number}", "v1", OLD)
        memory.accept(f"r{number}", b"key")
    assert not memory.is_public("r0")
    assert not memory.is_accepted("r9", b"key")
    assert memory.is_accepted(f"r{ENTRIES_MAX}", b"key")
    memory.accept("private", b"key")
    memory.note_tag("private", "v1", OLD)
    restored = RegistryMemory(clock, clock)
    restored.load(json.loads(json.dumps(memory.dump())))
    assert restored.dump() == memory.dump()
    assert restored.is_public(f"r{ENTRIES_MAX}")
    assert restored.tag(f"r{ENTRIES_MAX}", "v1") is not None
    assert restored.tag("private", "v1") is None
    assert not restored.is_accepted("private", b"key")
    clock.time -= 3600
    assert not restored.is_public(f"r{ENTRIES_MAX}"), "a clock set back makes nothing younger"


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"public": []},
        {"public": {"a": "b"}, "tags": {}},
        {"public": {"../x": 1.0, "ok": 1.0}, "tags": [["ok", "-", OLD, 1.0], ["ok", "v1"], 7]},
        {"public": {"ok": 1.0}, "tags": [["ok", "v1", "sha256:x", 1.0], ["other", "v1", OLD, 1]]},
    ],
)
def test_malformed_memory_is_left_out(document: object) -> None:
    """Whatever stands in the file."""
    memory = RegistryMemory()
    memory.load(document)
    assert set(memory.dump()["public"]) <= {"ok"}
    assert memory.dump()["tags"] == []
