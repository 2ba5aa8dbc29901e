"""containerd pulls through the mirror: Debian's 1.6 and 2.2, as told by the files we write."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.harness.origins import FIRST_LOGIN, RegistryServer, digest_of
from tests.harness.process import environment, free_port
from tests.integration.agent_world import Standalone
from tests.integration.mirror_world import (
    Containerd,
    Image,
    PullFailed,
    build_image,
    mirror_of,
    push_image,
    why_no_containerd,
)
from tests.unit.mirror.fake_registry import OCI_MANIFEST, FakeRegistry, running_registry

OWN_SECRET = (
    "\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: own}\n"
    "stringData: {username: own, password: secret-own}\n"
)
pytestmark = [pytest.mark.registry, pytest.mark.containerd]

NOT_FOREVER_SECONDS = 25.0
"""Go's own dial time-out is 30 s: a pull that met it once takes longer than this."""


@pytest.fixture(params=["containerd 1.6", "containerd 2.2"])
def containerd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Containerd]:
    """A containerd of that version."""
    if why := why_no_containerd():
        pytest.skip(why)
    is_debian = request.param == "containerd 1.6"
    made = Containerd(tmp_path / "containerd", is_debian, parallel_chunk_bytes=1024 * 1024)
    with made as running:
        yield running


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    """A registry of the test's own, which it may stop."""
    with RegistryServer() as server:
        yield server


@pytest.fixture
def agent(registry: RegistryServer, tmp_path: Path) -> Iterator[Standalone]:
    """An agent that mirrors the registry, not started."""
    made = mirror_of(registry, tmp_path / "agent")
    yield made
    if made.child is not None:
        made.child.stop()


def hosts(command: str, certs_dir: Path, *arguments: str) -> str:
    """Run `blobcache-agent containerd-hosts` and return what it said."""
    program = [sys.executable, "-m", "blobcache_agent", "containerd-hosts", command]
    done = subprocess.run(
        [*program, "--certs-dir", str(certs_dir), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def point(containerd: Containerd, registry: RegistryServer, port: int) -> None:
    """Have containerd ask a port of loopback first, then the registry."""
    mirror = f"http://127.0.0.1:{port}"
    host = f"{registry.host}={registry.url}"
    hosts("write", containerd.certs_dir, "--mirror", mirror, "--host", host)


def sent_bytes(registry: RegistryServer, image: Image) -> int:
    """Return how many bytes of bodies the registry has sent of an image's repository."""
    prefix = f"/v2/{image.repository}/"
    return sum(seen.body_bytes for seen in registry.requests.exchanges(path_prefix=prefix))


def test_pull_again_while_the_registry_is_down(
    containerd: Containerd, registry: RegistryServer, agent: Standalone
) -> None:
    """An emptied containerd pulls the same tag from the agent alone, even a restarted one."""
    image = push_image(registry, "team/app", layer_bytes=(5_000_000, 70_000))
    agent.start()
    point(containerd, registry, agent.port)
    reference = f"{registry.host}/{image.repository}:{image.tag}"
    containerd.pull(reference)
    # containerd 2.2 asks for ranges without end and leaves them in the middle; what was on its
    # way then is lost, a few hundred KiB for each.
    most = (1.02 if containerd.is_debian else 2) * image.size_bytes
    assert image.size_bytes <= sent_bytes(registry, image) <= most
    containerd.forget(reference)
    assert agent.stop() == 0
    registry.stop()
    agent.start()
    containerd.pull(reference)
    log = agent.log.read_text()
    assert all(digest_of(layer) in log for layer in image.layers)


def test_other_hosts_and_files_are_as_before(
    containerd: Containerd, registry: RegistryServer, agent: Standalone
) -> None:
    """A host nobody bound is pulled from its registry by way of a quick 404; so it is after
    the files were restored and the agent is gone."""
    with RegistryServer() as other:
        image = push_image(other, "other/app")
        agent.start()
        point(containerd, other, agent.port)
        reference = f"{other.host}/{image.repository}:{image.tag}"
        containerd.pull(reference)
        assert '"reason": "UnknownHost"' in agent.log.read_text()
        containerd.forget(reference)
        agent.stop()
        hosts("restore", containerd.certs_dir)
        assert not list(containerd.certs_dir.iterdir())


@pytest.mark.parametrize("layer_bytes", [(3_000_000, 40_000)])
def test_private_image(containerd: Containerd, tmp_path: Path, layer_bytes: Sequence[int]) -> None:
    """With the pull secret it comes by the mirror, without it does not come at all."""
    with ExitStack() as stack:
        registry = stack.enter_context(RegistryServer({"ann": FIRST_LOGIN}))
        image = push_image(registry, "team/private", layer_bytes=layer_bytes)
        agent = mirror_of(
            registry,
            tmp_path / "agent",
            backend={"credentialsSecretRef": {"name": "own"}},
        )
        secret = (
            "\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: own}\n"
            f"stringData: {{username: ann, password: {FIRST_LOGIN.password}}}\n"
        )
        with agent.files[0].open("a") as file:
            file.write(secret)
        child = agent.start()
        stack.callback(child.stop)
        point(containerd, registry, agent.port)
        reference = f"{registry.host}/{image.repository}:{image.tag}"
        containerd.pull(reference, login=f"ann:{FIRST_LOGIN.password}")
        assert digest_of(image.layers[0]) in agent.log.read_text()
        containerd.forget(reference)
        for login in ("", "ann:worthless"):
            with pytest.raises(PullFailed):
                containerd.pull(reference, login=login)


@contextmanager
def token_registry() -> Iterator[FakeRegistry]:
    """Run a registry that gives out tokens, in a thread of its own."""
    started: Future[FakeRegistry] = Future()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with running_registry() as registry:
            started.set_result(registry)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()], daemon=True)
    thread.start()
    try:
        yield started.result(timeout=30)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=30)
        loop.close()


