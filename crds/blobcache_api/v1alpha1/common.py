"""What both resources and the messages share: the base model, bounded types, conditions."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from blobcache_api.rules import Rule, add_validation

INT64_MAX = 2**63 - 1
ERRORS_SHOWN_MAX = 5
"""Faults that one error message tells."""

_API_NAMES = {
    "access_key_id": "accessKeyID",
    "blob_id": "blobID",
    "config_uid": "configUID",
    "local_fs": "localFS",
    "secret_access_key": "secretAccessKey",
}


def to_api_name(name: str) -> str:
    """Return the camelCase name of a field, initials as Kubernetes writes them."""
    return _API_NAMES.get(name) or to_camel(name)


class Model(BaseModel):
    """Base of everything here: frozen, closed, camelCase outside and snake_case inside.

    Validation errors do not quote their input, which may be a secret.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_api_name,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    """Cross-field rules, checked on the API server and here."""

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.rules:
            rule.check(self)
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        result = handler(schema)
        inner = handler.resolve_ref_schema(result)
        for rule in cls.rules:
            inner.update(add_validation(inner, rule.cel, rule.message))
        return result

    def to_api(self) -> dict[str, Any]:
        """Return the JSON form: API names, nothing absent, enums and times as strings."""
        return self.model_dump(mode="json", exclude_none=True)


class MalformedError(ValueError):
    """Input that does not fit its model; the message names the fields and quotes no value."""


def describe_errors(error: ValidationError, *, root: str = "") -> str:
    """Return what is wrong, field by field, at most `ERRORS_SHOWN_MAX` of them, without values."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    told = [
        f"`{_format_path(root, fault['loc'])}`: {fault['msg'].removeprefix('Value error, ')}"
        for fault in faults[:ERRORS_SHOWN_MAX]
    ]
    more = len(faults) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def _format_path(root: str, location: tuple[int | str, ...]) -> str:
    path = root
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{str(part)[:64]}"
    return path.removeprefix(".") or "."


def rule_matching(pattern: str, message: str) -> Rule:
    """Return a rule that a string matches an RE2 pattern without quotes and backslashes."""
    if "'" in pattern or "\\" in pattern or "$" in pattern or "^" in pattern:
        raise ValueError(f"the pattern '{pattern}' means different things in CEL and Python")
    compiled = re.compile(pattern, re.ASCII)
    return Rule(
        cel=f"self.matches('^(?:{pattern})$')",
        message=message,
        holds=lambda text: compiled.fullmatch(text) is not None,
    )


_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = f"{_LABEL}([.]{_LABEL})*"

Namespace = Annotated[str, Field(min_length=1, max_length=63, pattern=f"^{_LABEL}$")]
"""Name of a namespace."""

ResourceName = Annotated[str, Field(min_length=1, max_length=63, pattern=f"^{_SUBDOMAIN}$")]
"""Name of a BlobCacheConfig."""

NodeName = Annotated[str, Field(min_length=1, max_length=253)]
"""Name of a Node."""

UID = Annotated[str, Field(min_length=1, max_length=64)]
"""A resource's uid; standalone makes them up from names."""

Reason = Annotated[str, Field(min_length=1, max_length=128, pattern="^[A-Za-z][A-Za-z0-9_]*$")]
"""CamelCase word for machines."""

Message = Annotated[str, Field(max_length=1024)]
"""A sentence for people."""

BLOB_ID_BYTES_MAX = 1024


def is_blob_id(value: str) -> bool:
    """Whether a string may name a blob: no empty, '.' or '..' segment, no control, not too long."""
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return False
    segments = value.split("/")
    controls = any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in value)
    return size <= BLOB_ID_BYTES_MAX and not controls and not {"", ".", ".."} & set(segments)


BLOB_ID_RULE = Rule(
    cel=(
        f"bytes(self).size() <= {BLOB_ID_BYTES_MAX} && "
        "!self.matches('(^|/)[.]{0,2}(/|$)|[[:cntrl:]]')"
    ),
    message=(
        "must be 1 to 1024 bytes without control characters and without empty, '.' or '..' segments"
    ),
    holds=is_blob_id,
)

BlobID = Annotated[str, Field(min_length=1, max_length=BLOB_ID_BYTES_MAX), BLOB_ID_RULE]
"""A blob's name as its origin knows it."""

Count = Annotated[int, Field(strict=True, ge=0, le=INT64_MAX)]
"""A number of things or bytes; 64 bits."""

Percent = Annotated[int, Field(strict=True, ge=0, le=100)]

Flag = Annotated[bool, Field(strict=True)]


def _require_zone(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("must be a time with its zone, such as 2026-01-31T12:00:00Z")
    return value.astimezone(UTC).replace(microsecond=0)


Time = Annotated[datetime, AfterValidator(_require_zone)]
"""A moment, to the second, in UTC."""


class ConditionStatus(StrEnum):
    """The three values of a condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Model):
    """One aspect of a resource's state (metav1.Condition)."""

    type: Annotated[
        str, Field(min_length=1, max_length=316, pattern="^[A-Za-z]([-A-Za-z0-9_./]*[A-Za-z0-9])?$")
    ]
    """Name of the condition, CamelCase."""
    status: ConditionStatus
    """True, False or Unknown."""
    observed_generation: Count | None = None
    """Generation of the spec this was found for."""
    last_transition_time: Time
    """When the status last changed from one value to another."""
    reason: Annotated[
        str,
        Field(min_length=1, max_length=1024, pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"),
    ]
    """CamelCase word that says why, for machines."""
    message: Annotated[str, Field(max_length=32768)]
    """What is so and what to do about it, for people."""


class LocalObjectReference(Model):
    """Name of an object in the same namespace."""

    name: Annotated[
        str,
        Field(min_length=1, max_length=253),
        rule_matching(
            _SUBDOMAIN,
            "must be an object's name: lower-case letters, digits, '-' and '.', beginning and "
            "ending with a letter or digit",
        ),
    ]
    """Name of the object."""


class ObjectMeta(Model):
    """The part of an object's metadata that is used; the rest is ignored."""

    model_config = ConfigDict(extra="ignore")

    name: ResourceName
    """Name, at most 63 characters."""
    namespace: Namespace = "default"
    """Namespace; files without one mean `default`."""
    uid: UID | None = None
    """Set by the API server."""
    generation: Count = 0
    """Counts changes of the spec; set by the API server."""
