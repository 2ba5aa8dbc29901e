"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

_VERSIONS = {"nginx": ("nginx", "-v"), "wrk": ("wrk", "-v"), "varnish": ("varnishd", "-V")}


def describe(arguments: Sequence[str]) -> dict[str, str]:
    """Return machine, versions, date and command, by name."""
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m bench", *arguments]),
        "commit": _say(("git", "rev-parse", "--short=12", "HEAD")).strip(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    for name, command in _VERSIONS.items():
        version = re.search(r"\d+\.\d+(\.\d+)?", _say(command))
        found[name] = version[0] if version else "not installed"
    return found


def load_average() -> float:
    """Return how many processes wanted a processor in the last minute."""
    return os.getloadavg()[0]


class Others:
    """What share of the machine others take while something is measured.

    Processor time that passed anywhere, less that of this process and of the children it has
    waited for.
    """

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8]]
        idle, stolen = ticks[3] + ticks[4], ticks[7]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return sum(ticks) - idle - own, stolen, sum(ticks)

    def percent(self) -> float:
        """Return their share of all processors since the beginning, in percent."""
        before, now = self._before, self._now()
        passed = now[2] - before[2]
        return max(0.0, (now[0] - before[0]) / passed * 100) if passed > 0 else 0.0


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _say(command: Sequence[str]) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return ""
    return ended.stdout + ended.stderr
