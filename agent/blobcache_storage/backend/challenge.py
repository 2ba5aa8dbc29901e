"""WWW-Authenticate, parsed strictly, and which realm may be trusted with a credential.

Grammar: RFC 9110 sections 5.6.4, 11.2 to 11.4. A header that does not follow it is refused whole:
half-read challenges are how credentials end up elsewhere (CVE-2026-33540, CVE-2026-48978).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from yarl import URL

from blobcache_storage.backend.endpoint import is_address

HEADER_CHARACTERS_MAX: Final = 8190
CHALLENGES_MAX: Final = 16
PARAMETERS_MAX: Final = 16

_WORD: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED: Final = r'"((?:[\t !#-\[\]-~]|\\[\t -~])*)"'
_SEPARATOR: Final = re.compile(r"[ \t]*(?:,[ \t]*)+")
_SCHEME: Final = re.compile(rf"({_WORD})(?=[ \t]*(?:,|$)|[ ]+)")
_PARAMETER: Final = re.compile(rf"({_WORD})[ \t]*=[ \t]*(?:{_QUOTED}|({_WORD}))(?=[ \t]*(?:,|$))")
_TOKEN68: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))")
_ESCAPE: Final = re.compile(r"\\(.)")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?\.?")

SHARED_SUFFIXES: Final = frozenset(
    {
        "amazonaws.com",
        "aliyuncs.com",
        "appspot.com",
        "azurecr.io",
        "azurewebsites.net",
        "cloudfront.net",
        "github.io",
        "herokuapp.com",
        "myqcloud.com",
        "myhuaweicloud.com",
        "pkg.dev",
        "run.app",
        "windows.net",
    }
)
"""Domains under which strangers get names: like a public suffix, one label more is compared."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge; scheme and parameter names are lower-case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(values: Sequence[str]) -> list[Challenge]:
    """Return the challenges of all WWW-Authenticate headers of an answer.

    Raises:
        ValueError: A header breaks the grammar, repeats a parameter, or is too long.
    """
    challenges = [challenge for value in values for challenge in _parse_header(value)]
    if len(challenges) > CHALLENGES_MAX:
        raise ValueError("too many challenges")
    return challenges


def _parse_header(value: str) -> list[Challenge]:
    if len(value) > HEADER_CHARACTERS_MAX or not value.isascii():
        raise ValueError("a challenge header is too long or not ASCII")
    challenges: list[Challenge] = []
    at, end = 0, len(value)
    value = value.strip(" \t,")
    end = len(value)
    while at < end:
        parameter = _PARAMETER.match(value, at) if challenges else None
        if parameter is not None:
            _add_parameter(challenges[-1], parameter)
            at = parameter.end()
        else:
            scheme = _SCHEME.match(value, at)
            if scheme is None:
                raise ValueError("a challenge header breaks its grammar")
            challenges.append(Challenge(scheme.group(1).lower(), {}))
            at = scheme.end()
            at = _skip_spaces(value, at)
            token68 = _TOKEN68.match(value, at)
            if token68 is not None:
                at = token68.end()
            elif at < end and value[at] != ",":
                continue
        at = _skip_separator(value, at)
    return challenges


def _skip_spaces(value: str, at: int) -> int:
    while at < len(value) and value[at] in " \t":
        at += 1
    return at


def _skip_separator(value: str, at: int) -> int:
    if at == len(value):
        return at
    separator = _SEPARATOR.match(value, at)
    if separator is None:
        raise ValueError("a challenge header breaks its grammar")
    return separator.end()


def _add_parameter(challenge: Challenge, match: re.Match[str]) -> None:
    name, quoted, plain = match.groups()
    name = name.lower()
    if name in challenge.parameters or len(challenge.parameters) >= PARAMETERS_MAX:
        raise ValueError("a challenge repeats a parameter or has too many")
    challenge.parameters[name] = plain if quoted is None else _ESCAPE.sub(r"\1", quoted)


def registrable_domain(host: str) -> str | None:
    """Return the part of a name that one party registered, erring towards the longer.

    Without a public-suffix list: two labels, or three where the second looks like a country's
    category (`co.uk`, `com.cn`) or is a suffix shared by strangers. None for addresses and names
    of one label.
    """
    labels = host.lower().rstrip(".").split(".")
    if is_address(host) or len(labels) < 2 or not all(labels):
        return None
    is_category = len(labels[-1]) == 2 and len(labels[-2]) <= 3
    count = 3 if is_category or ".".join(labels[-2:]) in SHARED_SUFFIXES else 2
    return ".".join(labels[-count:]) if len(labels) >= count else None


def is_realm_trusted(registry: URL, realm: URL) -> bool:
    """Whether a registry's credentials may be shown to a realm it names.

    Only to the registry's own host and port, or to a name of the same registrable domain; and
    from https never to http. A name with characters no host name has (an encoded NUL, say) is
    nobody's: resolvers differ in where they end it.
    """
    if realm.scheme not in ("http", "https") or not realm.host or realm.user is not None:
        return False
    if not is_address(realm.host) and _HOST_NAME.fullmatch(realm.host) is None:
        return False
    if registry.scheme == "https" and realm.scheme != "https":
        return False
    if (registry.host, registry.port) == (realm.host, realm.port):
        return True
    domain = registrable_domain(registry.host or "")
    return domain is not None and domain == registrable_domain(realm.host)
