"""The mirror of a real agent process: what it logs and writes, what it refuses to start with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.harness.installation import ask
from tests.harness.origins import FIRST_LOGIN, RegistryServer, basic_authorization, digest_of
from tests.harness.process import poll_until
from tests.integration.agent_world import Standalone, config_yaml
from tests.integration.mirror_world import mirror_of, push_image

pytestmark = pytest.mark.registry

CANARIES = ("canary-4d2b9e", "canary-basic")
OWN_SECRET = (
    "\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: own}\n"
    f"stringData: {{username: ann, password: {FIRST_LOGIN.password}}}\n"
)


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    """A registry that knows Ann."""
    with RegistryServer({"ann": FIRST_LOGIN}) as server:
        yield server


@pytest.fixture
def agent(registry: RegistryServer, tmp_path: Path) -> Iterator[Standalone]:
    """Its mirror, not started, with Ann's credential as its own."""
    backend = {"credentialsSecretRef": {"name": "own"}}
    extra = ["--log-level=debug"]
    made = mirror_of(registry, tmp_path / "agent", backend=backend, extra=extra)
    with made.files[0].open("a") as file:
        file.write(OWN_SECRET)
    yield made
    if made.child is not None:
        made.child.stop()


def test_pull_secrets_leave_no_trace(registry: RegistryServer, agent: Standalone) -> None:
    """Neither in a log line (debug, errors included), nor in a metric, an answer or a file."""
    image = push_image(registry, "team/private")
    agent.start()
    base = f"http://127.0.0.1:{agent.port}/v2/team/private"
    ann = basic_authorization("ann", FIRST_LOGIN.password)
    wrong = [
        {"Authorization": f"Bearer {CANARIES[0]}"},
        basic_authorization("ann", CANARIES[1]),
        {"Authorization": CANARIES[0]},
    ]
    paths = ["manifests/v1", f"blobs/{digest_of(image.layers[0])}", "manifests/absent", "nonsense"]
    bodies = [ask(f"{base}/{path}", headers=ann).body for path in paths]
    assert bodies[0] == image.manifest
    assert bodies[1] == image.layers[0]
    for headers in wrong:
        answers = [ask(f"{base}/{path}", headers=headers) for path in paths]
        assert [answer.status for answer in answers] == [401, 401, 401, 404]
        assert answers[0].headers["www-authenticate"] == 'Basic realm="blobcache"'
        bodies += [answer.body for answer in answers]
    registry.stop()
    for headers in wrong:
        bodies.append(ask(f"{base}/manifests/v1", headers=headers).body)
    bodies.append(agent.health("/metrics").body)
    assert agent.stop() == 0
    secrets = [canary.encode() for canary in (*CANARIES, FIRST_LOGIN.password)]
    shown = [value["Authorization"].split()[-1] for value in (*wrong, ann)]
    secrets += [value.encode() for value in shown]
    written = [agent.log, *(path for path in agent.cache_root.rglob("*") if path.is_file())]
    bodies += [path.read_bytes() for path in written]
    for secret in secrets:
        assert not [body for body in bodies if secret in body]


def test_what_is_public_survives_a_kill(tmp_path: Path) -> None:
    """An agent killed a while after a pull answers for the tag while the registry is down."""
    with RegistryServer() as registry:
        image = push_image(registry, "team/public")
        agent = mirror_of(registry, tmp_path / "agent")
        child = agent.start()
        url = f"http://127.0.0.1:{agent.port}/v2/team/public/manifests/v1"
        assert ask(url).body == image.manifest
        assert poll_until(lambda: (agent.cache_root / "mirror-memory").exists(), timeout=30)
        child.kill()
    child = agent.start()
    try:
        stale = ask(url)
        assert (stale.status, stale.body, stale.cache_status) == (200, image.manifest, "hit")
        assert stale.headers["warning"].startswith("110 ")
        assert int(stale.headers["age"]) >= 0
        missing = ask(f"http://127.0.0.1:{agent.port}/v2/team/other/manifests/v1")
        assert missing.status in (502, 504)
    finally:
        child.stop()


@pytest.mark.parametrize(
    ("binding", "problem"),
    [
        ("registry.example=default/images", "must name the registry host 'registry.example'"),
        ("registry.example=default/absent", "there is no BlobCacheConfig 'default/absent'"),
        ("registry.example=default/web", "must be of type Registry"),
    ],
)
def test_bindings_that_do_not_fit(tmp_path: Path, binding: str, problem: str) -> None:
    """Exit 2, with what must change; nothing is served for a host by mistake."""
    file = tmp_path / "all.yaml"
    images = config_yaml("images", {"type": "Registry", "registry": {"host": "other.example"}})
    web = {"type": "HTTPProxy", "httpProxy": {"address": "http://web.example"}}
    file.write_text(f"{images}\n---\n{config_yaml('web', web)}")
    agent = Standalone(tmp_path, [file], extra=[f"--containerd-mirror={binding}"])
    child = agent.run()
    assert child.wait(timeout=30) == 2
    assert problem in agent.log.read_text()
