"""The hit lane answers as the ordinary road does: one table, served with the lane and without.

Both worlds are the same real cache behind the same real server; in one no hit is found at once.
Answers must be equal byte for byte (but for the date), and so must be what is told to the observer,
the metrics, what the manager counted, and what the origin was asked.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.unit.cache.rig import CHUNK, Rig
from tests.unit.data.test_tokens import ISSUER, JWKS, NOW, claims, good
from tests.unit.data.wire import ANSWER_SECONDS_MAX, connected

from blobcache_agent.data.catalog import (
    Entry,
    NotReady,
    Readers,
    ResponseRecord,
    UnknownConfig,
)
from blobcache_agent.data.lane import HitLane
from blobcache_agent.data.limits import HEAD_BYTES_MAX, HEADERS_MAX, Limits
from blobcache_agent.data.server import DataServer
from blobcache_agent.data.tokens import AllowAll, TokenAuth
from blobcache_agent.observer import RequestObserver
from blobcache_storage.cache.base import BlobCache, Hit, ManagerStats, Victim
from blobcache_storage.cache.filecache import FileCacheMgr
from blobcache_storage.device import BlobInfo

SMALL, BIG = 100_000, 3 * 1024 * 1024
BLOBS = {"small": SMALL, "big": BIG, "chunk": CHUNK, "one": 1, "a/b c": 5000, "other": SMALL}
MODIFIED = "Wed, 21 Oct 2015 07:28:00 GMT"
_DATE = re.compile(rb"\r\nDate: [^\r]+")


@dataclass
class LiveEntry:
    """A configuration over a real manager; conforms to Entry."""

    namespace: str
    name: str
    manager: FileCacheMgr
    readers: Readers = "Namespace"
    has_lane: bool = True
    hits: int = 0

    def open(self, blob_id: str) -> BlobCache:
        """Return a handle."""
        return self.manager.get_blob_cache(BlobInfo(blob_id))

    def hit(self, blob_id: str, first: int, last: int | None) -> Hit | None:
        """Find a hit where there is a lane."""
        found = self.manager.hit(blob_id, first, last) if self.has_lane else None
        self.hits += found is not None
        return found


@dataclass
class LiveCatalog:
    """Conforms to Catalog."""

    entries: dict[tuple[str, str], Entry]
    refused: set[str] = field(default_factory=set)

    def resolve(self, namespace: str, name: str) -> Entry:
        """Find an entry."""
        if name in self.refused:
            raise NotReady("OriginRefused", "it cannot be served")
        try:
            return self.entries[namespace, name]
        except KeyError:
            raise UnknownConfig from None


class Observed(RequestObserver):
    """The real observer; remembers, too."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.records: list[ResponseRecord] = []
        self.errors: list[BaseException] = []

    def on_response(self, record: ResponseRecord) -> None:
        """Count and remember, the time apart."""
        assert record.duration_seconds >= 0
        timeless = record._replace(duration_seconds=0.0)
        super().on_response(timeless)
        self.records.append(timeless)

    def on_error(self, error: BaseException) -> None:
        """Remember."""
        self.errors.append(error)


@dataclass
class World:
    """A server over a cache, and a connection to it."""

    rig: Rig
    entry: LiveEntry
    catalog: LiveCatalog
    auth: TokenAuth
    clock: list[float]
    observer: Observed
    registry: CollectorRegistry
    address: tuple[str, int]
    answers: list[bytes] = field(default_factory=list)

    @property
    def etag(self) -> str:
        """The entity tag of `small`."""
        generation = self.rig.manager.table.current("small")
        assert generation is not None
        assert generation.version.etag is not None
        return generation.version.etag

    async def warm(self, *blob_ids: str) -> None:
        """Have blobs cached, recorded and verified."""
        for blob_id in blob_ids:
            await self.rig.read(blob_id)
        await self.rig.durable()

    async def evict(self, blob_id: str) -> None:
        """Evict a blob."""
        (usage,) = [u for u in self.rig.manager.usage() if u.blob_id == blob_id]
        await self.rig.manager.evict([Victim(blob_id, usage.version, 2e9)])
        await self.rig.settled()

    def outcome(self) -> tuple[list[bytes], list[ResponseRecord], ManagerStats, bytes, list[int]]:
        """Return all that must be equal."""
        assert self.observer.errors == []
        backend = self.rig.backend
        origin = [backend.requests, backend.bytes_sent, backend.stats_asked]
        stats, metrics = self.rig.manager.stats(), generate_latest(self.registry)
        return self.answers, self.observer.records, stats, metrics, origin


