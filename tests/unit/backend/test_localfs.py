"""Local files: no way out of the folder, and no byte of a file that changed."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from pathlib import Path

import pytest
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.backend import localfs
from blobcache_storage.backend.base import BlobBackend
from blobcache_storage.backend.localfs import LocalFSBackend, split_root
from blobcache_storage.config import BackendConfig, LocalFSConfig
from blobcache_storage.credentials import BearerToken
from blobcache_storage.device import RangeRequest, Validator
from blobcache_storage.errors import (
    BlobChanged,
    BlobNotFound,
    ConfigError,
    OriginDenied,
    OriginRefused,
    OriginTimeout,
    StorageError,
)

DATA = bytes(range(256)) * 4096
"""1 MiB, four pieces."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a blob, beside a secret."""
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "blob").write_bytes(DATA)
    (root / "sub" / "blob").write_bytes(b"below")
    return root


@pytest.fixture
def backend(folder: Path, open_any: OpenBackend) -> BlobBackend:
    """A backend of the folder."""
    return open_any(config_of(folder))


def config_of(folder: Path | str, *alternatives: Path) -> BackendConfig:
    """Return a configuration."""
    section = LocalFSConfig(str(folder), alt_directories=tuple(map(str, alternatives)))
    return BackendConfig(type="localfs", localfs=section)


async def read(backend: BlobBackend, blob_id: str) -> bytes:
    """Read a whole blob."""
    async with await backend.fetch(blob_id, RangeRequest()) as stream:
        return b"".join([piece async for piece in stream])


def open_files() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def test_files_below_the_folder(backend: BlobBackend, folder: Path) -> None:
    """A blob's tag tells its time and size, its identity all that changes with its bytes."""
    assert await read(backend, "sub/blob") == b"below"
    version = await backend.stat("blob")
    status = (folder / "blob").stat()
    assert version.validator is Validator.FILE
    assert version.etag == f'"{status.st_mtime_ns}-{status.st_size}"'
    assert version.token == (
        f"{status.st_dev}:{status.st_ino}:{status.st_size}"
        f":{status.st_mtime_ns}:{status.st_ctime_ns}"
    )


@pytest.mark.parametrize("kind", ["absolute", "relative", "folder", "dangling", "to a sibling"])
async def test_links_are_not_followed(backend: BlobBackend, folder: Path, kind: str) -> None:
    """A link in the folder leads nowhere, be it to another blob of the folder."""
    blob_id, to = {
        "absolute": ("link", str(folder.parent / "secret")),
        "relative": ("link", "../secret"),
        "folder": ("link/secret", str(folder.parent)),
        "dangling": ("link", "nowhere"),
        "to a sibling": ("link", "blob"),
    }[kind]
    (folder / "link").symlink_to(to)
    with pytest.raises((OriginRefused, BlobNotFound)):
        await backend.fetch(blob_id, RangeRequest())
    with pytest.raises((OriginRefused, BlobNotFound)):
        await backend.stat(blob_id)


async def test_only_regular_files(backend: BlobBackend, folder: Path) -> None:
    """Folders, pipes and sockets are no blobs; a pipe without a writer holds up nothing."""
    os.mkfifo(folder / "pipe")
    for blob_id in ("pipe", "sub"):
        with pytest.raises(OriginRefused):
            await backend.fetch(blob_id, RangeRequest())
    with pytest.raises(BlobNotFound):
        await backend.fetch("blob/below", RangeRequest())


@pytest.mark.parametrize("to", ["pipe", "link"])
async def test_a_file_swapped_while_opening(
    backend: BlobBackend, folder: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """What is opened is checked again: the look before may be out of date."""
    real = os.stat

    def swapping(path: str, **kwargs: object) -> os.stat_result:
        status = real(path, **kwargs)  # type: ignore[arg-type]
        if path == "blob":
            (folder / "blob").unlink()
            if to == "pipe":
                os.mkfifo(folder / "blob")
            else:
                (folder / "blob").symlink_to(folder.parent / "secret")
        return status

    monkeypatch.setattr(localfs.os, "stat", swapping)
    before = open_files()
    with pytest.raises(OriginRefused):
        await backend.fetch("blob", RangeRequest())
    assert open_files() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="cannot run here: root may read everything")
async def test_unreadable_files(backend: BlobBackend, folder: Path) -> None:
    """A file this process may not read is OriginDenied."""
    (folder / "blob").chmod(0)
    with pytest.raises(OriginDenied):
        await backend.fetch("blob", RangeRequest())


@pytest.mark.parametrize("change", ["overwrite", "truncate", "append", "touch", "unlink"])
async def test_a_change_while_reading_is_noticed(
    backend: BlobBackend, folder: Path, change: str
) -> None:
    """After any change of the file no further byte of it is served."""
    path = folder / "blob"

    def apply() -> None:
        if change == "overwrite":
            with path.open("r+b") as file:
                file.seek(900_000)
                file.write(b"x")
        elif change == "truncate":
            os.truncate(path, 300_000)
        elif change == "append":
            with path.open("ab") as file:
                file.write(b"x")
        elif change == "touch":
            os.utime(path, ns=(1, 1))
        else:
            path.unlink()

    stream = await backend.fetch("blob", RangeRequest())
    async with stream:
        pieces = aiter(stream)
        got = await anext(pieces)
        await asyncio.to_thread(apply)
        with pytest.raises(BlobChanged):
            await anext(pieces)
    assert got == DATA[: len(got)]


