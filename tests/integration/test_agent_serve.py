"""A real `blobcache-agent serve` with a pretended operator over real mutual TLS."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.harness.installation import AgentProcess, Answer
from tests.harness.process import poll_until
from tests.integration.agent_world import (
    Operator,
    Origin,
    content,
    http_backend,
    local_backend,
    pushed,
)
from tests.unit.agent.certificates import Authority, write_tls_dir

NODE = "node-a"
CANARY = "canary-93f0aa"
SIZE = 300_000
FAR_FUTURE = 2.0**35


class World:
    """An origin, an operator and one agent."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.origin = origin
        self.folder = folder
        self.operator = Operator(folder, NODE, lambda: self.agent.control_port)
        self.agent = AgentProcess(
            NODE,
            folder / "node",
            self.operator.tls_dir,
            [
                "--allow-origin-cidr=127.0.0.0/8",
                f"--allow-localfs=demo={folder}/allowed",
                "--min-free=1Mi",
            ],
        )

    def read(self, path: str, namespace: str = "demo", **headers: str) -> Answer:
        """Read as a pod of that namespace."""
        return self.agent.read(
            path, token=self.operator.readers.token(namespace), headers=dict(headers)
        )

    def push(self, epoch: int, revision: int, *configs: dict[str, Any], **extra: Any) -> list[Any]:
        """Push a state that is taken and return the results."""
        status, body = self.operator.push(epoch, revision, *configs, **extra)
        assert status == 200, body
        results: list[Any] = body.get("configs", [])
        return results

    def web(self, **extra: Any) -> dict[str, Any]:
        """Return the config `demo/web` for the origin."""
        return pushed("web", http_backend(self.origin), **extra)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A started agent that was told nothing yet."""
    with Origin() as origin:
        origin.blobs["a/b"] = content("a/b", SIZE)
        made = World(tmp_path, origin)
        made.agent.start()
        yield made
        made.agent.stop()


def test_before_and_after_the_first_push(world: World) -> None:
    """Alive but not ready and 503, then ready; readers need a token of the right namespace."""
    assert not world.agent.is_ready()
    early = world.read("demo/web/a/b")
    assert (early.status, early.code) == (503, "NoStateApplied")
    assert "retry-after" in early.headers

    (result,) = world.push(5, 1, world.web())
    assert (result["applied"], result["name"]) == (True, "web")
    assert world.agent.is_ready()
    first = world.read("demo/web/a/b")
    assert (first.status, first.cache_status) == (200, "fwd=miss; stored")
    assert first.body == world.origin.blobs["a/b"]
    assert world.read("demo/web/a/b").cache_status == "hit"
    assert world.agent.read("demo/web/a/b").status == 401
    assert world.read("demo/web/a/b", namespace="other").status == 403
    assert world.read("demo/absent/a/b").status == 404

    world.push(5, 2, world.web(spec={"readers": "Cluster"}))
    assert world.read("demo/web/a/b", namespace="other").cache_status == "hit"


def test_only_newer_states_are_taken(world: World) -> None:
    """Older epochs and revisions are 409, the same again is 200, and a restart forgets nothing."""
    world.push(5, 2, world.web())
    for epoch, revision in ((5, 1), (4, 9)):
        status, body = world.operator.push(epoch, revision)
        assert (status, body) == (409, {"epoch": 5, "revision": 2})
    assert world.push(5, 2, world.web())[0]["applied"]
    status, _ = world.operator.push(5, 2)
    assert status == 409
    assert world.read("demo/web/a/b").status == 200

    world.agent.kill()
    world.agent.start()
    status, body = world.operator.push(5, 1)
    assert (status, body) == (409, {"epoch": 5, "revision": 2})
    world.push(6, 0)
    assert world.read("demo/web/a/b").status == 404


def test_strangers_are_refused(world: World) -> None:
    """A certificate of another authority gets no connection, another name 403."""
    with pytest.raises(OSError):  # noqa: PT011 - TLS alert, reset or end of stream
        world.operator.ask("GET", "/v1/report", leaf=Authority("other").operator())
    status, body = world.operator.ask(
        "GET", "/v1/report", leaf=world.operator.authority.client("blobcache://agent")
    )
    assert (status, body["code"]) == (403, "NotTheOperator")


def test_certificates_are_read_again(world: World) -> None:
    """A rotation in the directory takes effect within seconds, without a restart."""
    world.push(5, 1, world.web())
    world.operator.authority = authority = Authority("new")
    write_tls_dir(world.operator.tls_dir, authority.certificate, authority.agent())

    def answers() -> bool:
        try:
            return world.operator.ask("GET", "/v1/report")[0] == 200
        except OSError:
            return False

    assert poll_until(answers, timeout=10)


def test_a_report_waits_for_what_matters(world: World) -> None:
    """It comes at once for any other number, and waits with the present one until a change."""
    world.push(5, 1, world.web())
    report = world.operator.report(after=0, wait=30)
    assert report["node"] == NODE
    assert report["bootId"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (report["epoch"], report["revision"]) == (5, 1)
    assert report["digest"] == world.operator.state(5, 1, world.web()).digest
    change = report["change"]

    begun = time.monotonic()
    assert world.operator.report(after=change, wait=2)["change"] == change
    assert time.monotonic() - begun >= 2

    begun = time.monotonic()
    reading = threading.Timer(0.5, world.read, ["demo/web/a/b"])
    reading.start()
    moved = world.operator.report(after=change, wait=30)
    reading.join()
    assert moved["change"] > change
    assert 0.4 < time.monotonic() - begun < 10

    settled = settle(world)
    for _ in range(5):
        assert world.read("demo/web/a/b").cache_status == "hit"
    assert world.operator.report(after=settled, wait=2)["change"] == settled
    config = world.operator.config_report("web")
    assert config["state"] == "Applied"
    assert config["hitBytes"] >= 5 * SIZE


def settle(world: World) -> int:
    """Return the change number once it stays."""
    change: int = world.operator.report()["change"]
    while (now := world.operator.report(after=change, wait=3)["change"]) != change:
        change = now
    return change


def test_reports_and_metrics_agree(world: World) -> None:
    """Both come from the managers' own figures."""
    world.push(5, 1, world.web())
    for _ in range(3):
        world.read("demo/web/a/b")
    config = world.operator.config_report("web")
    metrics = world.agent.metrics()
    pairs = {
        "requests_total": "requests",
        "hit_bytes_total": "hitBytes",
        "miss_bytes_total": "missBytes",
        "origin_bytes_total": "originBytes",
        "origin_errors_total": "originErrors",
        "cached_bytes": "bytes",
        "cached_blobs": "blobs",
    }
    labels = '{name="web",namespace="demo"}'
    for metric, reported in pairs.items():
        assert metrics[f"blobcache_agent_config_{metric}{labels}"] == config[reported], metric
    assert config["hitBytes"] + config["missBytes"] == 3 * SIZE
    assert config["bytes"] >= SIZE


