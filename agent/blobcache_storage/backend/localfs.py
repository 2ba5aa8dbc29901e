"""Blobs that are files: below one folder, followed by no symbolic link.

Every path segment is opened relative to the folder before it with O_NOFOLLOW, so neither a link
planted in the folder nor a renamed parent leads out of it. Blocking calls run in threads of the
backend's own, so that a file system that hangs holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from typing_extensions import override

from blobcache_storage.backend.base import (
    BlobBackend,
    FetchStream,
    check_expected,
    resolve_span,
)
from blobcache_storage.backend.blob_id import check_joined_id
from blobcache_storage.backend.manners import ByteRate
from blobcache_storage.config import BackendConfig, LocalFSConfig
from blobcache_storage.device import (
    BlobVersion,
    ByteRange,
    RangeRequest,
    RequestSource,
    Validator,
)
from blobcache_storage.errors import (
    BlobChanged,
    BlobNotFound,
    ConfigError,
    OriginDenied,
    OriginRefused,
    OriginTimeout,
    OriginUnreachable,
    StorageError,
)

T = TypeVar("T")

THREADS: Final = 4
"""Files being opened or read at once, per backend."""
PIECE_BYTES: Final = 256 * 1024
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def _identity(status: os.stat_result) -> str:
    """Return what changes whenever a file's bytes may have changed."""
    return (
        f"{status.st_dev}:{status.st_ino}:{status.st_size}"
        f":{status.st_mtime_ns}:{status.st_ctime_ns}"
    )


def _version(status: os.stat_result) -> BlobVersion:
    etag = f'"{status.st_mtime_ns}-{status.st_size}"'
    return BlobVersion(status.st_size, Validator.FILE, _identity(status), etag)


