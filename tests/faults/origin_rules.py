"""The table of origin faults: what goes wrong, and what a reader must be given then.

A phase is `once` (the next request meets the fault, those after it do not) or `lasting`. In both a
blob is read of which nothing is cached (`cold`) or the first half (`half`). Of a `hot` blob the
rule is the same for all faults, and so is not in the table: the bytes, a hit, and not one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from blobcache_storage.testing.fault_origin import Answer, FaultOrigin, Misbehaviour
from blobcache_storage.testing.origin_guards import error_document
from tests.faults.origin_stages import Blob, RegistryStage, Stage

KINDS: Final = ("s3", "oss", "registry", "http")
STATES: Final = ("cold", "half", "hot")
PHASES: Final = ("once", "lasting")

TIMEOUT_SECONDS: Final = 3
"""`timeoutSeconds` and `connectTimeoutSeconds` of all configurations: above the two seconds after
which a fetch without progress gets a competitor."""
RETRY_LIMIT: Final = 1
SIZE_BYTES: Final = 330_000
HALF_BYTES: Final = 10 * 16 * 1024
AMID_BYTES: Final = 100_000
"""Where bodies break: amid a chunk, with some before it and some after it."""
LIE_AT: Final = 300_000
"""Offset of the wrong byte: in the half that is not cached."""


# -- what must come of a read ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Right:
    """All bytes of the origin's present version."""

    cache_status: str = ""
    """Exactly this, where it matters."""
    seconds_min: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """An error, before a byte was sent."""

    status: int
    code: str
    says: str = ""
    """Part of the message."""
    retry_after: str | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """An error with this code, or right bytes that end short; never the whole."""

    code: str
    as_sent: bool = False
    """The bytes are what the origin sent, be it right or wrong: only the end is held back."""


@dataclass(frozen=True, slots=True)
class OneVersion:
    """All or the first bytes of one version, or the error BlobChanged."""


Expected = Right | Refused | Broken | OneVersion


# -- what goes wrong ------------------------------------------------------------------------------


@dataclass(slots=True)
class Scene:
    """What a fault is put upon."""

    stage: Stage
    blob: Blob
    state: str
    declare_digests: Callable[[], Awaitable[None]]
    """Has the configuration name the blobs' digests."""
    events: int = 0
    """Faults that were not requests met with a misbehaviour."""

    @property
    def first_asked(self) -> FaultOrigin:
        """Who gets the next request: a redirect is remembered for a while."""
        return self.stage.door if self.state == "cold" else self.stage.store


Inject = Callable[[Scene], Awaitable[None]]
MakeFault = Callable[[Scene], Misbehaviour]


def next_answer(make: MakeFault) -> Inject:
    """Whoever is asked next does wrong."""

    async def inject(scene: Scene) -> None:
        scene.first_asked.misbehave(make(scene))

    return inject


def next_bodies(*makes: MakeFault) -> Inject:
    """The store does wrong with its next answers."""

    async def inject(scene: Scene) -> None:
        scene.stage.store.misbehave(*(make(scene) for make in makes))

    return inject


def all_answers(make: MakeFault) -> Inject:
    """All who are asked do wrong."""

    async def inject(scene: Scene) -> None:
        for origin in scene.stage.origins:
            origin.always = make(scene)

    return inject


def all_bodies(make: MakeFault) -> Inject:
    """The store does wrong."""

    async def inject(scene: Scene) -> None:
        scene.stage.store.always = make(scene)

    return inject


async def nothing(scene: Scene) -> None:
    """Nothing goes wrong: the measure for requests."""


async def stop_listening(scene: Scene) -> None:
    """Refuse connections."""
    for origin in scene.stage.origins:
        await origin.stop()


async def stop_answering(scene: Scene) -> None:
    """Let connections hang before they are made."""
    for origin in scene.stage.origins:
        await origin.deafen()


async def change_certificate(scene: Scene) -> None:
    """Come back with the certificate of an authority nobody knows."""
    trust = scene.stage.trust
    assert trust is not None
    for origin in scene.stage.origins:
        await origin.stop()
        origin.tls = trust.untrusted
        await origin.start()


async def lie(scene: Scene) -> None:
    """Send another byte, with length and entity tag as before."""
    scene.stage.store.always = Misbehaviour(corrupt_at=LIE_AT)
    await scene.declare_digests()


def _replacement(scene: Scene) -> Misbehaviour:
    """The blob's next version; of a registry's blob only the entity tag can be another."""
    if isinstance(scene.stage, RegistryStage):
        return Misbehaviour(replace_with=scene.stage.stored(scene.blob, 1, etag='"another"'))
    scene.blob.version += 1
    return Misbehaviour(replace_with=scene.stage.stored(scene.blob, scene.blob.version))


async def change_midway(scene: Scene) -> None:
    """Break the body, and have another version when asked for the rest."""
    change = _replacement(scene)
    if scene.state == "cold":
        scene.stage.store.misbehave(Misbehaviour(reset_after=AMID_BYTES))
    scene.stage.store.misbehave(change)


