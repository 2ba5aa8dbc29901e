"""The command line: what is refused names the flag and what must change."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from blobcache_agent import __version__, cli, daemon
from blobcache_agent.errors import StartError, UsageError
from blobcache_agent.settings import (
    ListenAddress,
    MinFree,
    ServeSettings,
    StandaloneSettings,
)

GIB = 2**30
SERVE = ["serve", "--cache-root", "/c", "--node-name", "node-a", "--tls-dir", "/t"]
STANDALONE = ["standalone", "--cache-root", "/c", "a.yaml"]


class Started:
    """Catches the settings a command would run with."""

    def __init__(self) -> None:
        self.settings: Any = None
        self.error: Exception | None = None

    def run(self, settings: object) -> None:
        """Take the daemon's place."""
        self.settings = settings
        if self.error is not None:
            raise self.error


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """No daemon runs and no logger is set up."""
    caught = Started()
    monkeypatch.setattr(daemon, "run_serve", caught.run)
    monkeypatch.setattr(daemon, "run_standalone", caught.run)
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)
    return caught


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
    """Run a command line."""
    return CliRunner().invoke(cli.cli, arguments, env=env, prog_name="blobcache-agent")


def test_serve_defaults(started: Started) -> None:
    """Ports are those of the documentation, and nothing is allowed that was not."""
    assert invoke(*SERVE).exit_code == 0
    assert started.settings == ServeSettings(
        cache_root=Path("/c"),
        listen=ListenAddress("", 7080),
        health_listen=ListenAddress("", 7081),
        control_listen=ListenAddress("", 7443),
        tls_dir=Path("/t"),
        node_name="node-a",
        pod_uid="",
        permissions=started.settings.permissions,
    )
    permissions = started.settings.permissions
    assert permissions.roots_of("demo") == ()
    assert not permissions.allows_ambient("demo")
    assert not permissions.allows_insecure_tls("demo")


def test_serve_flags(started: Started) -> None:
    """Each flag arrives; several of one kind add up."""
    result = invoke(
        *SERVE,
        *("--listen", "[::1]:80", "--capacity", "200Gi", "--min-free", "10%"),
        *("--allow-localfs", "a=/x/", "--allow-localfs", "a=/y", "--allow-localfs", "*=/z"),
        *("--allow-origin-cidr", "10.0.0.0/8", "--allow-ambient-credentials", "b"),
        *("--allow-insecure-tls", "c", "--pod-uid", "u"),
    )
    assert result.exit_code == 0, result.output
    settings = started.settings
    assert settings.listen == ListenAddress("::1", 80)
    assert settings.capacity_bytes == 200 * GIB
    assert settings.min_free == MinFree(percent=10, bytes=0)
    assert settings.permissions.roots_of("a") == ("/x", "/y", "/z")
    assert settings.permissions.roots_of("q") == ("/z",)
    assert settings.allowed_origin_networks == (ipaddress.ip_network("10.0.0.0/8"),)
    assert settings.permissions.allows_ambient("b")
    assert settings.permissions.allows_insecure_tls("c")
    assert settings.pod_uid == "u"


def test_variables(started: Started) -> None:
    """Each flag has one; the flag wins."""
    env = {
        "BLOBCACHE_AGENT_CACHE_ROOT": "/env",
        "BLOBCACHE_AGENT_NODE_NAME": "node-b",
        "BLOBCACHE_AGENT_TLS_DIR": "/tls",
        "BLOBCACHE_AGENT_ALLOW_LOCALFS": "a=/x b=/y",
        "BLOBCACHE_AGENT_LISTEN": "127.0.0.1:1",
    }
    assert invoke("serve", "--listen", ":2", env=env).exit_code == 0
    assert started.settings.cache_root == Path("/env")
    assert started.settings.node_name == "node-b"
    assert started.settings.listen == ListenAddress("", 2)
    assert started.settings.permissions.roots_of("b") == ("/y",)


def test_standalone_defaults(started: Started) -> None:
    """Loopback only, no health port, files in the given order."""
    assert invoke(*STANDALONE, "b.yaml", "--allow-localfs", "/srv").exit_code == 0
    settings: StandaloneSettings = started.settings
    assert settings.listen == ListenAddress("127.0.0.1", 7080)
    assert settings.health_listen is None
    assert settings.files == (Path("a.yaml"), Path("b.yaml"))
    assert settings.permissions.roots_of("any") == ("/srv",)
    assert settings.permissions.allows_insecure_tls("any")
    assert not settings.permissions.allows_ambient("any")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["serve"], ["--cache-root", "BLOBCACHE_AGENT_CACHE_ROOT"]),
        ([*SERVE, "--listen", "7080"], ["--listen", "HOST:PORT"]),
        ([*SERVE, "--listen", ":70800"], ["--listen", "65535"]),
        ([*SERVE, "--listen", "::1:80"], ["--listen", "brackets"]),
        ([*SERVE, "--capacity", "lots"], ["--capacity", "'lots'", "100Gi"]),
        ([*SERVE, "--capacity", "0"], ["--capacity", "at least 1 byte"]),
        ([*SERVE, "--min-free", "99%"], ["--min-free", "95%"]),
        ([*SERVE, "--min-free", "x"], ["--min-free", "20%"]),
        ([*SERVE, "--allow-origin-cidr", "10.1.2.3/8"], ["--allow-origin-cidr", "host bits"]),
        ([*SERVE, "--allow-localfs", "/srv"], ["--allow-localfs", "NAMESPACE=DIR"]),
        ([*SERVE, "--allow-localfs", "a=srv"], ["--allow-localfs", "absolute"]),
        ([*SERVE, "--allow-localfs", "a=/x/../y"], ["--allow-localfs", "'..'"]),
        ([*SERVE, "--allow-insecure-tls", "A!"], ["--allow-insecure-tls", "namespace"]),
        ([*SERVE, "--node-name", "Node A"], ["--node-name", "'Node A'"]),
        ([*SERVE, "--log-level", "chatty"], ["--log-level", "debug"]),
        ([*SERVE, "--colour"], ["--colour"]),
        (["standalone", "--cache-root", "/c"], ["FILE"]),
        (["standlone"], ["standlone"]),
    ],
)
def test_what_is_wrong_is_named(started: Started, arguments: list[str], parts: list[str]) -> None:
    """Exit code 2, the flag, and what must change."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert started.settings is None
    for part in parts:
        assert part in result.output


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (StartError("no disk"), 1, ["Error: no disk"]),
        (UsageError(["a", "b"]), 2, ["Error: a", "Error: b"]),
    ],
)
def test_exit_codes(started: Started, error: Exception, code: int, lines: list[str]) -> None:
    """What stops the daemon is printed, without a traceback."""
    started.error = error
    result = invoke(*STANDALONE)
    assert result.exit_code == code
    assert result.output.splitlines() == lines


def test_help_teaches() -> None:
    """The help shows ports, variables and an example that can be pasted."""
    top, serve, standalone = (
        invoke(*words, "--help").output for words in ((), ("serve",), ("standalone",))
    )
    assert "serve" in top
    assert "standalone" in top
    assert "BLOBCACHE_AGENT_TLS_DIR" in serve
    assert "7443" in serve
    assert "curl" in standalone
    assert "SIGHUP" in standalone


def test_version() -> None:
    """It is the distribution's."""
    assert __version__ in invoke("--version").output


def test_the_floor_of_free_space() -> None:
    """The larger of a share and a byte count."""
    assert MinFree().of(2 * GIB) == GIB
    assert MinFree().of(100 * GIB) == 20 * GIB
    assert MinFree(percent=0, bytes=5).of(100 * GIB) == 5
