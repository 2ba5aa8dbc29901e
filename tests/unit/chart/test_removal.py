"""`blobcache-agent remove-cache`: ours goes, anybody else's stays."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from blobcache_agent.cli import cli
from blobcache_agent.errors import StartError
from blobcache_agent.removal import remove_cache
from blobcache_agent.state_file import StateFile
from blobcache_storage.cache.root import LAYOUT_NAME, LOCK_NAME


@pytest.fixture(name="root")
def root_fixture(tmp_path: Path) -> Path:
    """A root as an agent leaves it."""
    root = tmp_path / "blobcache"
    (root / LAYOUT_NAME / "folder").mkdir(parents=True)
    (root / LAYOUT_NAME / "folder" / "x.data").write_bytes(b"x")
    (root / LOCK_NAME).touch()
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        StateFile(fd).write(b"state")
    finally:
        os.close(fd)
    return root


def test_all_of_it_goes(root: Path) -> None:
    """Also the folder; a second time there is nothing to do."""
    assert remove_cache(root, wait_seconds=0).is_gone
    assert not root.exists()
    again = remove_cache(root, wait_seconds=0)
    assert again.is_gone
    assert not again.was_there


def test_what_is_not_ours_stays(root: Path) -> None:
    """An administrator may have given a folder that he uses otherwise, too."""
    (root / "photos").mkdir()
    done = CliRunner().invoke(cli, ["remove-cache", "--cache-root", str(root)])
    assert done.exit_code == 0
    assert "photos" in done.output
    assert [path.name for path in root.iterdir()] == ["photos"]


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    """Neither in place of the folder nor in it."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    (root / LAYOUT_NAME / "link").symlink_to(other)
    link = tmp_path / "link"
    link.symlink_to(root)
    with pytest.raises(StartError, match="no link"):
        remove_cache(link, wait_seconds=0)
    assert remove_cache(root, wait_seconds=0).is_gone
    assert (other / "precious").exists()


def test_an_agent_that_still_runs_is_waited_for(root: Path) -> None:
    """Nothing is touched while it holds the lock, and all goes once it lets go."""
    holder = os.open(root / LOCK_NAME, os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(StartError, match="still used"):
        remove_cache(root, wait_seconds=0)
    assert (root / LAYOUT_NAME).exists()
    assert remove_cache(root, wait_seconds=60, sleep=lambda _: os.close(holder)).is_gone
