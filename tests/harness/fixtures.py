"""
Pytest plugin: the harness's servers as fixtures, one of each per worker process.

A test that uses one of the fixtures gets the marker of the programs behind it; a test that starts
servers itself carries the marker (`@pytest.mark.control_plane`). Programs are built once the tests
are chosen, before the first one runs, so that no test's timeout counts a build. What cannot be had
skips its tests with the reason.
"""

from collections.abc import Iterator, Sequence

import pytest

from tests.harness.binaries import ProgramMissingError, locate, preflight
from tests.harness.controlplane import ControlPlane
from tests.harness.origins import RegistryServer, S3Server

PROGRAMS_BY_MARKER = {
    "control_plane": ("etcd", "kube-apiserver", "kubectl"),
    "registry": ("registry",),
    "helm": ("helm",),
    "containerd": ("containerd", "ctr"),
    "conformance": ("oci-conformance",),
}
MARKER_BY_FIXTURE = {"control_plane": "control_plane", "registry_server": "registry"}

_UNAVAILABLE = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """A control plane shared by a worker's tests: use fresh namespaces, do not stop it."""
    with ControlPlane() as plane:
        yield plane


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server shared by a worker's tests: use fresh buckets and users."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="session")
def registry_server() -> Iterator[RegistryServer]:
    """A registry without users shared by a worker's tests: use fresh repositories."""
    with RegistryServer() as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use, before `-m` chooses."""
    for item in items:
        names: Sequence[str] = getattr(item, "fixturenames", ())
        for marker in {MARKER_BY_FIXTURE[name] for name in names if name in MARKER_BY_FIXTURE}:
            item.add_marker(marker)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the chosen tests need, showing progress in spite of captured output."""
    unavailable = session.config.stash.setdefault(_UNAVAILABLE, {})
    if session.config.option.collectonly:
        return
    needed = {name for item in session.items for name in _programs_of(item)}
    capture = session.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        for name in sorted(needed):
            if reason := _reason_unavailable(name):
                unavailable[name] = reason


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose programs cannot be had."""
    unavailable = item.config.stash.get(_UNAVAILABLE, {})
    reasons = [unavailable[name] for name in _programs_of(item) if name in unavailable]
    if reasons:
        pytest.skip("; ".join(reasons))


def _programs_of(item: pytest.Item) -> list[str]:
    """Return the programs behind an item's markers."""
    names = {mark.name for mark in item.iter_markers()}
    return [program for name, of in PROGRAMS_BY_MARKER.items() if name in names for program in of]


def _reason_unavailable(name: str) -> str:
    """Have a program, building it if need be; return why it cannot be had, else nothing."""
    if missing := preflight([name]):
        return "; ".join(f"{thing} is missing: {remedy}" for thing, remedy in missing)
    try:
        locate(name)
    except ProgramMissingError as error:
        return str(error)
    return ""