def test_private_image_by_token(containerd: Containerd, tmp_path: Path) -> None:
    """containerd takes the challenge that was passed on to the realm, with the pull secret, and
    comes back with a token; the pull secret itself is never shown to the mirror."""
    image = build_image("team/private", layer_bytes=(200_000, 3_000))
    with token_registry() as registry, ExitStack() as stack:
        for blob in (image.config, *image.layers):
            registry.blobs[image.repository, digest_of(blob)] = blob
        registry.manifests[image.repository, image.digest] = image.manifest, OCI_MANIFEST
        registry.tags[image.repository, image.tag] = image.digest
        registry.private[image.repository] = {"ann", "own"}
        own = {"credentialsSecretRef": {"name": "own"}}
        agent = mirror_of(registry, tmp_path / "agent", backend=own)
        with agent.files[0].open("a") as file:
            file.write(OWN_SECRET)
        child = agent.start()
        stack.callback(child.stop)
        # No way around the mirror: what it does not answer is not pulled.
        mirror = f"http://127.0.0.1:{agent.port}"
        upstream = f"{registry.host}=http://127.0.0.1:{free_port()}"
        hosts("write", containerd.certs_dir, "--mirror", mirror, "--host", upstream)
        reference = f"{registry.host}/{image.repository}:{image.tag}"
        for login in ("", "bob:secret-bob", "ann:wrong"):
            with pytest.raises(PullFailed):
                containerd.pull(reference, login=login)
        containerd.pull(reference, login="ann:secret-ann")
        bodies = [seen for seen in registry.bodies() if seen.path.startswith("/v2/")]
        assert "Bearer ann" in {seen.authorization for seen in registry.seen}
        assert "Bearer own" in {seen.authorization for seen in bodies}
        assert "secret-ann" not in agent.log.read_text()


def test_dead_agent(containerd: Containerd, registry: RegistryServer, agent: Standalone) -> None:
    """A port where nobody listens costs a pull nothing that could be measured in dial time-outs."""
    image = push_image(registry, "team/app")
    point(containerd, registry, free_port())
    took = containerd.pull(f"{registry.host}/{image.repository}:{image.tag}")
    assert took < NOT_FOREVER_SECONDS


def test_agent_that_does_not_accept(registry: RegistryServer, tmp_path: Path) -> None:
    """Where packets vanish, each request costs the dial time-out, not containerd's 30 s."""
    if why := why_no_containerd():
        pytest.skip(why)
    image = push_image(registry, "team/app")
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            knocking = stack.enter_context(socket.socket())
            knocking.setblocking(False)
            knocking.connect_ex(deaf.getsockname())
        containerd = stack.enter_context(Containerd(tmp_path / "containerd", is_debian=False))
        point(containerd, registry, deaf.getsockname()[1])
        took = containerd.pull(f"{registry.host}/{image.repository}:{image.tag}")
    assert took < NOT_FOREVER_SECONDS
    hosts_file = next(containerd.certs_dir.glob("*/hosts.toml")).read_text()
    assert 'dial_timeout = "200ms"' in hosts_file
    assert took >= 0.2, "the port was not deaf: nothing was shown"
