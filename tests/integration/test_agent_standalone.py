"""A real `blobcache-agent standalone`: files in, bytes out, signals, and what is refused."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.harness.process import Child, poll_until
from tests.integration.agent_world import (
    Origin,
    Standalone,
    config_yaml,
    content,
    http_backend,
    local_backend,
)

CANARY = "canary-4d2b9e"
SIZE = 300_000


@pytest.fixture
def origin() -> Iterator[Origin]:
    """An origin with one blob, `a/b`."""
    with Origin() as server:
        server.blobs["a/b"] = content("a/b", SIZE)
        yield server


@pytest.fixture
def agent(tmp_path: Path, origin: Origin) -> Iterator[Standalone]:
    """A standalone agent for the origin, not started."""
    file = tmp_path / "blobs.yaml"
    file.write_text(config_yaml("web", http_backend(origin)))
    made = Standalone(tmp_path, [file])
    yield made
    if made.child is not None:
        made.child.stop()


def test_a_miss_then_a_hit(agent: Standalone, origin: Origin) -> None:
    """The second read does not reach the origin; the bytes are the origin's."""
    agent.start()
    first = agent.read("default/web/a/b")
    assert (first.status, first.cache_status) == (200, "fwd=miss; stored")
    assert first.body == origin.blobs["a/b"]
    asked = len(origin.requests)
    assert asked >= 1
    second = agent.read("default/web/a/b")
    assert (second.status, second.cache_status) == (200, "hit")
    assert second.body == origin.blobs["a/b"]
    part = agent.read("default/web/a/b", {"Range": "bytes=100-199"})
    assert (part.status, part.cache_status) == (206, "hit")
    assert part.body == origin.blobs["a/b"][100:200]
    assert len(origin.requests) == asked
    assert agent.read("default/web/absent").status == 404
    unknown = agent.read("default/nothing/a/b")
    assert (unknown.status, unknown.code) == (404, "UnknownConfig")


def test_a_restart_keeps_the_cache(agent: Standalone, origin: Origin) -> None:
    """After SIGTERM and a new start everything is a hit, without one request to the origin."""
    agent.start()
    assert agent.read("default/web/a/b").status == 200
    assert agent.stop() == 0
    asked = len(origin.requests)
    agent.start()
    again = agent.read("default/web/a/b")
    assert (again.cache_status, again.body) == ("hit", origin.blobs["a/b"])
    assert len(origin.requests) == asked


def test_a_crash_loses_no_right_byte(agent: Standalone, origin: Origin) -> None:
    """After SIGKILL the bytes are right, wherever they come from."""
    child = agent.start()
    assert agent.read("default/web/a/b").status == 200
    child.kill()
    agent.start()
    assert agent.read("default/web/a/b").body == origin.blobs["a/b"]
    assert agent.read("default/web/a/b").cache_status == "hit"


