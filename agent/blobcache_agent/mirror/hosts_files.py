"""Writing our entry into a node's `certs.d`, and putting back exactly what was there.

What stood at a file's place is kept as it is: a second link to the very file, which `restore`
moves back, so that content, mode, owner and times are those of before. A record says what we
wrote and made. Steps, each atomic, in this order: keep, record, write. So after a crash at any of
them either nothing was changed, or the record says what to undo.

Blocking; run by a command of its own, as root, one at a time (`LOCK`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blobcache_agent.mirror.hosts_toml import Entry, UnfitFile, join

HOSTS_FILE = "hosts.toml"
OWN_FOLDER = ".blobcache"
"""No registry has such a name; containerd opens only folders named after registries."""
HOSTS_BYTES_MAX = 1024 * 1024
_LOCK = "LOCK"
_MADE_CERTS_DIR = "made-certs-dir"
_FORMER = "hosts.toml.former"
_RECORD = "record.json"
_FILE_MODE = 0o644
_FOLDER_MODE = 0o755
_CERTIFICATE_SUFFIXES = (".crt", ".cert", ".key")


@dataclass(frozen=True, slots=True)
class Record:
    """What we did for one host."""

    host: str
    folder: str
    """Below certs.d."""
    made_folder: bool
    had_file: bool
    written: tuple[str, ...]
    """SHA-256 of what we wrote; two while one replaces the other."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one host, in words."""

    host: str
    message: str
    is_left_alone: bool = False
    """Whether it was not done, because somebody must look at it first."""