@asynccontextmanager
async def world(folder: Path, *, has_lane: bool, has_tokens: bool) -> AsyncIterator[World]:
    """Run one, its blobs cached."""
    rig = await Rig(folder / f"root-{has_lane}").start()
    for blob_id, size in BLOBS.items():
        data = rig.oracle.blob(blob_id, 0, size)
        rig.backend.put(blob_id, data, last_modified=MODIFIED)
    rig.backend.put("empty", b"")
    entry = LiveEntry("team", "models", rig.manager, has_lane=has_lane)
    shared = LiveEntry("others", "shared", rig.manager, "Cluster", has_lane=has_lane)
    private = LiveEntry("others", "private", rig.manager, has_lane=has_lane)
    entries: list[LiveEntry] = [entry, shared, private]
    catalog = LiveCatalog({(one.namespace, one.name): one for one in entries})
    clock, registry = [NOW], CollectorRegistry()
    auth, observer = TokenAuth(lambda: clock[0]), Observed(registry)
    auth.set_keys(JWKS, ISSUER)
    server = DataServer(catalog, auth if has_tokens else AllowAll(), observer, Limits())
    address = await server.start("127.0.0.1", 0)
    started = World(rig, entry, catalog, auth, clock, observer, registry, address)
    try:
        await started.warm(*BLOBS)
        yield started
    finally:
        await server.stop(grace_seconds=0)
        await rig.stop()


Action = Callable[[World], Awaitable[None]]
Step = bytes | tuple[bytes, ...] | Action
"""What is sent at once; what is sent in parts; or something that happens between two requests."""


def head(
    *lines: str, path: str = "/v1/blobs/team/models/small", method: str = "GET", end: str = "1.1"
) -> bytes:
    """Return a request."""
    return "\r\n".join([f"{method} {path} HTTP/{end}", "Host: node", *lines, "", ""]).encode(
        "latin-1"
    )


async def play(stage: World, steps: list[Step]) -> None:
    """Do the steps on one connection, a new one whenever the server closes it."""
    position = 0
    while position < len(steps):
        async with connected(*stage.address, limit=2**20) as wire:
            while position < len(steps):
                step = steps[position]
                position += 1
                if callable(step):
                    await step(stage)
                    continue
                parts = (step,) if isinstance(step, bytes) else step
                for part in parts:
                    await wire.send(part)
                    await asyncio.sleep(0)
                expected = b"".join(parts).count(b" HTTP/")
                if await _take_answers(stage, wire.reader, b"".join(parts), expected):
                    break


async def _take_answers(
    stage: World, reader: asyncio.StreamReader, sent: bytes, expected: int
) -> bool:
    """Keep so many answers; whether the server closed the connection."""
    methods = re.findall(rb"(?:^|\n)([!-~]+) [^\r\n]* HTTP/", sent)
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        for number in range(expected):
            try:
                answer = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                stage.answers.append(error.partial)
                return True
            length = re.search(rb"\r\nContent-Length: ([0-9]+)", answer)
            if length and methods[number] != b"HEAD" and b" 304 " not in answer[:16]:
                answer += await reader.readexactly(int(length[1]))
            stage.answers.append(_DATE.sub(b"", answer))
            if b"\r\nConnection: close" in answer:
                stage.answers.append(await reader.read())
                return True
    return False


# The table.

