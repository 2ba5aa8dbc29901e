"""The rig of the cache's tests."""

from tests.unit.cache.conftest import rig

__all__ = ["rig"]
