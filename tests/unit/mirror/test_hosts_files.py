"""Our entry in a node's certs.d: written, renewed, left alone, and taken out without a trace."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from blobcache_agent.cli import cli
from blobcache_agent.mirror import hosts_files
from blobcache_agent.mirror.hosts_files import HostsFiles
from blobcache_agent.mirror.hosts_toml import Entry, UnfitFile, join, parse_dial_timeout

MIRROR = "http://127.0.0.1:7080"
ENTRY = Entry(MIRROR)
OTHERS = """# ours since 2019
server = "https://upstream.example"
ca = "/etc/ca.pem"

[host."https://mirror.example"]
  capabilities = ["pull"]
  [host."https://mirror.example".header]
    x-team = ["a"]
"""


def picture(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return all there is below a folder: kind, mode, owner, inode or target, time, content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = (path.read_bytes(), facts.st_mtime_ns, facts.st_ino)
        name = str(path.relative_to(folder))
        found[name] = (stat.filemode(facts.st_mode), facts.st_uid, facts.st_gid, content)
    return found


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    """A certs.d that is not there yet."""
    return tmp_path / "certs.d"


def hosts_of(file: Path) -> list[str]:
    """Return the hosts of a file in containerd's order."""
    return list(tomllib.loads(file.read_text())["host"])


def test_nothing_was_there(certs: Path) -> None:
    """Everything is made, twice is once, and everything goes."""
    files = HostsFiles(certs)
    entries = [("docker.io", Entry(MIRROR, "300ms")), ("10.0.0.7:5000", ENTRY)]
    files.write(entries)
    written = picture(certs)
    assert tomllib.loads((certs / "docker.io" / "hosts.toml").read_text()) == {
        "host": {MIRROR: {"capabilities": ["pull", "resolve"], "dial_timeout": "300ms"}}
    }
    assert hosts_of(certs / "10.0.0.7_5000_" / "hosts.toml") == [MIRROR]
    assert [outcome.message.split()[0] for outcome in files.write(entries)] == ["unchanged"] * 2
    assert picture(certs) == written
    files.restore()
    assert not certs.exists()
    assert files.restore() == []


def make_file(certs: Path) -> None:
    """An administrator's file with a mode of its own."""
    folder = certs / "ghcr.example"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(OTHERS)
    (folder / "hosts.toml").chmod(0o640)
    (folder / "ca.crt").write_text("x")


def make_link(certs: Path) -> None:
    """A link to a file elsewhere."""
    folder = certs / "ghcr.example"
    folder.mkdir(parents=True)
    (certs.parent / "elsewhere.toml").write_text(OTHERS)
    (folder / "hosts.toml").symlink_to("../../elsewhere.toml")


def make_empty(certs: Path) -> None:
    """A folder without a file."""
    (certs / "ghcr.example").mkdir(parents=True)


@pytest.mark.parametrize("make", [make_file, make_link, make_empty])
def test_what_was_there_comes_back(certs: Path, make: Callable[[Path], None]) -> None:
    """The very file, with all that belongs to it; until then it is read after our entry."""
    make(certs)
    before = picture(certs.parent)
    files = HostsFiles(certs)
    files.write([("ghcr.example", ENTRY)])
    file = certs / "ghcr.example" / "hosts.toml"
    assert hosts_of(file)[0] == MIRROR
    if make is not make_empty:
        assert hosts_of(file) == [MIRROR, "https://mirror.example"]
        assert tomllib.loads(file.read_text())["server"] == "https://upstream.example"
        assert "# ours since 2019" in file.read_text()
    files.write([("ghcr.example", Entry(MIRROR, "1s"))])
    assert '"1s"' in file.read_text()
    files.restore()
    assert picture(certs.parent) == before


def test_a_host_no_longer_named_is_restored(certs: Path) -> None:
    """By the next write."""
    files = HostsFiles(certs)
    files.write([("a.example", ENTRY), ("b.example", ENTRY)])
    files.write([("b.example", ENTRY)])
    assert not (certs / "a.example").exists()
    assert (certs / "b.example" / "hosts.toml").exists()


