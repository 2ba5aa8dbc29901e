"""Pulling through the mirror: who gets what, from where, and what happens when it fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.data.wire import Answer
from tests.unit.mirror.fake_registry import (
    OCI_MANIFEST,
    FakeRegistry,
    basic,
    digest_of,
    running_registry,
)
from tests.unit.mirror.world import (
    OWN_USER,
    World,
    own_credentials,
    running_world,
    wanted,
)

from blobcache_agent.mirror.manifests import ManifestReader

LAYER = bytes(range(256)) * 1024
REPOSITORY = "library/app"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    """A registry with nothing in it."""
    async with running_registry() as running:
        yield running


@pytest.fixture
async def world(registry: FakeRegistry, tmp_path: Path) -> AsyncIterator[World]:
    """A mirror of it."""
    async with running_world(tmp_path, registry) as running:
        yield running


def code_of(answer: Answer) -> tuple[int, str, str]:
    """Return status, the registry's error code, and our reason."""
    assert answer["content-type"] == "application/json"
    (error,) = json.loads(answer.body)["errors"]
    return answer.status, error["code"], error["detail"]["reason"]


async def test_public_image(registry: FakeRegistry, world: World) -> None:
    """A tag, its manifest, a blob; then the same from the cache, and parts of the blob."""
    manifest = registry.push(REPOSITORY, LAYER)
    for reference in ("v1", digest_of(manifest)):
        for method in ("HEAD", "GET"):
            found = await world.ask(f"/v2/{REPOSITORY}/manifests/{reference}", method=method)
            assert found.status == 200
            assert found["docker-content-digest"] == digest_of(manifest)
            assert found["content-type"] == OCI_MANIFEST
            assert found["content-length"] == str(len(manifest))
            assert found["oci-namespace"] == registry.host
            assert found.body == (manifest if method == "GET" else b"")
    path = f"/v2/{REPOSITORY}/blobs/{digest_of(LAYER)}?ns={registry.host}"
    head = await world.ask(path, method="HEAD")
    assert (head.status, head["content-length"]) == (200, str(len(LAYER)))
    assert (await world.ask(path)).body == LAYER
    bodies = len(registry.seen)
    parts = [(0, 999), (1000, 70_000), (70_001, len(LAYER) - 1)]
    answers = await asyncio.gather(
        *(world.ask(path, Range=f"bytes={first}-{last}") for first, last in parts)
    )
    assert [part.status for part in answers] == [206] * 3
    assert b"".join(part.body for part in answers) == LAYER
    assert all(part["cache-status"] == "blobcache; hit" for part in answers)
    assert all(part["docker-content-digest"] == digest_of(LAYER) for part in answers)
    assert len(registry.seen) == bodies, "neither bytes nor permission were asked for again"
    beyond = await world.ask(path, Range=f"bytes={len(LAYER)}-")
    assert beyond.status == 416
    assert beyond["content-range"] == f"bytes */{len(LAYER)}"
    again = await world.ask(path, If_None_Match=head["etag"])
    assert again.status == 304


async def test_base(world: World) -> None:
    """`/v2/` says that this is a registry."""
    base = await world.ask("/v2/")
    assert (base.status, base.body) == (200, b"{}")
    assert base["docker-distribution-api-version"] == "registry/2.0"


async def test_digest_of_a_tag_that_the_registry_does_not_tell(
    registry: FakeRegistry, world: World
) -> None:
    """Then the manifest is hashed."""
    registry.tells_digests = False
    manifest = registry.push(REPOSITORY, LAYER)
    found = await world.ask(f"/v2/{REPOSITORY}/manifests/v1")
    assert (found.body, found["docker-content-digest"]) == (manifest, digest_of(manifest))


async def test_anonymous_callers_get_the_registrys_challenge(
    registry: FakeRegistry, world: World
) -> None:
    """Though the configuration itself may pull, and has; the realm is passed on untouched."""
    registry.private[REPOSITORY] = {OWN_USER, "ann"}
    manifest = registry.push(REPOSITORY, LAYER)
    paths = [
        f"/v2/{REPOSITORY}/manifests/v1",
        f"/v2/{REPOSITORY}/manifests/{digest_of(manifest)}",
        f"/v2/{REPOSITORY}/blobs/{digest_of(LAYER)}",
    ]
    for path in paths:
        assert (await world.ask(path, "Bearer ann")).status == 200
    for path in paths:
        refused = await world.ask(path)
        assert code_of(refused) == (401, "UNAUTHORIZED", "Unauthenticated")
        realm = f'realm="{registry.url}/token",service="fake",scope="odd:scope:pull"'
        assert refused["www-authenticate"] == f"Bearer {realm}"


