"""The rig."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.unit.cache.rig import Rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """Return a started rig and stop it."""
    started = await Rig(tmp_path / "root").start()
    yield started
    await started.stop()
