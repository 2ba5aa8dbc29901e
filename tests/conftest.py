"""What every test has: the harness's servers, a watched event loop, and honest skips.

A skip says why. Its reason begins with `cannot run here:` where the machine is the cause (no root,
no such kernel feature); any other skip fails when `CI=true`, for there it could have run.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
from blockbuster import BlockBuster
from hypothesis import settings

pytest_plugins = ["tests.harness.fixtures"]

OUR_PACKAGES = ["blobcache_agent", "blobcache_operator", "blobcache_storage"]
MACHINE_LACKS = "cannot run here: "

# Speed is never a test: a busy machine must not fail an example for taking long.
settings.register_profile("blobcache", deadline=None)
settings.load_profile("blobcache")


@functools.cache
def _watch() -> BlockBuster:
    """Build the detector once per process: it resolves each of the functions it wraps."""
    return BlockBuster(OUR_PACKAGES)


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a blocking call that our packages make in an event loop's thread.

    Only for coroutine tests: they run in the loop that is watched.
    """
    test = getattr(request.node, "obj", None)
    test = getattr(getattr(test, "hypothesis", None), "inner_test", test)
    if not inspect.iscoroutinefunction(test):
        yield
        return
    watch = _watch()
    watch.activate()
    try:
        yield
    finally:
        watch.deactivate()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Turn a test's avoidable skip into a failure on CI."""
    report: pytest.TestReport = yield
    if not hasattr(report, "wasxfail"):
        _refuse_avoidable_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Turn a module's avoidable skip (`importorskip`) into a failure on CI."""
    report: pytest.CollectReport = yield
    _refuse_avoidable_skip(report)
    return report


def _refuse_avoidable_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or os.environ.get("CI") != "true":
        return
    reason = _reason_of(report)
    if not reason.startswith(MACHINE_LACKS):
        report.outcome = "failed"
        report.longrepr = f"CI=true, and this machine could have run it: {reason}"


def _reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    where_and_why = report.longrepr
    reason = where_and_why[2] if isinstance(where_and_why, tuple) else str(where_and_why)
    return str(reason).removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List each skipped test with its reason: what was not run is part of the result."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section(f"{len(skipped)} not run, and why")
    for reason, name in sorted((_reason_of(report), report.nodeid) for report in skipped):
        terminalreporter.write_line(f"{name}: {reason}")