async def test_one_callers_verdict_is_not_anothers(registry: FakeRegistry, world: World) -> None:
    """What was cached for who may is not given to who may not, nor one repository's for another."""
    registry.private[REPOSITORY] = {OWN_USER, "ann"}
    registry.private["library/other"] = {OWN_USER, "bob"}
    registry.push(REPOSITORY, LAYER)
    registry.push("library/other", LAYER)
    mine = f"/v2/{REPOSITORY}/blobs/{digest_of(LAYER)}"
    other = f"/v2/library/other/blobs/{digest_of(LAYER)}"
    assert (await world.ask(mine, "Bearer ann")).body == LAYER
    assert (await world.ask(other, "Bearer bob")).body == LAYER
    for path, credential in ((mine, "Bearer bob"), (mine, "Bearer ann2"), (other, "Bearer ann")):
        assert (await world.ask(path, credential)).status == 401
    asked = len(registry.seen)
    assert (await world.ask(mine, "Bearer ann")).body == LAYER
    assert len(registry.seen) == asked, "a verdict holds for minutes"
    assert (await world.ask(mine, "Bearer bob")).status == 401
    assert len(registry.seen) > asked, "a refusal is not kept"


async def test_credentials_stay_apart(registry: FakeRegistry, world: World, tmp_path: Path) -> None:
    """Bodies are fetched with the configuration's credential, permission asked with the caller's;
    the caller's reaches neither the realm nor the host that blobs are redirected to."""
    async with running_registry() as storage:
        registry.private[REPOSITORY] = {OWN_USER, "ann"}
        registry.push(REPOSITORY, LAYER)
        storage.blobs = registry.blobs
        registry.storage = storage.url
        assert (await world.ask(f"/v2/{REPOSITORY}/manifests/v1", "Bearer ann")).status == 200
        path = f"/v2/{REPOSITORY}/blobs/{digest_of(LAYER)}"
        assert (await world.ask(path, "Bearer ann")).body == LAYER
        assert {seen.authorization for seen in storage.seen} == {None}
    by_whom = {seen.authorization: seen.path for seen in registry.seen if seen.path == "/token"}
    assert set(by_whom) == {basic(OWN_USER)}
    heads = [seen for seen in registry.seen if seen.method == "HEAD"]
    assert {seen.authorization for seen in heads} == {"Bearer ann"}
    assert "Bearer ann" not in {seen.authorization for seen in registry.bodies()}


async def test_what_the_configuration_may_not_pull_is_not_mirrored(
    registry: FakeRegistry, world: World
) -> None:
    """Its caller is told to go to the registry, so that nobody's secret fills a shared cache."""
    registry.private[REPOSITORY] = {"ann"}
    registry.push(REPOSITORY, LAYER)
    answers = [
        await world.ask(f"/v2/{REPOSITORY}/manifests/v1", "Bearer ann"),
        await world.ask(f"/v2/{REPOSITORY}/blobs/{digest_of(LAYER)}", "Bearer ann"),
    ]
    assert [code_of(answer) for answer in answers] == [(403, "DENIED", "OriginDenied")] * 2


async def test_unknown_things(registry: FakeRegistry, world: World) -> None:
    """Each in the words of a registry."""
    registry.push(REPOSITORY, LAYER)
    absent = digest_of(b"absent")
    answers = {
        f"/v2/{REPOSITORY}/manifests/v2": (404, "MANIFEST_UNKNOWN", "ManifestNotFound"),
        f"/v2/{REPOSITORY}/manifests/{absent}": (404, "MANIFEST_UNKNOWN", "ManifestNotFound"),
        f"/v2/{REPOSITORY}/blobs/{absent}": (404, "BLOB_UNKNOWN", "BlobNotFound"),
        f"/v2/{REPOSITORY}/tags/list": (404, "NAME_UNKNOWN", "NotFound"),
        "/v2/_catalog": (404, "NAME_UNKNOWN", "NotFound"),
    }
    for path, expected in answers.items():
        assert code_of(await world.ask(path)) == expected, path
    assert (await world.ask(f"/v2/{REPOSITORY}/manifests/v1")).status == 200
    # The repository is known to be public now: what is not there is found out by fetching.
    for path, expected in answers.items():
        assert code_of(await world.ask(path)) == expected, path