def open_beneath(folder_fd: int, path: str) -> int:
    """Open a regular file below a folder for reading, following no symbolic link.

    Args:
        path: Relative, its segments neither empty nor dots.

    Returns:
        A descriptor that the caller closes.

    Raises:
        OSError: It is not there (ENOENT, ENOTDIR), a link (ELOOP), or not a regular file (EINVAL).
    """
    *folders, name = path.split("/")
    with contextlib.ExitStack() as opened:
        for segment in folders:
            folder_fd = os.open(segment, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder_fd)
            opened.callback(os.close, folder_fd)
        # Looked at before it is opened: opening a device or a pipe has effects of its own.
        if stat.S_ISLNK(mode := os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        fd = os.open(name, _FILE_FLAGS, dir_fd=folder_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


@contextlib.contextmanager
def _open_folder(root: str, below: str) -> Iterator[int]:
    """Open a folder: `root` as the administrator wrote it, `below` following no link."""
    fd = os.open(root, _FOLDER_FLAGS)
    try:
        for segment in filter(None, below.split("/")):
            parent, fd = fd, os.open(segment, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
            os.close(parent)
        yield fd
    finally:
        os.close(fd)


def _translate(error: OSError, blob_id: str) -> StorageError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return BlobNotFound(f"there is no file for blob '{blob_id}'", status=404)
    if error.errno in (errno.ELOOP, errno.EINVAL, errno.ENXIO):
        return OriginRefused(f"blob '{blob_id}' must be a regular file reached through no link")
    if error.errno in (errno.EACCES, errno.EPERM):
        return OriginDenied(f"the file of blob '{blob_id}' must be readable for this process")
    return OriginUnreachable(f"the file of blob '{blob_id}' cannot be read: {error.strerror}")


class _OpenFile:
    """A descriptor that is closed when nobody reads from it any more, in a thread."""

    def __init__(self, fd: int, threads: ThreadPoolExecutor) -> None:
        self._fd = fd
        self._threads = threads
        self._last: Future[bytes] | None = None
        self._is_closed = False

    def read(self, count: int, offset: int, identity: str) -> Future[bytes]:
        """Begin reading in a thread; one read at a time."""
        self._last = _submit(self._threads, lambda: self._read(count, offset, identity))
        return self._last

    def _read(self, count: int, offset: int, identity: str) -> bytes:
        piece = os.pread(self._fd, count, offset)
        # Looked at after the read: a write that came in between shows in the times.
        if _identity(os.fstat(self._fd)) != identity or len(piece) != count:
            raise BlobChanged("the file was changed while it was read")
        return piece

    def close(self) -> None:
        """Close, after a read that still hangs in its thread has ended."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._last is None or self._last.done():
            os.close(self._fd)
        else:
            self._last.add_done_callback(lambda _: os.close(self._fd))


class LocalStream(FetchStream):
    """A file's bytes, each piece checked to be still of the version announced."""

    def __init__(
        self,
        file: _OpenFile,
        version: BlobVersion,
        span: ByteRange,
        *,
        blob_id: str,
        rate: ByteRate,
        source: RequestSource,
        timeout_seconds: float,
    ) -> None:
        self.version = version
        self.span = span
        self._file = file
        self._blob_id = blob_id
        self._rate = rate
        self._source = source
        self._timeout_seconds = timeout_seconds
        self._pieces_left: AsyncGenerator[bytes, None] | None = None

    @override
    def promote(self) -> None:
        self._source = RequestSource.ON_DEMAND

    @override
    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._pieces_left is None:
            self._pieces_left = self._pieces()
        return self._pieces_left

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        offset = self.span.start
        while offset < self.span.end:
            count = min(PIECE_BYTES, self.span.end - offset)
            piece = await _bounded(
                self._file.read(count, offset, self.version.token),
                self._timeout_seconds,
                self._blob_id,
            )
            offset += len(piece)
            await self._rate.take(len(piece), lambda: self._source)
            yield piece

    @override
    async def aclose(self) -> None:
        if self._pieces_left is not None:
            await self._pieces_left.aclose()
        self._file.close()


def _closed() -> OriginUnreachable:
    return OriginUnreachable("the configuration that reads these files has ended")


def _submit(threads: ThreadPoolExecutor, work: Callable[[], T]) -> Future[T]:
    """Run in a thread.

    Raises:
        OriginUnreachable: The backend was shut down; a reader may still be at it.
    """
    try:
        return threads.submit(work)
    except RuntimeError:
        raise _closed() from None


async def _bounded(future: Future[T], timeout_seconds: float, blob_id: str) -> T:
    """Await what runs in a thread, for so long; what comes later is nobody's any more."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.shield(asyncio.wrap_future(future))
    except TimeoutError:
        raise OriginTimeout(
            f"the file of blob '{blob_id}' did not answer in {timeout_seconds:g} seconds"
        ) from None
    except OSError as error:
        raise _translate(error, blob_id) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if future.cancelled() and not (task is not None and task.cancelling()):
            raise _closed() from None  # by the shutdown: nobody cancelled us
        raise


def split_root(directory: str, roots: Sequence[str] | None) -> tuple[str, str]:
    """Return a folder as (permitted root, path below it).

    Args:
        roots: Folders the administrator permits; None permits all.

    Raises:
        ConfigError: The folder is not absolute, has dot segments, or lies below no root.
    """
    if not directory.startswith("/") or {".", ".."} & set(directory.split("/")):
        raise ConfigError("`localFS.directory` must be an absolute path without dot segments")
    clean = "/" + "/".join(filter(None, directory.split("/")))
    if roots is None:
        return clean, ""
    for root in roots:
        prefix = "/" + "/".join(filter(None, root.split("/")))
        if clean == prefix or clean.startswith(prefix.rstrip("/") + "/"):
            return prefix, clean[len(prefix.rstrip("/")) :].lstrip("/")
    raise ConfigError(
        "`localFS.directory` must be below a folder that the administrator permits"
        " (chart value `agent.localFSRoots`, flag --allow-localfs)"
    )


class LocalFSBackend(BlobBackend):
    """Files below a folder, else below each of the alternative folders, or one single file.

    Args:
        roots: Folders the administrator permits; None permits all.

    Raises:
        ConfigError: No folder is named, or one that is not permitted.
    """

    def __init__(self, config: BackendConfig, *, roots: Sequence[str] | None) -> None:
        assert config.localfs is not None
        self._config = config
        self._places = _places(config.localfs, roots)
        self._single = ""
        if config.localfs.blob_file:
            folder, _, self._single = config.localfs.blob_file.rpartition("/")
            self._places = [split_root(folder or "/", roots)]
            if not self._single:
                raise ConfigError("`localfs.blob_file` must name a file")
        self._rate = ByteRate(config.bytes_per_second_limit)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="origin-file")

    @override
    def check_blob_id(self, blob_id: str) -> str:
        return check_joined_id(blob_id)

    @override
    def digest_of(self, blob_id: str) -> str | None:
        return None

    def _open(self, blob_id: str) -> tuple[int, os.stat_result]:
        """Open a blob's file in the first place that has it; runs in a thread."""
        missing: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        for root, below in self._places:
            try:
                with _open_folder(root, below) as folder_fd:
                    fd = open_beneath(folder_fd, self._single or blob_id)
            except (FileNotFoundError, NotADirectoryError) as error:
                missing = error
                continue
            return fd, os.fstat(fd)
        raise missing

    async def _opened(self, blob_id: str) -> tuple[_OpenFile, BlobVersion]:
        future = _submit(self._threads, lambda: self._open(blob_id))
        try:
            fd, status = await _bounded(future, self._config.timeout_seconds, blob_id)
        except BaseException:
            # Whoever gave up must not leave a descriptor open that a thread opens later.
            future.add_done_callback(_close_late)
            raise
        return _OpenFile(fd, self._threads), _version(status)

    @override
    async def fetch(
        self,
        blob_id: str,
        request: RangeRequest,
        *,
        expect: BlobVersion | None = None,
        source: RequestSource = RequestSource.ON_DEMAND,
    ) -> FetchStream:
        blob_id = self.check_blob_id(blob_id)
        file, version = await self._opened(blob_id)
        try:
            check_expected(blob_id, version, expect)
            span = resolve_span(request, version.size_bytes)
        except BaseException:
            file.close()
            raise
        return LocalStream(
            file,
            version,
            span,
            blob_id=blob_id,
            rate=self._rate,
            source=source,
            timeout_seconds=self._config.timeout_seconds,
        )

    @override
    async def stat(self, blob_id: str) -> BlobVersion:
        file, version = await self._opened(self.check_blob_id(blob_id))
        file.close()
        return version

    @override
    def reconfigure(self, config: BackendConfig) -> None:
        self._config = config
        self._rate.reconfigure(config.bytes_per_second_limit)

    @override
    async def shutdown(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _close_late(future: Future[tuple[int, os.stat_result]]) -> None:
    if not future.cancelled() and future.exception() is None:
        os.close(future.result()[0])


def _places(section: LocalFSConfig, roots: Sequence[str] | None) -> list[tuple[str, str]]:
    directories = [section.directory, *section.alt_directories]
    places = [split_root(directory, roots) for directory in directories if directory]
    if not places and not section.blob_file:
        raise ConfigError("`localFS.directory` must be set")
    return places
