"""The cluster, and what this machine lacks to have one."""

from collections.abc import Iterator

import pytest

from tests.e2e import images
from tests.e2e.local import LocalCluster, why_not_here


@pytest.fixture(scope="session")
def built() -> images.Images:
    """The project's images, built from its Dockerfiles."""
    _require()
    return images.build()


@pytest.fixture(scope="session")
def cluster(built: images.Images, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Two real nodes that have the images; on failure its logs are kept, and where is said."""
    made = LocalCluster(built.base.reference)
    with made:
        for image in (built.base, built.agent, built.operator):
            made.load_image(image.archive)
        yield made
        if request.session.testsfailed:
            folder = made.write_logs()
            reporter = request.config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter.write_line(f"\nlogs of every component: {folder}")


def _require() -> None:
    if why := why_not_here(images.missing_packages()):
        pytest.skip(f"cannot run here: {why}")