def test_a_local_directory(tmp_path: Path) -> None:
    """LocalFS below an allowed directory; outside of it the start is refused."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "x").write_bytes(content("x", SIZE))
    file = tmp_path / "blobs.yaml"
    file.write_text(config_yaml("files", local_backend(source)))
    refused = Standalone(tmp_path, [file], ["--allow-localfs=/nowhere"]).run()
    assert refused.wait(timeout=30) == 2
    assert "--allow-localfs" in refused.log_text()
    agent = Standalone(tmp_path, [file], [f"--allow-localfs={tmp_path}"])
    with agent.start():
        assert agent.read("default/files/x").body == content("x", SIZE)
        assert agent.read("default/files/x").cache_status == "hit"
        assert agent.read("default/files/../../etc/passwd").status == 404


def test_sighup_takes_good_files_and_ignores_bad_ones(agent: Standalone, origin: Origin) -> None:
    """What is wrong is logged and changes nothing; what is gone is 404 and may come back."""
    child = agent.start()
    file = agent.files[0]
    good = file.read_text()
    assert agent.read("default/web/a/b").status == 200

    file.write_text(f"{good}\n---\n{good.replace('httpProxy', 'httpProxi')}")
    reload(child, "Kept the configuration")
    assert "spec.backend.httpProxi" in child.log_text()
    assert agent.read("default/web/a/b").cache_status == "hit"

    bundle = "-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n"
    broken = config_yaml("other", http_backend(origin, tls={"caBundle": bundle}))
    file.write_text(broken)
    reload(child, "Kept the configuration")
    assert agent.read("default/web/a/b").cache_status == "hit"

    file.write_text(config_yaml("other", http_backend(origin)))
    reload(child, "Applied the configuration")
    gone = agent.read("default/web/a/b")
    assert (gone.status, gone.code) == (404, "UnknownConfig")
    assert agent.read("default/other/a/b").cache_status == "fwd=miss; stored"

    file.write_text(f"{good}\n---\n{config_yaml('other', http_backend(origin))}")
    reload(child, "Applied the configuration")
    asked = len(origin.requests)
    assert agent.read("default/web/a/b").cache_status == "hit"
    assert agent.read("default/other/a/b").cache_status == "hit"
    assert len(origin.requests) == asked


def reload(child: Child, message: str) -> None:
    """Send SIGHUP and wait for one more line that says what came of it."""
    before = child.log_text().count(message)
    child.send_signal(signal.SIGHUP)
    assert poll_until(lambda: child.log_text().count(message) > before, timeout=10)


def test_sigterm_finishes_reads_under_way(agent: Standalone, origin: Origin) -> None:
    """No new reader is accepted, the one that is there gets every byte, the exit code is 0."""
    origin.blobs["slow"] = content("slow", 2_000_000)
    origin.pause_seconds = 0.05
    child = agent.start()
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=60)
    connection.request("GET", "/v1/blobs/default/web/slow")
    answer = connection.getresponse()
    begun = answer.read(1000)
    child.send_signal(signal.SIGTERM)
    assert poll_until(lambda: "Stopping" in child.log_text(), timeout=10)
    assert poll_until(lambda: refuses(agent.port), timeout=10)
    assert child.is_running()
    assert begun + answer.read() == origin.blobs["slow"]
    connection.close()
    assert child.wait(timeout=30) == 0
    origin.pause_seconds = 0
    agent.start()
    assert agent.read("default/web/slow").cache_status == "hit"


def refuses(port: int) -> bool:
    """Whether a new reader gets no connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.connect()
    except OSError:
        return True
    finally:
        connection.close()
    return False


def test_a_second_signal_stops_at_once(agent: Standalone, origin: Origin) -> None:
    """Whoever is impatient is not kept waiting by a reader."""
    origin.blobs["slow"] = content("slow", 4_000_000)
    origin.pause_seconds = 0.5
    child = agent.start()
    reading = threading.Thread(target=read_quietly, args=(agent.port,), daemon=True)
    reading.start()
    assert poll_until(lambda: "/slow" in origin.requests, timeout=10)
    child.send_signal(signal.SIGTERM)
    assert poll_until(lambda: "Stopping" in child.log_text(), timeout=10)
    begun = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) in (143, -15)
    assert time.monotonic() - begun < 5
    reading.join(timeout=10)