RANGES = (
    *("0-0", "0-4095", "100-200", f"{CHUNK - 1}-{CHUNK}", "0-", "99999-", "0-99999", "0-99998"),
    *("0-999999999", "99999-100000", "100000-", "100000-100001", "5-2", "-5", "-0", "-", "abc"),
    *(
        "0-1,5-6",
        ",0-1",
        "0-1,",
        "00-01",
        "0 -1",
        "0- 1",
        " 0-1",
        "+1-2",
        "1_0-20",
        "1--2",
        "0x1-2",
    ),
    *("0-999999999999999999", "0-9999999999999999999", "1000000000000000000000-", "\xb2-\xb3"),
)
RANGE_LINES = (
    *("Range: bytes=0-9", "range:bytes=0-9", "RANGE:\tbytes=0-9 \t", "Range: Bytes=0-9"),
    *("Range: items=0-9", "Range : bytes=0-9", "Range: bytes =0-9", "Range: bytes=0-9\r\n 5"),
    *("Range: bytes=0-9\r\nRange: bytes=20-29", "X: Range: bytes=0-9", "X-Range: bytes=0-9"),
    *("A: b\r\nRange: bytes=0-9\r\nC: d", "Range: bytes=0-9\nC: d", "Range:", "Range: bytes="),
)
CONDITIONS = (
    *("If-Match: *", 'If-Match: "no"', "If-Match: ETAG", "If-None-Match: ETAG", "If-None-Match: *"),
    *('If-None-Match: "no"', "If-Range: ETAG", 'If-Range: "no"', f"If-Range: {MODIFIED}"),
    *(f"If-Modified-Since: {MODIFIED}", f"If-Unmodified-Since: {MODIFIED}"),
    *("If-Unmodified-Since: Wed, 21 Oct 2009 07:28:00 GMT", "If-Modified-Since: never"),
)
OTHER_LINES = (
    *("Connection: close", "Connection: keep-alive", "Connection: x, Close", "Connection: upgrade"),
    *("Content-Length: 0", "Content-Length: 5", "Content-Length: 0\r\nContent-Length: 0"),
    *("Transfer-Encoding: chunked", "Expect: 100-continue", "Host: twice", "Accept: */*"),
    *("Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings", "TE: trailers", " folded", "no colon"),
    *("Authorization: Bearer x", "Authorization: Bearer x\r\nAuthorization: Bearer x", "A: \x00"),
    "X: " + "y" * 9000,
    "X: " + "y" * (HEAD_BYTES_MAX + 1),
    "\r\n".join(f"X{number}: y" for number in range(HEADERS_MAX - 2)),
    "\r\n".join(f"X{number}: y" for number in range(HEADERS_MAX - 1)),
    "\r\n".join(f"X{number}: y" for number in range(HEADERS_MAX)),
)
PATHS = (
    *("/v1/blobs/team/models/big", "/v1/blobs/team/models/chunk", "/v1/blobs/team/models/one"),
    *("/v1/blobs/team/models/empty", "/v1/blobs/team/models/a/b%20c", "/v1/blobs/team/models/none"),
    *("/v1/blobs/team/models/small?q=1", "/v1/blobs/team/models/sm%61ll", "/v1/blobs/team/models/"),
    *("/v1/blobs/team/models/a//b", "/v1/blobs/team/models/../x", "/v1/blobs/team/unknown/small"),
    *("/v1/blobs/Team/models/small", "/v1/blobs/team/models", "/v1/blobs/others/shared/small"),
    *("/v2/", "/", "*", "http://node/v1/blobs/team/models/small", "/v1/blobs/team/models/small#x"),
    "/v1/blobs/team/models/" + "x" * 1025,
)
METHODS = ("HEAD", "POST", "PUT", "OPTIONS", "get", "CONNECT", "G@T")
VERSIONS = ("1.0", "1.2", "2.0", "0.9", "11")
RANGED = "Range: bytes=10-19"
PLAIN = head(RANGED)


