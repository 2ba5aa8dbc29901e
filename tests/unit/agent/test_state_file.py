"""The file that holds the applied state: old or new after any crash, never trusted blindly."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blobcache_agent.state_file import StateFile, StateFileCorrupt


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    """A directory descriptor."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_absent_file_reads_as_none(root_fd: int) -> None:
    """A first start has no state."""
    assert StateFile(root_fd).read() is None


def test_what_was_written_is_read(root_fd: int, tmp_path: Path) -> None:
    """The content comes back, and only the owner may read the file."""
    StateFile(root_fd).write(b'{"a": 1}\nmore')
    assert StateFile(root_fd).read() == b'{"a": 1}\nmore'
    assert stat.S_IMODE((tmp_path / "agent-state").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["agent-state"]


def test_a_left_over_with_a_lax_mode_is_tightened(root_fd: int, tmp_path: Path) -> None:
    """A crash's left-over does not lend its mode to the new file."""
    left_over = tmp_path / ".agent-state.new"
    left_over.write_bytes(b"x" * 10_000)
    left_over.chmod(0o644)
    StateFile(root_fd).write(b"new")
    assert StateFile(root_fd).read() == b"new"
    assert stat.S_IMODE((tmp_path / "agent-state").stat().st_mode) == 0o600


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failure_at_any_step_keeps_the_old_content(
    root_fd: int, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails before the rename, the old content is what is read."""
    store = StateFile(root_fd)
    store.write(b"old")

    def fail(*_arguments: Any, **_named: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="No space"):
            store.write(b"new")
    assert StateFile(root_fd).read() == b"old"


def test_it_is_durable_in_the_right_order(root_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content is synced before the rename, the directory after it."""
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        steps.append("fsync directory" if fd == root_fd else "fsync file")
        real_fsync(fd)

    def rename(*arguments: Any, **named: Any) -> None:
        steps.append("rename")
        real_rename(*arguments, **named)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    StateFile(root_fd).write(b"content")
    assert steps == ["fsync file", "rename", "fsync directory"]


def test_every_flipped_byte_and_every_cut_is_noticed(root_fd: int, tmp_path: Path) -> None:
    """No damage passes for content."""
    store = StateFile(root_fd)
    store.write(b'{"state": "applied"}')
    path = tmp_path / "agent-state"
    good = path.read_bytes()
    for index in range(len(good)):
        damaged = bytearray(good)
        damaged[index] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(StateFileCorrupt):
            store.read()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(StateFileCorrupt):
            store.read()
    path.write_bytes(good)
    assert store.read() == b'{"state": "applied"}'


def test_a_symlink_is_not_followed(root_fd: int, tmp_path: Path) -> None:
    """Nobody makes the agent read another file through a link."""
    (tmp_path / "elsewhere").write_bytes(b"x")
    (tmp_path / "agent-state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        StateFile(root_fd).read()


def test_discard_removes_it(root_fd: int) -> None:
    """A discarded state is absent, and discarding twice is nothing."""
    store = StateFile(root_fd)
    store.write(b"x")
    store.discard()
    store.discard()
    assert store.read() is None