async def test_alternatives_in_order(folder: Path, tmp_path: Path, open_any: OpenBackend) -> None:
    """The first folder that has the blob serves it."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "extra").write_bytes(name.encode())
        (tmp_path / name / "blob").write_bytes(name.encode())
    backend = open_any(config_of(folder, tmp_path / "gone", tmp_path / "one", tmp_path / "two"))
    assert await read(backend, "blob") == DATA
    assert await read(backend, "extra") == b"one"
    with pytest.raises(BlobNotFound):
        await read(backend, "nowhere")


async def test_one_single_file(folder: Path, open_any: OpenBackend) -> None:
    """Nydus's `blob_file` is served under whatever id."""
    section = LocalFSConfig(blob_file=str(folder / "blob"))
    backend = open_any(BackendConfig(type="localfs", localfs=section))
    assert await read(backend, "any") == await read(backend, "other") == DATA


async def test_roots_bound_what_a_tenant_may_name(
    folder: Path, tmp_path: Path, open_any: OpenBackend
) -> None:
    """Below a permitted root, and through no link on the way down from it."""
    roots = (str(folder),)
    assert await read(open_any(config_of(folder / "sub"), localfs_roots=roots), "blob") == b"below"
    assert await read(open_any(config_of(folder), localfs_roots=roots), "blob") == DATA
    for outside in (tmp_path, f"{folder}x", "/", f"{folder}/../secret", "relative", f"{folder}/."):
        with pytest.raises(ConfigError, match="localFS"):
            open_any(config_of(outside), localfs_roots=roots)
    with pytest.raises(ConfigError, match="--allow-localfs"):
        open_any(config_of(folder), localfs_roots=())
    (folder / "way-out").symlink_to(tmp_path)
    sneaky = open_any(config_of(folder / "way-out"), localfs_roots=roots)
    with pytest.raises(StorageError):
        await sneaky.fetch("secret", RangeRequest())


async def test_the_administrators_root_may_be_a_link(
    folder: Path, tmp_path: Path, open_any: OpenBackend
) -> None:
    """What the administrator wrote is followed as it is."""
    (tmp_path / "alias").symlink_to(folder)
    backend = open_any(config_of(tmp_path / "alias"), localfs_roots=(str(tmp_path / "alias"),))
    assert await read(backend, "blob") == DATA


async def test_a_root_that_comes_later(tmp_path: Path, open_any: OpenBackend) -> None:
    """A folder that is not there yet is no error of the configuration."""
    backend = open_any(config_of(tmp_path / "later"))
    with pytest.raises(BlobNotFound):
        await backend.stat("blob")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "blob").write_bytes(b"x")
    assert await read(backend, "blob") == b"x"


async def test_a_file_system_that_hangs(
    backend: BlobBackend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that does not return is a time-out; the descriptor goes when it does return."""
    release, real = threading.Event(), os.pread

    def hang(fd: int, count: int, offset: int) -> bytes:
        release.wait(10)
        return real(fd, count, offset)

    before = open_files()
    monkeypatch.setattr(localfs.os, "pread", hang)
    backend.reconfigure(dataclasses.replace(config_of(folder), timeout_seconds=0.05))
    with pytest.raises(OriginTimeout):
        await read(backend, "blob")
    release.set()
    assert isinstance(backend, LocalFSBackend)
    await asyncio.to_thread(backend._threads.shutdown, wait=True)
    assert open_files() <= before


async def test_no_descriptor_is_left(backend: BlobBackend, folder: Path) -> None:
    """Served, refused, missing, left: every open is closed."""
    (folder / "link").symlink_to("blob")
    await read(backend, "blob")
    before = open_files()
    for _ in range(5):
        await read(backend, "blob")
        await backend.stat("sub/blob")
        stream = await backend.fetch("blob", RangeRequest(first=5))
        await stream.aclose()
        for blob_id in ("link", "sub", "missing", "missing/below", "link/below"):
            with pytest.raises(StorageError):
                await backend.fetch(blob_id, RangeRequest())
        with pytest.raises(StorageError):
            await backend.fetch("blob", RangeRequest(first=len(DATA)))
    assert open_files() == before


def test_sections_that_cannot_be(open_any: OpenBackend) -> None:
    """No folder, no file, or credentials: an error of the configuration."""
    for section in (LocalFSConfig(), LocalFSConfig(blob_file="/x/")):
        with pytest.raises(ConfigError):
            open_any(BackendConfig(type="localfs", localfs=section))
    with pytest.raises(ConfigError, match="credentials"):
        open_any(dataclasses.replace(config_of("/x"), credentials=BearerToken("t")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("directory", "roots", "wanted"),
    [
        ("/a//b/", None, ("/a/b", "")),
        ("/a/b", ("/a",), ("/a", "b")),
        ("/a/b/c", ("/x", "/a/b/"), ("/a/b", "c")),
        ("/a", ("/",), ("/", "a")),
        ("/", ("/",), ("/", "")),
    ],
)
def test_splitting_at_the_root(
    directory: str, roots: tuple[str, ...] | None, wanted: tuple[str, str]
) -> None:
    """The root is the administrator's, the rest is walked."""
    assert split_root(directory, roots) == wanted