def table() -> Iterator[bytes]:
    """Yield every head, each with a range and without."""
    for text in RANGES:
        yield head(f"Range: bytes={text}")
    yield from map(head, RANGE_LINES)
    for line in (*CONDITIONS, *OTHER_LINES):
        yield head(line)
        yield head(line, RANGED)
        yield head(RANGED, line)
    for path in PATHS:
        yield head(path=path)
        yield head(RANGED, path=path)
        yield head("Range: bytes=0-", path=path)
    for method in METHODS:
        yield head(method=method)
        yield head(RANGED, method=method)
    for version in VERSIONS:
        yield head(RANGED, end=version)
        yield head(RANGED, "Connection: keep-alive", end=version)


def alternated(heads: Iterator[bytes]) -> list[Step]:
    """Send each head twice, after one that the lane knows and before another."""
    steps: list[Step] = []
    for one in heads:
        steps += [PLAIN, one, one, PLAIN]
    return steps


PIPELINES: list[Step] = [
    PLAIN,
    PLAIN + PLAIN,
    PLAIN + head(method="HEAD") + PLAIN,
    PLAIN * 5,
    b"\r\n" + PLAIN,
    (PLAIN[:20], PLAIN[20:]),
    (PLAIN[:-1], PLAIN[-1:]),
    (PLAIN + PLAIN[:30], PLAIN[30:]),
    PLAIN + head(path="/v1/blobs/team/models/none") + PLAIN,
    PLAIN,
    PLAIN + head("Connection: close") + PLAIN,
    head("Range: bytes=0-2999999", path="/v1/blobs/team/models/big") + PLAIN,
    head(path="/v1/blobs/team/models/big"),
    PLAIN + b'G"T / HTTP/1.1\r\n\r\n',
    PLAIN,
]
"""Several heads at once, heads in parts, answers that do not leave at once."""


def act(function: Callable[[World], None]) -> Action:
    """Make an action of a plain function."""

    async def action(stage: World) -> None:
        function(stage)

    return action


def suspend(stage: World, *, is_suspended: bool) -> None:
    """Have the configuration store nothing any more, or again."""
    manager = stage.rig.manager
    config = stage.rig.config
    manager.reconfigure(
        replace(config, cache=replace(config.get_cache_config(), suspend=is_suspended))
    )


def collect_idle(stage: World) -> None:
    """Have the manager close what nobody uses."""
    stage.rig.manager.gc(None)


async def cut_file(stage: World) -> None:
    """Take the end of `other`'s file away: what was verified cannot be read any more."""
    generation = stage.rig.manager.table.current("other")
    assert generation is not None
    path = os.readlink(f"/proc/self/fd/{generation.files.data_fd}")
    os.truncate(path, CHUNK)


OTHER = head("Range: bytes=20000-90000", path="/v1/blobs/team/models/other")
EVENTS: list[Step] = [
    *(PLAIN, lambda stage: stage.evict("small"), PLAIN, lambda stage: stage.rig.durable()),
    *(PLAIN, PLAIN, lambda stage: stage.warm("small"), PLAIN, head()),
    *(act(lambda stage: suspend(stage, is_suspended=True)), PLAIN, head()),
    *(lambda stage: stage.evict("chunk"), head(path="/v1/blobs/team/models/chunk")),
    *(act(lambda stage: suspend(stage, is_suspended=False)), PLAIN),
    *(act(lambda stage: stage.catalog.refused.add("models")), PLAIN, PLAIN),
    *(act(lambda stage: stage.catalog.refused.clear()), PLAIN),
    *(act(lambda stage: stage.rig.manager.quarantine(None, "small")), PLAIN, head()),
    *(OTHER, act(collect_idle), OTHER, OTHER),
    *(cut_file, OTHER, lambda stage: stage.rig.durable(), OTHER, OTHER),
    *(act(lambda stage: stage.catalog.entries.clear()), PLAIN, OTHER),
]
"""What may come between a request and the next one like it."""

TOKEN = f"Authorization: Bearer {good()}"
SHORT = f"Authorization: Bearer {good(claims(exp=int(NOW) + 60))}"
FOREIGN = good(claims(**{"kubernetes.io": {"namespace": "strangers"}}))
SHARED, PRIVATE = "/v1/blobs/others/shared/small", "/v1/blobs/others/private/small"


