"""What a report says of a manager's figures."""

from __future__ import annotations

import pytest

from blobcache_agent.report import degradation_of
from blobcache_storage.cache.base import ManagerStats


@pytest.mark.parametrize(
    ("degraded", "prefetch", "expected"),
    [
        ("", "", ("", "")),
        ("OriginTimeout", "BlobNotFound: no 'a'", ("OriginTimeout", "Slow.")),
        ("", "BlobNotFound: no 'a' (404): x", ("BlobNotFound", "no 'a' (404): x")),
        ("", "OriginDenied: origin refused 'a'", ("OriginDenied", "origin refused 'a'")),
        ("", "PrefetchExceedsCapacity: needs 5", ("", "")),
        ("", "CacheBusy: later", ("", "")),
    ],
)
def test_what_fails_for_the_list_is_told_like_what_fails_for_readers(
    degraded: str, prefetch: str, expected: tuple[str, str]
) -> None:
    """Readers' trouble first; a list that does not fit is no failure."""
    stats = ManagerStats(
        degraded_reason=degraded,
        degraded_message="Slow." if degraded else "",
        prefetch_problem=prefetch,
    )
    assert degradation_of(stats) == expected