def _denial(scene: Scene) -> Misbehaviour:
    answer = error_document(403, "AccessDenied")
    return Misbehaviour(answer=Answer(401) if scene.stage.kind == "http" else answer)


async def deny_once(scene: Scene) -> None:
    """Break the body and refuse the rest, once; a registry's token ends as well."""
    if scene.state == "cold":
        scene.stage.store.misbehave(Misbehaviour(reset_after=AMID_BYTES))
    scene.stage.store.misbehave(_denial(scene))
    if isinstance(scene.stage, RegistryStage):
        scene.stage.guard.revoke()
        scene.events += 1


async def deny_from_now(scene: Scene) -> None:
    """Break the body and refuse the rest; a registry gives no new token either."""
    if scene.state == "cold":
        scene.stage.store.misbehave(Misbehaviour(reset_after=AMID_BYTES))
    scene.stage.store.always = _denial(scene)
    if isinstance(scene.stage, RegistryStage):
        scene.stage.guard.revoke()
        scene.stage.guard.refuse_tokens = True
        scene.events += 1


async def mislead(scene: Scene) -> None:
    """Want a token, and name another host that gives it."""
    stage = scene.stage
    assert isinstance(stage, RegistryStage)
    stage.store.always = _denial(scene)
    stage.guard.realm = f"{stage.stranger.url}/token"
    stage.guard.revoke()
    scene.events += 1


def _to_stranger(scene: Scene) -> Misbehaviour:
    scene.stage.put(scene.blob, scene.stage.stranger)
    path = scene.stage.path(scene.blob).replace(" ", "%20")
    return _redirect(f"{scene.stage.stranger.url}{path}")


def _redirect(to: str) -> Misbehaviour:
    return Misbehaviour(answer=Answer(307, {"Location": to}))


def _busy(seconds: int) -> MakeFault:
    return lambda _: Misbehaviour(answer=Answer(503, {"Retry-After": str(seconds)}))


def _hang(scene: Scene) -> Misbehaviour:
    return Misbehaviour(hold_head=asyncio.Event())


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    """How a fault is begun, and what comes of it."""

    inject: Inject
    cold: Expected
    half: Expected | None = None
    """As of a cold blob unless given."""
    kinds: Mapping[str, Expected] = field(default_factory=dict)
    """What is otherwise for a kind of origin."""

    def expected(self, kind: str, state: str) -> Expected:
        """Return the rule of a cell; a hot cell's is that of its cold witness."""
        if kind in self.kinds:
            return self.kinds[kind]
        return self.half if state == "half" and self.half is not None else self.cold


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table."""

    name: str
    once: Phase | None = None
    lasting: Phase | None = None
    meaningless: Mapping[str, str] = field(default_factory=dict)
    """Kinds of origin that cannot have the fault, and why."""
    tls: bool = False
    is_seen_by_origin: bool = True
    """False where no request reaches the origin: then the reader's error alone proves the fault."""
    heals_in_seconds: float = 20.0
    is_stored_after: bool = True

    def phase(self, name: str) -> Phase | None:
        """Return a phase by its name."""
        return self.once if name == "once" else self.lasting


OUT_OF_ORDER: Final = Refused(502, "OriginProtocolError")
UNREACHABLE: Final = Refused(502, "OriginUnreachable")
BROKEN_OFF: Final = Broken("OriginUnreachable")
"""The cached half was sent already when the body broke."""
TOO_LATE: Final = Refused(504, "OriginTimeout")
NOT_PERMITTED: Final = Refused(502, "OriginRefused", says="agent.allowOriginCIDRs")
UNCACHED: Final = Right(cache_status="fwd=miss")
ONLY_REGISTRIES: Final = "only a registry names who gives tokens"

