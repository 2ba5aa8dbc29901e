"""What the agent has taken, what it refuses, and what a restart finds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blobcache_agent.errors import ControlRefused, StalePush
from blobcache_agent.node_state import NodeState
from blobcache_agent.state_file import StateFile
from blobcache_api.agent import DesiredState, seal_config, seal_state
from blobcache_api.pushed_credentials import CredentialsState

CANARY = "canary-8f2f1c"


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    """A directory descriptor."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def state(epoch: int, revision: int, *names: str, node: str = "node-a") -> DesiredState:
    """Return a sealed state with one S3 config per name, with a secret."""
    configs: list[dict[str, Any]] = [
        {
            "namespace": "demo",
            "name": name,
            "uid": f"uid-{name}",
            "generation": 1,
            "spec": {
                "backend": {
                    "type": "S3",
                    "s3": {"endpoint": "https://s3.example", "bucket": "models"},
                    "credentialsSecretRef": {"name": "key"},
                }
            },
            "credentials": {"accessKeyID": "AKIA", "secretAccessKey": CANARY},
            "credentialsState": "Present",
        }
        for name in names
    ]
    plain = DesiredState.model_validate(
        {"epoch": epoch, "revision": revision, "node": node, "configs": configs}
    )
    sealed = tuple(seal_config(config, secret_version="1") for config in plain.configs)
    return seal_state(plain.model_copy(update={"configs": sealed}))


async def test_a_newer_state_is_taken_and_survives_a_restart(root_fd: int) -> None:
    """What a second process finds is the state without its secrets, these pending."""
    taken = NodeState(StateFile(root_fd), "node-a")
    await taken.take(state(5, 1, "models"))
    found = await asyncio.to_thread(NodeState(StateFile(root_fd), "node-a").load)
    assert found is not None
    assert (found.epoch, found.revision, found.digest) == (5, 1, state(5, 1, "models").digest)
    assert found.configs[0].credentials is None
    assert found.configs[0].credentials_state is CredentialsState.PENDING


async def test_no_secret_is_on_disk(root_fd: int, tmp_path: Path) -> None:
    """Not one byte of a credential is in any file of the root."""
    taken = NodeState(StateFile(root_fd), "node-a")
    await taken.take(state(5, 1, "models"))
    current = taken.current
    assert current is not None
    assert current.configs[0].credentials is not None
    written = await asyncio.to_thread((tmp_path / "agent-state").read_bytes)
    assert b"uid-models" in written
    assert CANARY.encode() not in written


@pytest.mark.parametrize("pushed", [(4, 9), (5, 1), (0, 0)])
async def test_an_older_state_is_refused(root_fd: int, pushed: tuple[int, int]) -> None:
    """An older epoch, or an older revision of the same one; the answer names the newest."""
    taken = NodeState(StateFile(root_fd), "node-a")
    await taken.take(state(5, 2, "models"))
    with pytest.raises(StalePush) as caught:
        await taken.take(state(*pushed))
    assert (caught.value.epoch, caught.value.revision) == (5, 2)
    assert taken.digest == state(5, 2, "models").digest


async def test_the_fence_holds_after_a_restart(root_fd: int) -> None:
    """A deposed leader is refused by an agent that was restarted meanwhile."""
    await NodeState(StateFile(root_fd), "node-a").take(state(5, 2))
    restarted = NodeState(StateFile(root_fd), "node-a")
    await asyncio.to_thread(restarted.load)
    with pytest.raises(StalePush):
        await restarted.take(state(5, 1))
    await restarted.take(state(6, 0))


async def test_the_same_state_again_is_taken_for_its_credentials(root_fd: int) -> None:
    """Equal revision and digest: idempotent, and what was pending is there again."""
    await NodeState(StateFile(root_fd), "node-a").take(state(5, 2, "models"))
    restarted = NodeState(StateFile(root_fd), "node-a")
    await asyncio.to_thread(restarted.load)
    again = await restarted.take(state(5, 2, "models"))
    assert again.configs[0].credentials is not None
    assert restarted.current is again


async def test_another_state_of_the_same_revision_is_refused(root_fd: int) -> None:
    """Two leaders with one epoch would be a bug; neither overwrites the other."""
    taken = NodeState(StateFile(root_fd), "node-a")
    await taken.take(state(5, 2, "models"))
    with pytest.raises(StalePush):
        await taken.take(state(5, 2, "models", "other"))


async def test_a_state_that_cannot_be_written_is_not_taken(
    root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Durable before acting: with a full disk the old state stays in force, and in the fence."""
    file = StateFile(root_fd)
    taken = NodeState(file, "node-a")
    await taken.take(state(5, 1, "models"))

    def fail(_content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file, "write", fail)
        with pytest.raises(ControlRefused) as caught:
            await taken.take(state(6, 0))
    assert (caught.value.status, caught.value.code) == (503, "StateNotDurable")
    assert (taken.epoch, taken.revision) == (5, 1)
    await taken.take(state(6, 0))


async def test_it_is_written_before_it_is_in_force(
    root_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between write and apply leaves a state that the next process acts on."""
    file = StateFile(root_fd)
    taken = NodeState(file, "node-a")
    real = file.write
    seen: list[DesiredState | None] = []

    def write(content: bytes) -> None:
        seen.append(taken.current)
        real(content)

    monkeypatch.setattr(file, "write", write)
    await taken.take(state(5, 1))
    assert seen == [None]


async def test_wrong_node_and_unknown_protocol_are_refused(root_fd: int) -> None:
    """Another node's state is a mistake of addressing; a newer protocol needs a newer agent."""
    taken = NodeState(StateFile(root_fd), "node-a")
    with pytest.raises(ControlRefused, match="node-b"):
        await taken.take(state(1, 1, node="node-b"))
    newer = state(1, 1).model_copy(update={"protocol_version": 99})
    with pytest.raises(ControlRefused, match="upgrade"):
        await taken.take(newer)
    assert taken.current is None


@pytest.mark.parametrize("content", [b"", b"not json", b'{"epoch": 1}', b'{"epoch":1,"x":2}'])
def test_unreadable_content_is_discarded(root_fd: int, content: bytes) -> None:
    """A file of another version, or of nothing we know, counts as absent and is removed."""
    StateFile(root_fd).write(content)
    assert NodeState(StateFile(root_fd), "node-a").load() is None
    assert StateFile(root_fd).read() is None


async def test_a_state_of_another_node_is_discarded(root_fd: int) -> None:
    """A disk that moved to another machine brings no tenants along."""
    await NodeState(StateFile(root_fd), "node-a").take(state(5, 1, "models"))
    assert await asyncio.to_thread(NodeState(StateFile(root_fd), "node-b").load) is None
    assert await asyncio.to_thread(StateFile(root_fd).read) is None