def test_one_bad_config_does_not_block_others(world: World) -> None:
    """Each refusal has a reason and a remedy; the rest is served, the bad ones answer 503."""
    allowed = world.folder / "allowed"
    allowed.mkdir()
    (allowed / "x").write_bytes(b"local bytes")
    insecure = http_backend(world.origin, tls={"insecureSkipVerify": True})
    results = {
        result["name"]: result
        for result in world.push(
            5,
            1,
            pushed("etc", local_backend(Path("/etc"))),
            pushed("insecure", insecure),
            pushed("files", local_backend(allowed)),
            world.web(),
        )
    }
    assert {name: result["applied"] for name, result in results.items()} == {
        "etc": False,
        "insecure": False,
        "files": True,
        "web": True,
    }
    assert results["etc"]["reason"] == "LocalFSRefused"
    assert "--allow-localfs" in results["etc"]["message"]
    assert results["insecure"]["reason"] == "InsecureTLSRefused"
    refused = world.read("demo/etc/passwd")
    assert (refused.status, refused.code) == (503, "LocalFSRefused")
    assert world.read("demo/files/x").body == b"local bytes"
    assert world.read("demo/web/a/b").status == 200
    states = {config["name"]: config["state"] for config in world.operator.report()["configs"]}
    assert states == {"etc": "Failed", "insecure": "Failed", "files": "Applied", "web": "Applied"}


