"""The agent's state file: damaged while the agent was down, and kills while it is written."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blobcache_agent.errors import ControlRefused
from blobcache_agent.node_state import NodeState
from blobcache_agent.state_file import StateFile
from blobcache_api.agent import DesiredState, drop_credentials, seal_config, seal_state
from tests.faults import scale

pytestmark = [pytest.mark.faults, pytest.mark.timeout(scale.timeout_seconds(300))]

DAMAGES = scale.scaled(1000)
REPETITIONS = scale.scaled(20, least=2)
NODE = "node-a"
STEPS = ("open", "fchmod", "write", "fsync", "close", "rename")
"""Calls of `StateFile.write`; fsync comes twice, the second one of the directory."""


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    """A directory descriptor."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def state(epoch: int, configs: int, node: str = NODE) -> DesiredState:
    """Return a sealed state."""
    plain = DesiredState.model_validate(
        {
            "epoch": epoch,
            "revision": 1,
            "node": node,
            "configs": [
                {
                    "namespace": "demo",
                    "name": f"web-{number}",
                    "uid": f"uid-{epoch}-{number}",
                    "generation": 1,
                    "spec": {
                        "backend": {"type": "HTTPProxy", "httpProxy": {"address": "http://h"}}
                    },
                }
                for number in range(configs)
            ],
        }
    )
    return seal_state(
        plain.model_copy(update={"configs": tuple(seal_config(one) for one in plain.configs)})
    )


def damaged(good: bytes, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a kind of damage and what it makes of a file."""
    start = rng.randrange(len(good))
    end = min(len(good), start + rng.choice((1, 8, 512, 4096)))
    kind = rng.choice(("flip", "tear", "truncate", "append", "splice", "double", "zeros"))
    damage = {
        "flip": good[:start] + bytes((good[start] ^ (1 << rng.randrange(8)),)) + good[start + 1 :],
        "tear": good[:start] + bytes(end - start) + good[end:],
        "truncate": good[:start],
        "append": good + rng.randbytes(rng.randrange(1, 64)),
        "splice": good[:start] + other[start:],
        "double": good[:end] + good[start:],
        "zeros": bytes(len(good)),
    }[kind]
    return kind, damage


def test_damage_is_never_applied(tmp_path: Path, root_fd: int) -> None:
    """The agent begins as if it had no state, and takes a new one; or the damage was none."""
    rng, done, harmless = random.Random(scale.seed()), Counter[str](), 0
    file, path = StateFile(root_fd), tmp_path / "agent-state"
    files = []
    for epoch, configs in ((5, 1), (6, 40)):
        asyncio.run(NodeState(file, NODE).take(state(epoch, configs)))
        files.append(path.read_bytes())
        path.unlink()
    while sum(done.values()) < DAMAGES:
        good, other = rng.sample(files, 2)
        kind, content = damaged(good, other, rng)
        path.write_bytes(content)
        loaded = NodeState(file, NODE).load()
        if content in files:
            harmless += 1
            assert loaded is not None
            continue
        done[kind] += 1
        assert loaded is None, f"seed {scale.seed()}: {kind} was applied"
        assert not path.exists(), "what is damaged must not be met at each start"
    asyncio.run(NodeState(file, NODE).take(state(7, 2)))
    assert NodeState(file, NODE).load() is not None
    print(f"seed {scale.seed()}: {dict(done)}, {harmless} changed nothing")  # noqa: T201
    assert min(done.values()) >= DAMAGES // 20, "void: a kind of damage was rare"


@pytest.mark.parametrize("kind", ["directory", "symlink", "other node", "FIFO"])
def test_what_is_no_state_file_stops_no_start(tmp_path: Path, root_fd: int, kind: str) -> None:
    """Whatever lies in its place, the agent starts without a state."""
    path = tmp_path / "agent-state"
    if kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to("/etc/passwd")
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        asyncio.run(NodeState(StateFile(root_fd), "node-b").take(state(5, 1, "node-b")))
    assert NodeState(StateFile(root_fd), NODE).load() is None


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_or_failing_disk_refuses_the_push(
    tmp_path: Path, root_fd: int, step: str, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator hears StateNotDurable; the old state stays in force; later all is well."""
    file = StateFile(root_fd)
    node = NodeState(file, NODE)
    asyncio.run(node.take(state(5, 1)))
    real = getattr(os, step)

    def fail(*arguments: Any, **named: Any) -> Any:
        if step == "close":
            real(*arguments)
        if step != "open" or arguments[0] == ".agent-state.new":
            raise OSError(error, os.strerror(error))
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(f"blobcache_agent.state_file.os.{step}", fail)
        with pytest.raises(ControlRefused) as caught:
            asyncio.run(_take(node, state(6, 2), patch, step, real))
    assert caught.value.code == "StateNotDurable"
    assert node.epoch == 5
    asyncio.run(node.take(state(6, 2)))
    found = NodeState(file, NODE).load()
    assert found is not None
    assert found.epoch == 6


async def _take(
    node: NodeState, pushed: DesiredState, patch: pytest.MonkeyPatch, step: str, real: Any
) -> None:
    try:
        await node.take(pushed)
    finally:
        patch.setattr(f"blobcache_agent.state_file.os.{step}", real)


def _write_and_die(root_fd: int, pushed: DesiredState, step: str, nth: int, moment: str) -> bool:
    """Take a state in a fork that is killed at a call; return whether it was."""
    child = os.fork()
    if child == 0:
        real, calls = getattr(os, step), 0

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == nth and moment == "amid" and step == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **named)
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        try:
            setattr(os, step, call)
            StateFile(root_fd).write(_content(pushed))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _content(pushed: DesiredState) -> bytes:
    return drop_credentials(pushed).model_dump_json(exclude_none=True).encode()


def test_no_kill_makes_a_mixture(root_fd: int) -> None:
    """kill -9 before, amid and after each call that persists a state: the old one or the new."""
    kills, seen = Counter[str](), Counter[str]()
    for step in STEPS:
        for nth in (1, 2) if step == "fsync" else (1,):
            for moment in ("before", "amid", "after") if step == "write" else ("before", "after"):
                for number in range(REPETITIONS):
                    old, new = state(10 + 2 * number, 3), state(11 + 2 * number, 30)
                    StateFile(root_fd).write(_content(old))
                    kills[step] += _write_and_die(root_fd, new, step, nth, moment)
                    found = NodeState(StateFile(root_fd), NODE).load()
                    assert found is not None, f"{moment} {step}: neither old nor new"
                    assert found in (old, new), f"{moment} {step}: a mixture"
                    is_new = found == new
                    seen["new" if is_new else "old"] += 1
                    is_renamed = (step == "rename" and moment == "after") or (step, nth) == (
                        "fsync",
                        2,
                    )
                    assert is_new == is_renamed, f"{moment} {step} {nth}"
    print(f"{kills.total()} kills {dict(kills)}; then {dict(seen)}")  # noqa: T201
    assert min(kills.values()) >= REPETITIONS