@pytest.mark.parametrize("way", ["digest", "tag"])
async def test_wrong_manifest(registry: FakeRegistry, world: World, way: str) -> None:
    """Other bytes than the digest promises are never served, and not kept."""
    manifest = registry.push(REPOSITORY, LAYER)
    key = (REPOSITORY, digest_of(manifest))
    registry.manifests[key] = manifest.replace(b"2", b"3", 1), OCI_MANIFEST
    path = f"/v2/{REPOSITORY}/manifests/{digest_of(manifest) if way == 'digest' else 'v1'}"
    assert code_of(await world.ask(path)) == (502, "DIGEST_INVALID", "DigestMismatch")
    assert code_of(await world.ask(path, method="GET"))[0] == 502


async def test_wrong_blob_never_completes(registry: FakeRegistry, world: World) -> None:
    """The last bytes are held back, and the connection ends short."""
    registry.push(REPOSITORY, LAYER)
    registry.blobs[REPOSITORY, digest_of(LAYER)] = LAYER[:-1] + b"!"
    path = f"/v2/{REPOSITORY}/blobs/{digest_of(LAYER)}"
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await world.ask(path)
    assert len(caught.value.partial) < len(LAYER)
    assert code_of(await world.ask(path)) == (502, "DIGEST_INVALID", "DigestMismatch")


async def test_manifest_too_large(registry: FakeRegistry, world: World) -> None:
    """4 MiB are the most that is read into memory."""
    manifest = registry.push(REPOSITORY, LAYER, annotations={"a": "x" * (4 * 1024 * 1024)})
    path = f"/v2/{REPOSITORY}/manifests/{digest_of(manifest)}"
    assert code_of(await world.ask(path))[0] == 502
    fits = registry.push(REPOSITORY, LAYER, tag="fits", annotations={"a": "x" * 4_000_000})
    assert (await world.ask(f"/v2/{REPOSITORY}/manifests/fits")).body == fits