def test_denied_addresses_win_over_allowed_ones(world: World) -> None:
    """The cluster's own addresses are refused whatever the administrator allowed."""
    world.push(5, 1, world.web(), deniedAddresses=["127.0.0.1"])
    refused = world.read("demo/web/a/b")
    assert refused.status == 502
    assert refused.code == "OriginRefused"
    assert world.origin.requests == []
    world.push(5, 2, world.web())
    assert world.read("demo/web/a/b").status == 200


def test_malformed_pushes_change_nothing(world: World) -> None:
    """400 names the field; the former state goes on."""
    world.push(5, 1, world.web())
    status, body = world.operator.ask("PUT", "/v1/state", b'{"epoch": 6, "colour": "red"}')
    assert (status, body["code"]) == (400, "Malformed")
    assert "colour" in body["message"]
    assert world.read("demo/web/a/b").status == 200


def test_evictions(world: World) -> None:
    """In use is spared, another version too, unknown is said so, and the rest goes."""
    world.origin.blobs["slow"] = content("slow", 3_000_000)
    world.push(5, 1, world.web())
    assert world.read("demo/web/a/b").status == 200
    cold = victim(wait_until_idle(world, "a/b"))

    world.origin.pause_seconds = 0.05
    connection = http.client.HTTPConnection("127.0.0.1", world.agent.data_port, timeout=60)
    token = world.operator.readers.token("demo")
    connection.request(
        "GET", "/v1/blobs/demo/web/slow", headers={"Authorization": f"Bearer {token}"}
    )
    answer = connection.getresponse()
    begun = answer.read(1000)
    candidates = world.operator.report()["candidates"]
    slow = next(item for item in candidates if item["blobID"] == "slow")
    assert slow["inUse"]

    results = world.operator.evict(
        victim(slow),
        {**cold, "blobVersion": "another"},
        {**cold, "lastReadBefore": 1.0},
        {**cold, "blobID": "never-heard-of"},
        {**cold, "configUID": "nobody"},
        cold,
    )
    assert [result["outcome"] for result in results] == [
        "inUse",
        "changed",
        "inUse",
        "unknown",
        "unknown",
        "evicted",
    ]
    assert results[-1]["bytes"] >= SIZE
    assert begun + answer.read() == world.origin.blobs["slow"]
    connection.close()
    assert world.read("demo/web/a/b").cache_status == "fwd=miss; stored"


def wait_until_idle(world: World, blob_id: str) -> dict[str, Any]:
    """Return a candidate once what was fetched is written: until then it is in use."""
    found: dict[str, Any] = {}

    def is_idle() -> bool:
        candidates = world.operator.report()["candidates"]
        found.update(next(item for item in candidates if item["blobID"] == blob_id))
        return not found["inUse"]

    assert poll_until(is_idle, timeout=10)
    return found


def victim(candidate: dict[str, Any]) -> dict[str, Any]:
    """Return a candidate as a victim, however lately it was read."""
    return {
        "configUID": candidate["configUID"],
        "blobID": candidate["blobID"],
        "blobVersion": candidate["blobVersion"],
        "lastReadBefore": FAR_FUTURE,
        "reason": "Capacity",
    }


def test_pinned_blobs_are_spared(world: World) -> None:
    """A plan made before the pin does not win over it."""
    world.push(5, 1, world.web(spec={"eviction": {"pinned": ["a/b"]}}))
    assert world.read("demo/web/a/b").status == 200
    candidate = wait_until_idle(world, "a/b")
    assert candidate["pinned"]
    (result,) = world.operator.evict(victim(candidate))
    assert result["outcome"] == "pinned"


