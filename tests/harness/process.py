"""Child processes that log to a file, are waited for with a deadline, and never outlive us."""

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

LOG_TAIL_LINES = 40
POLL_SECONDS_MIN = 0.02
POLL_SECONDS_MAX = 0.5
WORKERS_MAX = 8
"""Parallel test workers that share no port."""
PORT_FIRST = 20_000
PORT_LAST = 29_999
"""Below Linux's usual ephemeral range, so that no outgoing connection of anybody takes a port
while its server is being restarted."""
START_ATTEMPTS = 5

_LAUNCHER = Path(__file__).with_name("_launch.py")
_CLASH = "address already in use"

# The kernel's parent-death signal follows the thread that forked, not its process: all children
# are started by one thread that lives as long as the interpreter.
_SPAWNER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="harness-spawner")


class ChildFailedError(RuntimeError):
    """A child ended, or was not ready in time; the message carries the end of its log."""


class Child:
    """
    A running program in a session of its own, stopped by `stop()` or with this process.

    Args:
        command: Program and arguments; never a shell line.
        log: File that takes both output streams; appended to, so restarts keep the story.
        env: The whole environment; by default this process's, without `KUBECONFIG`.
        cwd: Working folder.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        self._process = _SPAWNER.submit(self._spawn, env, cwd).result()

    def _spawn(self, env: Mapping[str, str] | None, cwd: Path | None) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [*launcher, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else environment(),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id; also the id of its process group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended (negative: by that signal), or None while it runs."""
        return self._process.poll()

    def is_running(self) -> bool:
        """Say whether the program has not ended yet."""
        return self.returncode is None

    def log_text(self) -> str:
        """Return what this run wrote so far."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """Return the last lines this run wrote."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def wait_until(self, is_ready: Callable[[], bool], *, timeout: float) -> None:
        """
        Wait until the probe says yes; the child is stopped if it does not in time.

        Raises:
            ChildFailedError: The child ended, or the probe said no for `timeout` seconds.
        """
        if poll_until(lambda: not self.is_running() or is_ready(), timeout=timeout):
            if self.is_running():
                return
            raise ChildFailedError(self._story(f"ended with {self.returncode} before it was ready"))
        self.stop()
        raise ChildFailedError(self._story(f"was not ready within {timeout:g} s"))

    def wait(self, *, timeout: float) -> int:
        """
        Wait for the program to end by itself and return how it did.

        Raises:
            ChildFailedError: It still ran after `timeout` seconds; it goes on running.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ChildFailedError(self._story(f"still ran after {timeout:g} s")) from None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the program itself, if it still runs."""
        self._process.send_signal(number)

    def stop(self, *, timeout: float = 10.0) -> None:
        """Ask the program to end, insist after `timeout` seconds; what it started ends too."""
        if self.is_running():
            self._signal_group(signal.SIGTERM)
            poll_until(self._has_ended, timeout=timeout)
            self._signal_group(signal.SIGKILL)
        self._process.wait()

    def kill(self) -> None:
        """End the program at once, as a crash would."""
        if self.is_running():
            self._signal_group(signal.SIGKILL)
        self._process.wait()

    def _has_ended(self) -> bool:
        """Look without reaping, so that the process group's id stays ours until `wait()`."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _story(self, what: str) -> str:
        name = Path(self.command[0]).name
        return f"'{name}' {what}; the end of {self.log}:\n{self.log_tail()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without anybody's cluster, plus what is given."""
    kept = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    return {**kept, **extra}


def poll_until(is_done: Callable[[], bool], *, timeout: float) -> bool:
    """Ask again and again, ever more slowly, until yes or until the time is up."""
    deadline = time.monotonic() + timeout
    pause = POLL_SECONDS_MIN
    while not is_done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, POLL_SECONDS_MAX)
    return True


def free_port() -> int:
    """
    Return a loopback TCP port nobody listens on now, never the same twice in one process.

    A port may be handed out long before its user binds it, so nobody else in this process gets it
    meanwhile, and parallel test workers each have a part of the range to themselves. Another
    program may still take it: start servers with `start_on_free_ports` where that is possible.
    """
    ports = [port for port in _own_ports() if port not in _handed_out]
    for port in random.SystemRandom().sample(ports, min(len(ports), 200)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                _handed_out.add(port)
                return port
    raise OSError(f"No free port between {PORT_FIRST} and {PORT_LAST} was found")


_handed_out: set[int] = set()


def _own_ports() -> range:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if not worker:
        return range(PORT_FIRST, PORT_LAST + 1)
    return range(PORT_FIRST + int(worker[2:]) % WORKERS_MAX, PORT_LAST + 1, WORKERS_MAX)


def start_on_free_ports(
    count: int,
    start: Callable[..., Child],
    is_ready: Callable[..., bool],
    *,
    timeout: float,
) -> tuple[Child, tuple[int, ...]]:
    """
    Start a server on fresh ports and wait for it, with other ports when somebody was quicker.

    Args:
        count: How many ports the server needs.
        start: Called with that many ports; starts the server.
        is_ready: Called with the same ports until it says yes.
        timeout: Seconds for each attempt.

    Raises:
        ChildFailedError: The server failed for another reason than a taken port, or too often.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        ports = tuple(free_port() for _ in range(count))
        child = start(*ports)
        try:
            child.wait_until(functools.partial(is_ready, *ports), timeout=timeout)
        except ChildFailedError:
            if attempt == START_ATTEMPTS or _CLASH not in child.log_text().lower():
                raise
        except BaseException:
            child.stop()
            raise
        else:
            return child, ports
    raise AssertionError("unreachable")


def is_listening(port: int, address: str = "127.0.0.1") -> bool:
    """Say whether a connection to a port of this machine is accepted."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0
