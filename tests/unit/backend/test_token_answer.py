"""What a token service may say of a token's life."""

import pytest

from blobcache_storage.backend.registry_token import _parse_answer


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("30", 30.0), ("NaN", 60.0), ("Infinity", 3600.0), ("9" * 400, 3600.0), ("-1", 60.0),
        ('"x"', 60.0),
    ],
)  # fmt: skip
def test_lifetimes_are_bounded(said: str, seconds: float) -> None:
    """Neither a crash nor a token that is fetched anew for each request."""
    body = f'{{"token": "t", "expires_in": {said}}}'.encode()
    assert _parse_answer(body, "h") == ("t", seconds)
