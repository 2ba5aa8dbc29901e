"""What the README tells a newcomer to do works, and what it names exists."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from tests.harness.installation import REPOSITORY_ROOT, ask
from tests.harness.process import Child, environment, free_port, is_listening

README = (REPOSITORY_ROOT / "README.md").read_text()


def section(title: str) -> str:
    """Return the text below a heading, up to the next one of its level."""
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE
    )
    assert found, f"the README has no section '{title}'"
    return found[1]


def commands(text: str) -> list[str]:
    """Return the commands of console blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def test_standalone(tmp_path: Path) -> None:
    """The commands of "Without a cluster" show a miss that is stored, then a hit."""
    text = section("Without a cluster")
    serve = shlex.split(next(line for line in commands(text) if "standalone" in line))
    url = re.search(r"http://127\.0\.0\.1:7080(/v1/blobs/\S+)", text)
    assert url
    arguments = [str(tmp_path / "root") if word == "/tmp/blobs" else word for word in serve[1:]]
    if not Path("/usr/share/common-licenses/GPL-3").exists():
        pytest.skip("cannot run here: this system has no /usr/share/common-licenses")
    port = free_port()
    command = [sys.executable, "-m", "blobcache_agent", *arguments, f"--listen=127.0.0.1:{port}"]
    with Child(command, log=tmp_path / "log", env=environment(), cwd=REPOSITORY_ROOT) as child:
        child.wait_until(lambda: is_listening(port), timeout=30)
        shown = re.findall(r"^Cache-Status: (.*)$", text, re.MULTILINE)
        answers = [ask(f"http://127.0.0.1:{port}{url[1]}") for _ in shown]
    assert [answer.headers["cache-status"] for answer in answers] == shown
    assert {answer.body for answer in answers} == {
        Path("/usr/share/common-licenses/GPL-3").read_bytes()
    }


def test_links_and_files() -> None:
    """Every relative link and every path in a command exists."""
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    paths = re.findall(r"\b(?:examples|charts|operator|agent|docs)/[\w./-]*\w", README)
    missing = [path for path in {*links, *paths} if not (REPOSITORY_ROOT / path).exists()]
    assert not missing


def test_make_targets() -> None:
    """Every `make` target the README names is one."""
    makefile = (REPOSITORY_ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make ([a-z0-9]+)\b", "\n".join(commands(README)), re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z0-9]+)`", README))
    known = set(re.findall(r"^([a-z0-9]+):", makefile, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= known