async def test_busy(registry: FakeRegistry, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Always 503, also where the registry says 429: containerd repeats a 429 at the same host."""
    manifest = registry.push(REPOSITORY, LAYER)
    path = f"/v2/{REPOSITORY}/manifests/{digest_of(manifest)}"
    monkeypatch.setattr(world.mirror, "_manifests", ManifestReader(held_bytes_max=10))
    busy = await world.ask(path)
    assert code_of(busy) == (503, "UNAVAILABLE", "CacheBusy")
    assert int(busy["retry-after"]) >= 1
    registry.status = 429
    busy = await world.ask("/v2/library/unknown/manifests/v1")
    assert code_of(busy) == (503, "UNAVAILABLE", "OriginThrottled")


async def test_down(registry: FakeRegistry, world: World) -> None:
    """What is public and cached is served while the registry is down, and nothing else is."""
    registry.push(REPOSITORY, LAYER)
    registry.private["team/private"] = {OWN_USER, "ann", "bob"}
    registry.push("team/private", LAYER)
    blob = f"blobs/{digest_of(LAYER)}"
    assert (await world.ask(f"/v2/{REPOSITORY}/manifests/v1")).status == 200
    assert (await world.ask(f"/v2/{REPOSITORY}/{blob}")).body == LAYER
    assert (await world.ask(f"/v2/team/private/{blob}", "Bearer ann")).body == LAYER
    registry.status = 500
    assert (await world.ask(f"/v2/{REPOSITORY}/{blob}")).body == LAYER
    assert (await world.ask(f"/v2/team/private/{blob}", "Bearer ann")).body == LAYER
    for credential in ("Bearer bob", None):
        assert (await world.ask(f"/v2/team/private/{blob}", credential)).status == 502
    assert (await world.ask("/v2/library/unknown/manifests/v1")).status == 502
    dumped = json.dumps(world.mirror.dump())
    assert REPOSITORY in dumped
    assert "private" not in dumped
    assert "ann" not in dumped


async def test_only_bound_configurations_answer(registry: FakeRegistry, tmp_path: Path) -> None:
    """Making a configuration binds nothing; two hosts need to be told apart."""
    async with running_registry() as other:
        other.push(REPOSITORY, LAYER)
        configs = (
            wanted(registry.host, credentials=own_credentials()),
            wanted(other.host, namespace="tenant", name="evil"),
            wanted(registry.host, namespace="tenant", name="images"),
            wanted(other.host, namespace="team", name="moved"),
        )
        bindings = (
            f"{registry.host}=team/images",
            f"registry.example@{other.host}=team/absent",
            "moved.example=team/moved",
        )
        async with running_world(tmp_path, registry, *configs, bindings=bindings) as world:
            registry.push(REPOSITORY, LAYER)
            path = f"/v2/{REPOSITORY}/manifests/v1"
            assert (await world.ask(f"{path}?ns={registry.host}")).status == 200
            asked = len(other.seen)
            refused = {
                "": "UnknownHost",
                f"?ns={other.host}": "UnknownHost",
                "?ns=docker.io": "UnknownHost",
                "?ns=registry.example": "UnknownConfig",
                "?ns=moved.example": "MirrorMisbound",
            }
            for query, reason in refused.items():
                answer = await world.ask(path + query)
                assert code_of(answer) == (404, "NAME_UNKNOWN", reason)
            header = await world.ask(path, OCI_Namespace=registry.host)
            assert header.status == 200
            assert (await world.ask(f"{path}?ns=a&ns=b")).status == 400
            # The owner of a bound configuration cannot make it answer with another registry.
            await world.configs.replace([wanted(other.host)])
            answer = await world.ask(f"{path}?ns={registry.host}")
            assert code_of(answer) == (404, "NAME_UNKNOWN", "MirrorMisbound")
            assert len(other.seen) == asked


async def test_a_configuration_of_one_repository(registry: FakeRegistry, tmp_path: Path) -> None:
    """It answers for that one only, and shares blobs with readers by digest."""
    registry.push(REPOSITORY, LAYER)
    registry.push("library/other", LAYER)
    config = wanted(registry.host, credentials=own_credentials(), repository=REPOSITORY)
    async with running_world(tmp_path, registry, config) as world:
        assert (await world.ask(f"/v2/{REPOSITORY}/manifests/v1")).status == 200
        assert (await world.ask(f"/v2/{REPOSITORY}/blobs/{digest_of(LAYER)}")).body == LAYER
        assert (await world.ask(f"/v1/blobs/team/images/{digest_of(LAYER)}")).body == LAYER
        other = await world.ask("/v2/library/other/manifests/v1")
        assert code_of(other) == (404, "NAME_INVALID", "NameInvalid")


DIGEST = "sha256:" + "0" * 64
HOSTILE = [
    f"/v2/../blobs/{DIGEST}",
    f"/v2/a/../b/blobs/{DIGEST}",
    f"/v2/a/%2e%2e/blobs/{DIGEST}",
    f"/v2/a%2fb/blobs/{DIGEST}",
    f"/v2//blobs/{DIGEST}",
    f"/v2/a//b/blobs/{DIGEST}",
    f"/v2/A/blobs/{DIGEST}",
    f"/v2/a_/blobs/{DIGEST}",
    f"/v2/-a/blobs/{DIGEST}",
    f"/v2/a@b/blobs/{DIGEST}",
    f"/v2/{'a' * 300}/blobs/{DIGEST}",
    "/v2/a/blobs/latest",
    "/v2/a/blobs/",
    "/v2/a/blobs/sha256:",
    f"/v2/a/blobs/{DIGEST.upper()}",
    f"/v2/a/blobs/{DIGEST}0",
    f"/v2/a/blobs/{DIGEST}/",
    f"/v2/a/blobs/sha512:{'0' * 128}",
    "/v2/a/blobs/sha256%3a" + "0" * 64,
    "/v2/a/manifests/",
    "/v2/a/manifests/.hidden",
    "/v2/a/manifests/-x",
    "/v2/a/manifests/" + "x" * 129,
    "/v2/a/manifests/x%0d%0ay",
    "/v2/a/manifests/md5:00",
    "/v2/a/manifests/../x",
    "/v2/a/referrers/" + DIGEST,
    "/v2/a",
    "/v2/manifests/x",
    "/v2x/a/manifests/x",
]


async def test_hostile_paths(registry: FakeRegistry, world: World) -> None:
    """None reaches the registry."""
    for path in HOSTILE:
        assert (await world.ask(path)).status == 404, path
    for query in ("ns=", "ns=a%00b", "ns=a/b", "ns=http://a", "ns=" + "a" * 2000, "ns=%ff"):
        refused = await world.ask(f"/v2/a/manifests/x?{query}")
        assert refused.status in (400, 404), query
    assert not registry.seen


async def test_what_is_not_http_is_said_in_the_same_words(world: World) -> None:
    """A push, and a head that cannot be parsed."""
    pushed = await world.ask("/v2/a/blobs/uploads/", method="POST")
    assert code_of(pushed) == (405, "UNSUPPORTED", "MethodNotAllowed")
    broken = await world.ask("/v2/a/manifests/x", Content_Length="x")
    assert code_of(broken)[0] == 400
    elsewhere = await world.ask("/v1/blobs/a/b/c", method="POST")
    assert json.loads(elsewhere.body)["code"] == "MethodNotAllowed"