def later(seconds: float) -> Action:
    """Let time pass for tokens."""

    def step(stage: World) -> None:
        stage.clock[0] += seconds

    return act(step)


def close_to_strangers(stage: World) -> None:
    """Have `others/shared` serve its own namespace only."""
    entry = stage.catalog.entries["others", "shared"]
    assert isinstance(entry, LiveEntry)
    entry.readers = "Namespace"


def other_keys(stage: World) -> None:
    """Have other keys than the one that signed."""
    stage.auth.set_keys({"keys": [JWKS["keys"][1]]}, ISSUER)


TOKENS: list[Step] = [
    *(PLAIN, head(TOKEN, RANGED), head(TOKEN, RANGED), head(TOKEN), PLAIN),
    *(head("Authorization: Bearer bad", RANGED), head("Authorization: Basic x", RANGED)),
    *(head(RANGED, TOKEN), head(RANGED, TOKEN.replace("Bearer", "bearer")), head(RANGED, TOKEN)),
    *(head(RANGED, f"Authorization: Bearer {FOREIGN}"),) * 2,
    *(head(RANGED, f"Authorization: Bearer {FOREIGN}", path=SHARED),) * 2,
    *(head(RANGED, TOKEN, path=SHARED), head(RANGED, TOKEN, path=PRIVATE)),
    *(head(RANGED, TOKEN, path="/v1/blobs/team/unknown/small"),) * 2,
    *(head(RANGED, TOKEN, TOKEN), head(RANGED, TOKEN, path=SHARED)),
    *(act(close_to_strangers), head(RANGED, TOKEN, path=SHARED)),
    *(head(RANGED, SHORT), head(RANGED, SHORT), later(59), head(RANGED, SHORT)),
    *(later(20), head(RANGED, SHORT), later(20), head(RANGED, SHORT), head(RANGED, SHORT)),
    *(head(RANGED, TOKEN), later(4000), head(RANGED, TOKEN), later(-4000), head(RANGED, TOKEN)),
    *(head(RANGED, TOKEN), act(other_keys), head(RANGED, TOKEN), head(RANGED, TOKEN)),
]
"""Who shows what, and what happens to it while the connection stays."""

CASES: dict[str, tuple[list[Step], bool, int]] = {
    "heads": (alternated(table()), False, 400),
    "pipelines": (PIPELINES, False, 3),
    "events": (EVENTS, False, 8),
    "tokens": (TOKENS, True, 10),
}
"""Steps, whether tokens are asked for, and how many of the answers at least are the lane's."""


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Note for each try of the lane whether it answered."""
    answered: list[bool] = []
    original = HitLane.answer

    def answer(lane: HitLane, received: bytes) -> object:
        result = original(lane, received)
        answered.append(result is not False)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(HitLane, "answer", answer)
        yield answered


@pytest.mark.parametrize("case", CASES)
async def test_the_lane_answers_as_the_ordinary_road(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal answers, records, metrics, counts and requests to the origin."""
    steps, has_tokens, lane_answers_min = CASES[case]
    outcomes = []
    for has_lane in (True, False):
        with counted(monkeypatch) as answered:
            async with world(tmp_path, has_lane=has_lane, has_tokens=has_tokens) as stage:
                etag = stage.etag.encode()
                filled = [
                    step.replace(b"ETAG", etag) if isinstance(step, bytes) else step
                    for step in steps
                ]
                await play(stage, filled)
                await stage.rig.settled()
                outcomes.append(stage.outcome())
        lane_answers = sum(answered)
        assert lane_answers >= lane_answers_min if has_lane else lane_answers == 0
    by_lane, by_road = outcomes
    for number, (mine, other) in enumerate(zip(by_lane[0], by_road[0], strict=True)):
        assert mine == other, f"answer {number}"
    assert by_lane[1:] == by_road[1:]
    assert len(by_lane[0]) >= len([step for step in steps if not callable(step)])