FAULTS: Final = (
    Fault("none", lasting=Phase(nothing, Right())),
    Fault(
        "refused",
        lasting=Phase(stop_listening, Refused(502, "OriginUnreachable", says="refused")),
        is_seen_by_origin=False,
    ),
    Fault("connect hang", lasting=Phase(stop_answering, TOO_LATE), is_seen_by_origin=False),
    Fault("hang", Phase(next_answer(_hang), Right()), Phase(all_answers(_hang), TOO_LATE)),
    Fault(
        "TLS failure",
        lasting=Phase(change_certificate, Refused(502, "OriginUnreachable", says="is not trusted")),
        tls=True,
        is_seen_by_origin=False,
    ),
    Fault(
        "10 s latency",
        Phase(next_answer(lambda _: Misbehaviour(latency_seconds=10)), Right()),
        Phase(all_answers(lambda _: Misbehaviour(latency_seconds=10)), TOO_LATE),
    ),
    Fault(
        "500",
        Phase(next_answer(lambda _: Misbehaviour(answer=Answer(500))), Right()),
        Phase(
            all_answers(lambda _: Misbehaviour(answer=Answer(500))),
            Refused(502, "OriginServerError"),
        ),
    ),
    Fault(
        "503 with Retry-After",
        Phase(next_answer(_busy(1)), Right(seconds_min=1.0)),
        Phase(all_answers(_busy(7)), Refused(503, "OriginThrottled", retry_after="7")),
    ),
    Fault(
        "429",
        Phase(next_answer(lambda _: Misbehaviour(answer=Answer(429))), Right()),
        Phase(
            all_answers(lambda _: Misbehaviour(answer=Answer(429))),
            Refused(503, "OriginThrottled", retry_after="1"),
        ),
    ),
    Fault(
        "reset mid-body",
        Phase(next_bodies(lambda _: Misbehaviour(reset_after=AMID_BYTES)), Right()),
        Phase(all_bodies(lambda _: Misbehaviour(reset_after=1000)), UNREACHABLE, half=BROKEN_OFF),
    ),
    Fault(
        "truncated body",
        Phase(next_bodies(lambda _: Misbehaviour(truncate_after=AMID_BYTES)), Right()),
        Phase(
            all_bodies(lambda _: Misbehaviour(truncate_after=1000)), UNREACHABLE, half=BROKEN_OFF
        ),
    ),
    Fault(
        "longer body",
        Phase(next_bodies(lambda _: Misbehaviour(extra_body=b"more")), OUT_OF_ORDER),
        Phase(all_bodies(lambda _: Misbehaviour(extra_body=b"more")), OUT_OF_ORDER),
    ),
    Fault(
        "longer chunked body",
        lasting=Phase(
            all_bodies(lambda _: Misbehaviour(chunked=True, extra_body=b"more" * 9999)),
            Broken("OriginProtocolError"),
        ),
    ),
    Fault(
        "200 for 206",
        lasting=Phase(
            all_bodies(lambda _: Misbehaviour(ignore_range=True)), Right(), half=OUT_OF_ORDER
        ),
    ),
    Fault(
        "wrong Content-Range",
        # Another size is another version, which a read begins anew once.
        Phase(next_bodies(lambda _: Misbehaviour(displace=16 * 1024)), OUT_OF_ORDER, half=Right()),
        Phase(all_bodies(lambda _: Misbehaviour(displace=16 * 1024)), OUT_OF_ORDER),
    ),
    Fault(
        "wrong data of the same length",
        lasting=Phase(lie, Broken("DigestMismatch", as_sent=True)),
        heals_in_seconds=80.0,
    ),
    Fault(
        "ETag change mid-blob",
        once=Phase(change_midway, OneVersion(), half=Right(), kinds={"registry": Right()}),
    ),
    Fault(
        "no ETag",
        Phase(
            next_bodies(lambda _: Misbehaviour(headers={"ETag": None})),
            UNCACHED,
            half=Right(),
            kinds={"registry": Right()},
        ),
        Phase(
            all_bodies(lambda _: Misbehaviour(headers={"ETag": None})),
            UNCACHED,
            kinds={"registry": Right()},
        ),
        is_stored_after=False,
    ),
    Fault(
        "401 or 403 mid-way",
        Phase(
            deny_once,
            Broken("OriginDenied"),
            half=Refused(403, "OriginDenied"),
            kinds={"registry": Right()},
        ),
        Phase(deny_from_now, Broken("OriginDenied"), half=Refused(403, "OriginDenied")),
    ),
    Fault(
        "redirect to a private address",
        lasting=Phase(
            all_answers(lambda scene: _redirect(f"{scene.stage.forbidden.url}/private")),
            NOT_PERMITTED,
        ),
    ),
    Fault("redirect to another host", lasting=Phase(all_bodies(_to_stranger), Right())),
    Fault(
        "gzip body",
        Phase(next_bodies(lambda _: Misbehaviour(compress=True)), OUT_OF_ORDER),
        Phase(all_bodies(lambda _: Misbehaviour(compress=True)), OUT_OF_ORDER),
    ),
    Fault(
        "1 byte/s",
        Phase(next_bodies(lambda _: Misbehaviour(drip_bytes=1, drip_seconds=1.0)), Right()),
        Phase(
            all_bodies(lambda _: Misbehaviour(drip_bytes=1, drip_seconds=1.0)),
            TOO_LATE,
            half=Broken("OriginTimeout"),
        ),
    ),
    Fault(
        "HTTP garbage",
        Phase(next_answer(lambda _: Misbehaviour(raw=b"\x16\x03 not HTTP\r\n\r\n")), OUT_OF_ORDER),
        Phase(all_answers(lambda _: Misbehaviour(raw=b"\x16\x03 not HTTP\r\n\r\n")), OUT_OF_ORDER),
    ),
    Fault(
        "token realm on another host",
        lasting=Phase(mislead, Refused(403, "OriginDenied", says="realm")),
        meaningless=dict.fromkeys(("s3", "oss", "http"), ONLY_REGISTRIES),
    ),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault, one kind of origin, one state of the blob."""

    kind: str
    fault: Fault
    state: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.fault.name}: {self.state}"


def all_cells() -> list[Cell]:
    """Return all cells that mean something."""
    return [
        Cell(kind, fault, state)
        for fault in FAULTS
        for kind in KINDS
        if kind not in fault.meaningless
        for state in STATES
    ]
