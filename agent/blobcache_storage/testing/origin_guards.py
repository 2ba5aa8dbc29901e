"""Who may read a `FaultOrigin`: the server's side of each kind of credential.

Written from the services' documentation, apart from the backends, which they are to check.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import quote

from blobcache_storage.testing.fault_origin import Answer, Request

SKEW_SECONDS_MAX: Final = 900


def error_document(status: int, code: str) -> Answer:
    """Return an S3 or OSS error."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    return Answer(status, {"Content-Type": "application/xml"}, body.encode())


@dataclass(slots=True)
class HeaderGuard:
    """Lets through whoever shows exactly this Authorization header."""

    authorization: str

    def __call__(self, request: Request) -> Answer | None:
        """Check a request."""
        shown = request.headers.get("authorization", "")
        if hmac.compare_digest(shown, self.authorization):
            return None
        return Answer(401, {"WWW-Authenticate": 'Basic realm="origin"'})


def basic(username: str, password: str) -> str:
    """Return a Basic Authorization header."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


@dataclass(slots=True)
class RegistryGuard:
    """A registry with its token service at `/token`.

    Attributes:
        url: Base URL of the origin it guards, set once it listens.
        login: Basic header the token service wants; None gives a token to anyone.
        realm: In challenges, in place of the token service's own.
    """

    url: Callable[[], str]
    login: str | None = None
    realm: str | None = None
    service: str = "registry.test"
    lifetime_seconds: int = 300
    tokens: dict[str, str] = field(default_factory=dict)
    """Token to scope."""
    issued: int = 0
    refuse_tokens: bool = False
    misled: int = 0
    """Challenges sent with `realm` in place of the token service's own."""

    def revoke(self) -> None:
        """Make all tokens issued so far worthless."""
        self.tokens.clear()

    def __call__(self, request: Request) -> Answer | None:
        """Check a request, or answer it if it is for a token."""
        if request.raw_path == "/token":
            return self._issue(request)
        if not request.raw_path.startswith("/v2/"):
            return None
        repository = request.path.removeprefix("/v2/").partition("/blobs/")[0]
        scope = f"repository:{repository}:pull"
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.tokens.get(shown) == scope:
            return None
        self.misled += self.realm is not None
        realm = self.realm or f"{self.url()}/token"
        challenge = f'Bearer realm="{realm}",service="{self.service}",scope="{scope},push"'
        return Answer(401, {"WWW-Authenticate": challenge}, b'{"errors":[]}')

    def _issue(self, request: Request) -> Answer:
        if self.refuse_tokens or (
            self.login is not None and request.headers.get("authorization") != self.login
        ):
            return Answer(401, {}, b'{"details":"who are you"}')
        self.issued += 1
        token = secrets.token_urlsafe(24)
        self.tokens[token] = request.query["scope"]
        answer = {"token": token, "expires_in": self.lifetime_seconds}
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())


