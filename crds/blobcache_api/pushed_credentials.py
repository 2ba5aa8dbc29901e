"""Credentials on their way from operator to agent; they print and serialize masked."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, SecretStr, SerializationInfo, field_serializer

from blobcache_api.rules import Rule
from blobcache_api.v1alpha1.common import Model

SECRET_LENGTH_MAX = 16384
"""Characters of one secret value; session tokens reach a few thousand."""

REVEAL = "reveal"
"""Key of the serialization context that unmasks; `agent.dump_for_push` alone sets it."""
_MASK = "**********"

Secret = Annotated[SecretStr, Field(min_length=1, max_length=SECRET_LENGTH_MAX)]


class CredentialsState(StrEnum):
    """Whether a config's credentials are here."""

    NOT_REQUIRED = "NotRequired"
    PRESENT = "Present"
    PENDING = "Pending"


class PushedCredentials(Model):
    """Exactly one set: an access key, a user with a password, or a token."""

    access_key_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Access key (S3, OSS); its id is no secret but is not logged either."""
    secret_access_key: Secret | None = None
    """Belongs to the access key."""
    session_token: Secret | None = None
    """Comes with temporary access keys."""
    username: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """User (Registry, HTTPProxy)."""
    password: Secret | None = None
    """Belongs to the user."""
    token: Secret | None = None
    """Bearer token (Registry, HTTPProxy)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="",
            message=(
                "must hold exactly one set: accessKeyID and secretAccessKey, username and "
                "password, or token"
            ),
            holds=lambda credentials: credentials.has_one_set(),
        ),
    )

    def has_one_set(self) -> bool:
        """Whether exactly one complete set is here and nothing of another."""
        present = set(self.model_dump(exclude_none=True, by_alias=False))
        return (present - {"session_token"} if "access_key_id" in present else present) in (
            {"access_key_id", "secret_access_key"},
            {"username", "password"},
            {"token"},
        )

    @field_serializer("secret_access_key", "session_token", "password", "token")
    def _serialize_secret(self, value: SecretStr | None, info: SerializationInfo) -> str | None:
        if value is None:
            return None
        is_wire = isinstance(info.context, dict) and info.context.get(REVEAL) is True
        return value.get_secret_value() if is_wire else _MASK

    def secret_values(self) -> tuple[str, ...]:
        """Return the values that must not be shown, in a fixed order."""
        secrets = (self.secret_access_key, self.session_token, self.password, self.token)
        return tuple("" if value is None else value.get_secret_value() for value in secrets)
