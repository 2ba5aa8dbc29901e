"""`hosts.toml` with our entry in it: pure text, understood by containerd 1.6 and 2.2 alike.

containerd tries the `[host."…"]` tables in the file's order, then `server`, or where there is none
its built-in upstream of the host. It ignores fields it does not know: 1.6 has no `dial_timeout`
and dials for its fixed 30 s (remotes/docker/config/hosts.go of v1.6.20 and v2.2.9). A capability
it does not know makes it ignore the whole file, so only those of 1.6 are written.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from typing import Any

DIAL_TIMEOUT_DEFAULT = "200ms"
DIAL_TIMEOUT_MILLISECONDS_MAX = 1000
MARK = "# blobcache: this entry is removed by `blobcache-agent containerd-hosts restore`"

_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)
_DURATION = re.compile(r"([1-9][0-9]{0,3})(ms|s)")
_URL = re.compile(r"https?://[A-Za-z0-9._:\[\]-]{1,255}")


class UnfitFile(ValueError):
    """A hosts.toml that our entry cannot be joined to; the message is the rest of a sentence."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What containerd is told."""

    mirror: str
    """Base URL of the agent's data port."""
    dial_timeout: str = DIAL_TIMEOUT_DEFAULT
    server: str = ""
    """The upstream to name; "" leaves it to the file, or to containerd."""


def parse_url(text: str) -> str:
    """Return a URL of scheme, host and port.

    Raises:
        ValueError: It is something else; the message is the rest of a sentence.
    """
    if not _URL.fullmatch(text):
        raise ValueError("must be http:// or https:// with a host and a port at most")
    return text


def parse_dial_timeout(text: str) -> str:
    """Return a duration of at most a second, as Go writes it.

    Raises:
        ValueError: It is none; the message is the rest of a sentence.
    """
    match = _DURATION.fullmatch(text)
    milliseconds = int(match[1]) * (1000 if match[2] == "s" else 1) if match else 0
    if not 0 < milliseconds <= DIAL_TIMEOUT_MILLISECONDS_MAX:
        raise ValueError("must be from 1ms to 1s, such as 200ms")
    return text


def join(former: str, entry: Entry) -> str:
    """Return a file that asks us first, and then does what the former one said.

    The former text stays as it is, comments included; our table goes before its first one.

    Raises:
        UnfitFile: It is not TOML, or has an entry for our URL.
    """
    before = _parse(former, "must be valid TOML, which containerd ignores")
    if entry.mirror in _hosts(before):
        raise UnfitFile(f"must not have an entry for {entry.mirror} of its own")
    head, tables = former, ""
    first = _TABLE.search(former)
    if first is not None:
        head, tables = former[: first.start()], former[first.start() :]
    if head and not head.endswith("\n"):
        head += "\n"
    if entry.server and "server" not in before:
        head += f'server = "{entry.server}"\n'
    ours = (
        f'{MARK}\n[host."{entry.mirror}"]\n'
        '  capabilities = ["pull", "resolve"]\n'
        f'  dial_timeout = "{entry.dial_timeout}"\n'
    )
    joined = head + ours + ("\n" + tables if tables else "")
    _check(before, joined, entry)
    return joined


def _check(before: dict[str, Any], joined: str, entry: Entry) -> None:
    """See that nothing but our part has been added: text is cut where TOML may be cleverer."""
    after = _parse(joined, "must have its tables after its keys, in a form we can add to")
    hosts = _hosts(after)
    is_first = next(iter(hosts), None) == entry.mirror
    hosts.pop(entry.mirror, None)
    if not hosts and "host" not in before:
        after.pop("host", None)
    if "server" not in before:
        after.pop("server", None)
    if not is_first or after != before:
        raise UnfitFile("must have its tables after its keys, in a form we can add to")


def _parse(text: str, problem: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        raise UnfitFile(problem) from None


def _hosts(document: dict[str, Any]) -> dict[str, Any]:
    hosts = document.get("host")
    return hosts if isinstance(hosts, dict) else {}