@dataclass(slots=True)
class OSSGuard:
    """Checks OSS signatures, V1 and V4; path style, so the path is `/bucket/key`."""

    access_key_id: str
    secret: str
    region: str = "cn-hangzhou"
    session_token: str | None = None
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    seen: list[str] = field(default_factory=list)
    """Versions of the signatures accepted, in order."""

    def __call__(self, request: Request) -> Answer | None:
        """Check a request."""
        authorization = request.headers.get("authorization", "")
        if request.headers.get("x-oss-security-token") != self.session_token:
            return error_document(403, "InvalidAccessKeyId")
        if authorization.startswith("OSS4-HMAC-SHA256 "):
            return self._check_v4(request, authorization.removeprefix("OSS4-HMAC-SHA256 "))
        if authorization.startswith("OSS "):
            return self._check_v1(request, authorization.removeprefix("OSS "))
        return error_document(403, "AccessDenied")

    def _is_skewed(self, when: datetime) -> bool:
        return abs((self.now() - when).total_seconds()) > SKEW_SECONDS_MAX

    def _oss_headers(self, request: Request) -> list[str]:
        names = sorted(name for name in request.headers if name.startswith("x-oss-"))
        return [f"{name}:{request.headers[name]}\n" for name in names]

    def _check_v1(self, request: Request, shown: str) -> Answer | None:
        key_id, _, signature = shown.partition(":")
        date = request.headers["date"]
        if key_id != self.access_key_id:
            return error_document(403, "InvalidAccessKeyId")
        if self._is_skewed(parsedate_to_datetime(date)):
            return error_document(403, "RequestTimeTooSkewed")
        text = f"{request.method}\n\n\n{date}\n{''.join(self._oss_headers(request))}{request.path}"
        digest = hmac.digest(self.secret.encode(), text.encode(), "sha1")
        if not hmac.compare_digest(base64.b64encode(digest), signature.encode()):
            return error_document(403, "SignatureDoesNotMatch")
        self.seen.append("V1")
        return None

    def _check_v4(self, request: Request, shown: str) -> Answer | None:
        fields = dict(part.strip().split("=", 1) for part in shown.split(","))
        key_id, day, region, product, end = fields["Credential"].split("/")
        stamp = request.headers["x-oss-date"]
        when = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if key_id != self.access_key_id:
            return error_document(403, "InvalidAccessKeyId")
        if self._is_skewed(when):
            return error_document(403, "RequestTimeTooSkewed")
        is_scope_right = (day, region, product, end) == (
            stamp[:8],
            self.region,
            "oss",
            "aliyun_v4_request",
        )
        if not is_scope_right or request.headers["x-oss-content-sha256"] != "UNSIGNED-PAYLOAD":
            return error_document(403, "InvalidArgument")
        uri = quote(request.path, safe="/~")
        canonical = f"{request.method}\n{uri}\n\n{''.join(self._oss_headers(request))}\n\n"
        hashed = hashlib.sha256(f"{canonical}UNSIGNED-PAYLOAD".encode()).hexdigest()
        scope = f"{day}/{region}/{product}/{end}"
        key = f"aliyun_v4{self.secret}".encode()
        for step in scope.split("/"):
            key = hmac.digest(key, step.encode(), "sha256")
        text = f"OSS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashed}"
        right = hmac.digest(key, text.encode(), "sha256").hex()
        if not hmac.compare_digest(right, fields["Signature"]):
            return error_document(403, "SignatureDoesNotMatch")
        self.seen.append("V4")
        return None


@dataclass(slots=True)
class S3Guard:
    """Checks S3 signatures, version 4, of requests without a query; and their payload's hash."""

    access_key_id: str
    secret: str
    region: str = "us-east-1"
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __call__(self, request: Request) -> Answer | None:
        """Check a request."""
        authorization = request.headers.get("authorization", "")
        if not authorization.startswith("AWS4-HMAC-SHA256 "):
            return error_document(403, "AccessDenied")
        shown = authorization.removeprefix("AWS4-HMAC-SHA256 ")
        fields = dict(part.strip().split("=", 1) for part in shown.split(","))
        key_id, day, region, service, end = fields["Credential"].split("/")
        stamp = request.headers["x-amz-date"]
        when = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if key_id != self.access_key_id:
            return error_document(403, "InvalidAccessKeyId")
        if abs((self.now() - when).total_seconds()) > SKEW_SECONDS_MAX:
            return error_document(403, "RequestTimeTooSkewed")
        names = fields["SignedHeaders"].split(";")
        must_sign = {"host", *(name for name in request.headers if name.startswith("x-amz-"))}
        is_scope_right = (day, region, service, end) == (
            stamp[:8],
            self.region,
            "s3",
            "aws4_request",
        )
        if not is_scope_right or not must_sign <= set(names) or "?" in request.target:
            return error_document(403, "AuthorizationHeaderMalformed")
        lines = "".join(f"{name}:{request.headers[name]}\n" for name in names)
        payload = request.headers["x-amz-content-sha256"]
        parts = (request.method, request.raw_path, "", lines, ";".join(names), payload)
        hashed = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        scope = f"{day}/{region}/{service}/{end}"
        key = f"AWS4{self.secret}".encode()
        for step in scope.split("/"):
            key = hmac.digest(key, step.encode(), "sha256")
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashed}"
        right = hmac.digest(key, text.encode(), "sha256").hex()
        if not hmac.compare_digest(right, fields["Signature"]):
            return error_document(403, "SignatureDoesNotMatch")
        return None


@dataclass(slots=True)
class S3ClockGuard:
    """Refuses S3 requests signed for another time, as S3 does; checks nothing else."""

    now: Callable[[], datetime]

    def __call__(self, request: Request) -> Answer | None:
        """Check a request."""
        stamp = request.headers.get("x-amz-date", "19700101T000000Z")
        when = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs((self.now() - when).total_seconds()) > SKEW_SECONDS_MAX:
            return error_document(403, "RequestTimeTooSkewed")
        return None