def test_absent_configs_are_orphans_and_tombstones_delete(world: World) -> None:
    """404 at once; the bytes wait for a return, for an eviction, or for the tombstone."""
    other = pushed("other", http_backend(world.origin))
    world.push(5, 1, world.web(), other)
    for path in ("demo/web/a/b", "demo/other/a/b"):
        assert world.read(path).status == 200

    world.push(5, 2, other)
    assert world.read("demo/web/a/b").status == 404
    assert poll_until(lambda: world.operator.report()["orphanBytes"] >= SIZE, timeout=15)
    asked = len(world.origin.requests)
    world.push(5, 3, world.web(), other)
    assert world.read("demo/web/a/b").cache_status == "hit"
    assert len(world.origin.requests) == asked

    world.push(5, 4, other)
    assert poll_until(lambda: world.operator.report()["orphanBytes"] >= SIZE, timeout=15)
    candidates = world.operator.report()["candidates"]
    orphan = next(item for item in candidates if item.get("orphan"))
    (result,) = world.operator.evict(victim(orphan))
    assert (result["outcome"], result["bytes"] >= SIZE) == ("evicted", True)

    world.push(5, 5, tombstones=["uid-demo-other"])
    assert world.read("demo/other/a/b").status == 404
    assert poll_until(lambda: world.operator.report()["disk"]["usedBytes"] == 0, timeout=15)
    assert not list((world.agent.cache_root).rglob("*.data"))


def test_a_restart_serves_hits_without_the_operator(world: World) -> None:
    """Hits from the persisted state; misses wait for credentials; a push brings them back."""
    world.origin.authorization = f"Bearer {CANARY}"
    world.origin.blobs["c"] = content("c", SIZE)
    private = pushed(
        "web",
        http_backend(world.origin, credentialsSecretRef={"name": "token"}),
        credentials={"token": CANARY},
        credentialsState="Present",
    )
    world.push(5, 1, private)
    assert world.read("demo/web/a/b").body == world.origin.blobs["a/b"]
    world.agent.stop()
    asked = len(world.origin.requests)

    world.agent.start()
    assert world.agent.is_ready()
    hit = world.read("demo/web/a/b")
    assert (hit.cache_status, hit.body) == ("hit", world.origin.blobs["a/b"])
    miss = world.read("demo/web/c")
    assert (miss.status, miss.code) == (503, "CredentialsPending")
    assert len(world.origin.requests) == asked
    pending = world.operator.config_report("web")
    assert (pending["state"], pending["reason"]) == ("Pending", "CredentialsPending")
    assert pending.get("appliedDigest", "") == ""

    world.push(5, 1, private)
    assert world.operator.config_report("web")["state"] == "Applied"
    assert world.read("demo/web/c").body == world.origin.blobs["c"]
    world.agent.stop()
    assert_no_canary(world)


def assert_no_canary(world: World) -> None:
    """No secret is in any file below the cache root, nor in a line of the log."""
    kept = [path for path in world.agent.cache_root.rglob("*") if path.is_file()]
    assert any(path.name == "agent-state" for path in kept)
    assert not [path for path in kept if CANARY.encode() in path.read_bytes()]
    assert CANARY not in world.agent.log.read_text()


def test_a_damaged_state_is_discarded(world: World) -> None:
    """It is logged once, nothing is served from it, and the next push is taken."""
    world.push(5, 1, world.web())
    assert world.read("demo/web/a/b").status == 200
    world.agent.stop()
    file = world.agent.cache_root / "agent-state"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)

    world.agent.start()
    assert not world.agent.is_ready()
    assert world.read("demo/web/a/b").status == 503
    assert world.agent.log.read_text().count("Discarded the state of an earlier run") == 1
    world.push(5, 1, world.web())
    assert world.read("demo/web/a/b").cache_status == "hit"


def test_sigterm_ends_long_polls_and_exits_with_zero(world: World) -> None:
    """A stop does not wait for the operator."""
    world.push(5, 1, world.web())
    change = world.operator.report()["change"]
    answers: list[int] = []

    def poll() -> None:
        answers.append(world.operator.report(after=change, wait=60)["change"])

    polling = threading.Thread(target=poll, daemon=True)
    polling.start()
    time.sleep(0.5)
    child = world.agent.child
    assert child is not None
    begun = time.monotonic()
    child.stop(timeout=20)
    assert child.returncode == 0
    assert time.monotonic() - begun < 10
    polling.join(timeout=10)
    assert answers == [change]