class HostsFiles:
    """The hosts.toml files below one `certs.d`.

    Args:
        certs_dir: What containerd's `config_path` names; its parent must exist.
    """

    def __init__(self, certs_dir: Path) -> None:
        self._certs = certs_dir
        self._own = certs_dir / OWN_FOLDER

    def write(self, entries: Sequence[tuple[str, Entry]]) -> list[Outcome]:
        """Have containerd ask us first for these hosts, and for no others. Idempotent.

        Raises:
            OSError: The folder cannot be written.
        """
        made_certs = _make_folder(self._certs)
        _make_folder(self._own, 0o700)
        with self._locked():
            if made_certs:
                _replace(self._own / _MADE_CERTS_DIR, b"", 0o600)
            wanted = dict(entries)
            outcomes = [
                self._restore(record) for record in self._records() if record.host not in wanted
            ]
            return outcomes + [self._write(host, entry) for host, entry in wanted.items()]

    def restore(self) -> list[Outcome]:
        """Put back what was there before us. Idempotent.

        Raises:
            OSError: The folder cannot be written.
        """
        if not self._own.is_dir():
            return []
        with self._locked():
            outcomes = [self._restore(record) for record in self._records()]
            if any(outcome.is_left_alone for outcome in outcomes):
                return outcomes
            made_certs = (self._own / _MADE_CERTS_DIR).exists()
            for name in (_MADE_CERTS_DIR, _LOCK):
                (self._own / name).unlink(missing_ok=True)
            _remove_folder(self._own)
        if made_certs:
            _remove_folder(self._certs)
        return outcomes

    def _write(self, host: str, entry: Entry) -> Outcome:
        record = self._record_of(host)
        if record is not None and record.had_file and not os.path.lexists(self._former_of(host)):
            self._restore(record)
            record = None
        try:
            if record is None:
                return self._begin(host, entry)
            return self._renew(record, entry)
        except UnfitFile as error:
            return Outcome(host, f"left alone: its {HOSTS_FILE} {error}", is_left_alone=True)

    def _begin(self, host: str, entry: Entry) -> Outcome:
        """Write a host's file for the first time."""
        folder = self._folder_of(host)
        made_folder = not folder.is_dir()
        file, keep = folder / HOSTS_FILE, self._keep_of(host)
        former = b"" if made_folder else _read(file)
        if former is None or not former:
            self._check_unwritten(folder)
        text = join(_decode(former or b""), entry).encode()
        _make_folder(keep, 0o700)
        (keep / _FORMER).unlink(missing_ok=True)
        had_file = former is not None and not made_folder
        if had_file:
            os.link(file, keep / _FORMER, follow_symlinks=False)
        record = Record(host, folder.name, made_folder, had_file, (_sha256(text),))
        self._save(record)
        _make_folder(folder)
        _replace(file, text, _FILE_MODE)
        return Outcome(host, f"written to {file}")

    def _renew(self, record: Record, entry: Entry) -> Outcome:
        """Write it again if it should read otherwise, unless somebody else has changed it."""
        file = self._certs / record.folder / HOSTS_FILE
        former = _read(self._former_of(record.host)) if record.had_file else None
        text = join(_decode(former or b""), entry).encode()
        found = _read(file)
        if found == text:
            return Outcome(record.host, f"unchanged in {file}")
        if not self._is_ours(record, found, former):
            return Outcome(
                record.host,
                f"left alone: {file} was changed by somebody else after us; remove it, or our "
                "entry from it, and write again",
                is_left_alone=True,
            )
        self._save(replace(record, written=(*record.written[-1:], _sha256(text))))
        _make_folder(file.parent)
        _replace(file, text, _FILE_MODE)
        self._save(replace(record, written=(_sha256(text),)))
        return Outcome(record.host, f"written to {file}")

    def _restore(self, record: Record) -> Outcome:
        """Undo what we did for a host."""
        folder, keep = self._certs / record.folder, self._keep_of(record.host)
        file, kept = folder / HOSTS_FILE, keep / _FORMER
        # A former file that is not kept any more has been moved back before a crash.
        is_undone = record.had_file and not os.path.lexists(kept)
        if not is_undone:
            former = _read(kept) if record.had_file else None
            if not self._is_ours(record, _read(file), former):
                place = f"kept as {kept}" if record.had_file else "no file"
                return Outcome(
                    record.host,
                    f"left alone: {file} was changed by somebody else after us; what was there "
                    f"before is {place}",
                    is_left_alone=True,
                )
            self._undo(record, file, kept)
        if record.made_folder:
            _remove_folder(folder)
        (keep / _RECORD).unlink(missing_ok=True)
        _remove_folder(keep)
        return Outcome(record.host, f"restored {folder}")

    @staticmethod
    def _undo(record: Record, file: Path, kept: Path) -> None:
        """Put the former file back, or remove ours where there was none."""
        if not record.had_file:
            file.unlink(missing_ok=True)
        elif os.path.lexists(file) and os.path.samestat(file.lstat(), kept.lstat()):
            # Never replaced: to rename a file over itself would do nothing.
            kept.unlink()
        else:
            _make_folder(file.parent)
            os.rename(kept, file)
        if file.parent.is_dir():
            _sync(file.parent)

    @staticmethod
    def _is_ours(record: Record, found: bytes | None, former: bytes | None) -> bool:
        """Whether a file is as we left it: written, not yet written, or deleted since."""
        return found is None or found == former or _sha256(found) in record.written

    def _check_unwritten(self, folder: Path) -> None:
        """Refuse where a hosts.toml would switch off what holds without one.

        Raises:
            UnfitFile: Certificates in Docker's layout are read only where there is no hosts.toml,
                `_default` only where there is no folder.
        """
        if folder.is_dir():
            names = os.listdir(folder)
            if any(name.endswith(_CERTIFICATE_SUFFIXES) for name in names):
                raise UnfitFile(
                    "is missing, and certificates beside it hold only without one: name them in a "
                    f"{HOSTS_FILE} (`ca`, `client`) first"
                )
        elif (self._certs / "_default" / HOSTS_FILE).exists():
            raise UnfitFile(
                "is missing, and _default holds only without one: copy that file for this host "
                "first"
            )

    def _folder_of(self, host: str) -> Path:
        """Return the folder containerd reads for a host: `name_port_` goes before `name:port`."""
        name, colon, port = host.rpartition(":")
        first = self._certs / (f"{name}_{port}_" if colon and name else host)
        plain = self._certs / host
        return plain if plain.is_dir() and not first.is_dir() else first

    def _former_of(self, host: str) -> Path:
        return self._keep_of(host) / _FORMER

    def _keep_of(self, host: str) -> Path:
        return self._own / re.sub(r"[^a-z0-9.-]", "_", host)

    def _record_of(self, host: str) -> Record | None:
        return _load(self._keep_of(host) / _RECORD)

    def _records(self) -> list[Record]:
        found = (_load(path) for path in sorted(self._own.glob(f"*/{_RECORD}")))
        return [record for record in found if record is not None]

    def _save(self, record: Record) -> None:
        _replace(self._keep_of(record.host) / _RECORD, json.dumps(asdict(record)).encode(), 0o600)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._own / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _load(path: Path) -> Record | None:
    content = _read(path)
    if content is None:
        return None
    fields = json.loads(content)
    return Record(**{**fields, "written": tuple(fields["written"])})


def _read(path: Path) -> bytes | None:
    """Return a file's content, None if it is not there."""
    try:
        with path.open("rb") as file:
            return file.read(HOSTS_BYTES_MAX)
    except FileNotFoundError:
        return None


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UnfitFile("must be UTF-8") from None


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file so that it is always the old or the new one, also after a power cut."""
    fresh = path.with_name(f".{path.name}.blobcache-new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(fd, "wb") as file:
        # The umask and a file left by a crash have no say.
        os.fchmod(fd, mode)
        file.write(content)
        file.flush()
        os.fsync(fd)
    os.rename(fresh, path)
    _sync(path.parent)


def _make_folder(path: Path, mode: int = _FOLDER_MODE) -> bool:
    """Make a folder whose parent exists; return whether it was missing."""
    try:
        path.mkdir(mode)
    except FileExistsError:
        return False
    path.chmod(mode)
    _sync(path.parent)
    return True


def _remove_folder(path: Path) -> None:
    """Remove a folder unless somebody else has put something into it."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return
    _sync(path.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