def read_quietly(port: int) -> None:
    """Read the slow blob, whatever becomes of it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/v1/blobs/default/web/slow")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return
    finally:
        connection.close()


def test_a_typo_is_refused_before_anything_happens(agent: Standalone) -> None:
    """Exit code 2, naming file, object and field; nothing was made on disk."""
    file = agent.files[0]
    file.write_text(file.read_text().replace("address", "adress"))
    child = agent.run()
    assert child.wait(timeout=30) == 2
    text = child.log_text()
    assert f"{file}: BlobCacheConfig default/web: `spec.backend.httpProxy.adress`" in text
    assert "Traceback" not in text
    assert not agent.cache_root.exists()


def test_a_cache_root_in_use_is_refused(agent: Standalone) -> None:
    """Two agents on one root would trample on each other."""
    agent.start()
    second = Standalone(agent.folder, agent.files).run()
    assert second.wait(timeout=30) == 1
    assert "--cache-root" in second.log_text()
    assert "another process" in second.log_text()
    assert "Traceback" not in second.log_text()


@pytest.mark.parametrize("flag", ["--listen", "--health-listen"])
def test_a_port_in_use_is_refused(agent: Standalone, flag: str, tmp_path: Path) -> None:
    """The message names the flag and the address."""
    agent.start()
    second = Standalone(tmp_path / "second", agent.files)
    second.folder.mkdir()
    if flag == "--listen":
        second.port = agent.port
        taken = agent.port
    else:
        second.health_port = taken = agent.health_port
    child = second.run()
    assert child.wait(timeout=30) == 1
    assert f"{flag} 127.0.0.1:{taken}: another process listens there" in child.log_text()
    assert "Traceback" not in child.log_text()


def test_credentials_reach_the_origin_and_nothing_else(agent: Standalone, origin: Origin) -> None:
    """The password is used, rotated by SIGHUP, and in no log, metric or file of the cache."""
    origin.authorization = "Basic dXNlcjpjYW5hcnktNGQyYjll"  # user:CANARY
    config = config_yaml("web", http_backend(origin, credentialsSecretRef={"name": "login"}))
    secret = (
        "apiVersion: v1\nkind: Secret\nmetadata: {name: login}\n"
        "stringData: {username: user, password: wrong-one}\n"
    )
    file = agent.files[0]
    file.write_text(f"{config}\n---\n{secret}")
    child = agent.start()
    denied = agent.read("default/web/a/b")
    assert (denied.status, denied.code) == (403, "OriginDenied")
    file.write_text(f"{config}\n---\n{secret.replace('wrong-one', CANARY)}")
    reload(child, "Applied the configuration")
    assert agent.read("default/web/a/b").body == origin.blobs["a/b"]
    metrics = agent.health("/metrics").body
    assert agent.stop() == 0
    kept = [path for path in agent.cache_root.rglob("*") if path.is_file()]
    assert kept
    for secret_value in (CANARY.encode(), b"dXNlcjpjYW5hcnktNGQyYjll", b"wrong-one"):
        assert secret_value not in metrics
        assert secret_value not in agent.log.read_bytes()
        assert not [path for path in kept if secret_value in path.read_bytes()]


def test_health_and_metrics(agent: Standalone, origin: Origin) -> None:
    """Alive, ready, and figures that agree with what was read."""
    agent.start()
    assert agent.health("/healthz").status == 200
    assert poll_until(lambda: agent.health("/readyz").status == 200, timeout=10)
    assert agent.read("default/web/a/b").status == 200
    assert agent.read("default/web/a/b").status == 200
    text = agent.health("/metrics").body.decode()
    samples = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    labels = '{name="web",namespace="default"}'
    assert float(samples[f"blobcache_agent_config_hit_bytes_total{labels}"]) == SIZE
    assert float(samples[f"blobcache_agent_config_miss_bytes_total{labels}"]) == SIZE
    assert float(samples[f"blobcache_agent_config_origin_bytes_total{labels}"]) == SIZE
    assert float(samples[f"blobcache_agent_config_requests_total{labels}"]) == 2
    assert float(samples[f"blobcache_agent_config_cached_bytes{labels}"]) >= SIZE
    assert float(samples['blobcache_agent_requests_total{result="hit"}']) == 1
    assert float(samples['blobcache_agent_requests_total{result="miss_stored"}']) == 1


def test_the_cache_root_is_ours_alone(agent: Standalone) -> None:
    """Made with mode 0700; a core dump is forbidden."""
    child = agent.start()
    assert agent.cache_root.stat().st_mode & 0o777 == 0o700
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]
