"""Who pulls: what it shows is a secret, and what is remembered of it cannot be used by anybody."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from pydantic import SecretStr

_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller of one request; does not print what it shows."""

    authorization: SecretStr | None
    """The Authorization header as it came; None for an anonymous caller."""
    key: bytes
    """Names the credential in tables; b"" for an anonymous caller."""

    @property
    def is_anonymous(self) -> bool:
        """Whether it shows no credential."""
        return self.authorization is None


class CallerKeys:
    """Names credentials by a keyed hash under a key of this process, which is never written."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)

    def caller(self, authorization: str | None) -> Caller:
        """Return who shows this header."""
        if not authorization:
            return Caller(None, b"")
        digest = hmac.digest(self._key, authorization.encode("latin-1"), hashlib.sha256)
        return Caller(SecretStr(authorization), digest)
