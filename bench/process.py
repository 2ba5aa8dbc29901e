"""Processes and folders of a run: started here, watched by pid, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
MIB = 1024 * 1024
GIB = 1024 * MIB
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A measurement cannot be taken; the message says what to do about it."""


class Process:
    """A server of this run, with whatever processes it starts itself.

    It is told to end when this process ends, however that comes about.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        setpriv = shutil.which("setpriv")
        guard = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
        self._name = name
        self._log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for this process, which then stops its servers in order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process that was started."""
        return self._popen.pid

    def pids(self) -> list[int]:
        """Return its pid and those of its children."""
        found = [self.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def cpu_seconds(self) -> float:
        """Return processor time used so far, in user and system mode."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                # The name in parentheses may hold anything, spaces too.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / _TICKS_PER_SECOND

    def memory_mib(self, field: str = "VmRSS", *, pid: int | None = None) -> float:
        """Return resident memory, or with "VmHWM" its highest, of itself or of a child."""
        for line in Path(f"/proc/{pid or self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        raise BenchError(f"{self._name} has no {field}")

    def wait_listening(self, port: int) -> None:
        """Return when it accepts connections."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            self.require_alive()
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=1),
            ):
                return
            time.sleep(0.002)
        raise BenchError(f"{self._name} did not listen within {START_SECONDS_MAX:g} s")

    def require_alive(self) -> None:
        """Raise what it said last if it ended."""
        if self._popen.poll() is not None:
            tail = self._log.read_text(errors="replace")[-1500:]
            raise BenchError(f"{self._name} ended with {self._popen.returncode}:\n{tail}")

    def hang_up(self) -> None:
        """Kill it: a power cut as far as it can tell."""
        self._popen.kill()
        self._popen.wait(STOP_SECONDS_MAX)

    def stop(self) -> None:
        """End it, by force if it takes too long; idempotent."""
        if self._popen.poll() is not None:
            return
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.hang_up()


@contextlib.contextmanager
def running(name: str, command: Sequence[str], folder: Path) -> Iterator[Process]:
    """Run a server for the time of a block."""
    process = Process(name, command, folder / f"{name}.log")
    try:
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder for the time of a block."""
    folder = Path(tempfile.mkdtemp(prefix="blobcache-bench-", dir=parent))
    try:
        # nginx's worker gives up root, where it has it, and must still get here.
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port of loopback nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