def test_changed_after_us(certs: Path) -> None:
    """It is somebody else's now: told, and not touched; what was there before is kept."""
    make_file(certs)
    files = HostsFiles(certs)
    files.write([("ghcr.example", ENTRY)])
    file = certs / "ghcr.example" / "hosts.toml"
    file.write_text("server = 'https://changed.example'\n")
    for outcome in (*files.write([("ghcr.example", Entry(MIRROR, "1s"))]), *files.restore()):
        assert outcome.is_left_alone
        assert "changed by somebody else" in outcome.message
    assert file.read_text() == "server = 'https://changed.example'\n"
    assert (certs / ".blobcache" / "ghcr.example" / "hosts.toml.former").read_text() == OTHERS
    file.unlink()
    files.restore()
    assert file.read_text() == OTHERS
    assert not (certs / ".blobcache").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ghcr.example/tls.crt", "certificates beside it"),
        ("_default/hosts.toml", "_default"),
        ("ghcr.example/hosts.toml", 'server = "x'),
        ("ghcr.example/hosts.toml", f'[host."{MIRROR}"]\n'),
        ("ghcr.example/hosts.toml", 'a = """\n[x]\n"""\n'),
        ("ghcr.example/hosts.toml", f"host = {{ '{MIRROR}x' = {{}} }}\n"),
    ],
)
def test_files_that_ours_would_break(certs: Path, name: str, content: str) -> None:
    """They are left as they are, with the reason."""
    (certs / name).parent.mkdir(parents=True)
    (certs / name).write_text(content)
    before = picture(certs)
    files = HostsFiles(certs)
    (outcome,) = files.write([("ghcr.example", ENTRY)])
    assert outcome.is_left_alone
    files.restore()
    assert picture(certs) == before


@pytest.mark.parametrize("had_file", [True, False])
@pytest.mark.parametrize("step", range(1, 12))
def test_a_crash_at_any_step(
    certs: Path, monkeypatch: pytest.MonkeyPatch, had_file: bool, step: int
) -> None:
    """Writing again, or restoring, comes to the same as if there had been none."""
    (make_file if had_file else make_empty)(certs)
    before = picture(certs)
    for crash_in in ("write", "restore"):
        files = HostsFiles(certs)
        if crash_in == "restore":
            files.write([("ghcr.example", ENTRY)])
        left = [step]

        def crash(path: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(hosts_files, "_sync", crash)
        try:
            if crash_in == "write":
                files.write([("ghcr.example", ENTRY)])
            else:
                files.restore()
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        if crash_in == "write":
            (outcome,) = files.write([("ghcr.example", ENTRY)])
            assert not outcome.is_left_alone
            assert hosts_of(certs / "ghcr.example" / "hosts.toml")[0] == MIRROR
        assert not any(outcome.is_left_alone for outcome in files.restore())
        assert picture(certs) == before


@pytest.mark.parametrize("text", ["0s", "2s", "1001ms", "200", "-1s", "1h", "", "0.5s"])
def test_dial_timeouts_refused(text: str) -> None:
    """At most a second, in whole units."""
    with pytest.raises(ValueError, match="must be from 1ms to 1s"):
        parse_dial_timeout(text)


def test_an_empty_file_is_joined() -> None:
    """And a last line without an end is ended."""
    assert tomllib.loads(join("", ENTRY))["host"]
    assert tomllib.loads(join('server = "https://a"', ENTRY))["server"] == "https://a"
    with pytest.raises(UnfitFile):
        join("[[host]]\n", ENTRY)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--mirror", "127.0.0.1:7080", "--host", "a"], "--mirror"),
        (["--mirror", MIRROR, "--host", "a/../b"], "--host"),
        (["--mirror", MIRROR, "--host", "a=ftp://x"], "--host"),
        (["--mirror", MIRROR, "--host", "a", "--dial-timeout", "5s"], "--dial-timeout"),
        (["--mirror", MIRROR], "--host"),
    ],
)
def test_command_line(certs: Path, arguments: list[str], problem: str) -> None:
    """A flag that must be changed is named: exit 2."""
    command = ["containerd-hosts", "write", "--certs-dir", str(certs)]
    refused = CliRunner().invoke(cli, [*command, *arguments])
    assert refused.exit_code == 2
    assert problem in refused.output
    assert not certs.exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """Exit 1, with the reason."""
    command = ["containerd-hosts", "write", "--certs-dir", str(tmp_path / "no" / "certs.d")]
    failed = CliRunner().invoke(cli, [*command, "--mirror", MIRROR, "--host", "a"])
    assert failed.exit_code == 1
    assert "No such file or directory" in failed.output
