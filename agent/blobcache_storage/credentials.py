"""Credentials of an origin; secret values are a type that cannot print itself."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import SecretStr


@dataclass(frozen=True, slots=True)
class AccessKey:
    """S3 and OSS access keys; a session token comes with temporary ones."""

    access_key_id: str
    secret_access_key: SecretStr
    session_token: SecretStr | None = None


@dataclass(frozen=True, slots=True)
class BasicAuth:
    """User name and password (registry, HTTP proxy)."""

    username: str
    password: SecretStr


@dataclass(frozen=True, slots=True)
class BearerToken:
    """A token sent as it is (registry, HTTP proxy)."""

    token: SecretStr


@dataclass(frozen=True, slots=True)
class Anonymous:
    """No credentials are configured: requests are unsigned."""


@dataclass(frozen=True, slots=True)
class Ambient:
    """The platform's own credential chain (S3 only, where the administrator allows it)."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Credentials are configured but have not reached this process: misses cannot be filled."""


Credentials = AccessKey | BasicAuth | BearerToken | Anonymous | Ambient | Pending
