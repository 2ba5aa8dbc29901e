"""Who may read: service-account tokens, verified without asking anybody.

A reader's pod shows a projected token (RFC 7519 in RFC 7515 compact form). The cluster's public
keys come with the desired state, so an API server that is away stops no reader.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blobcache_agent.data import jwt
from blobcache_agent.data.catalog import Admission, Entry, Forbidden, NotReady, Unauthenticated

AUDIENCE = "blobcache.dev"
LEEWAY_SECONDS = 30.0
"""By which the clocks of API server and node may differ."""
VERIFIED_MAX = 1024
"""Tokens remembered as good."""
VERIFIED_SECONDS_MAX = 300.0

_HOW_TO = (
    f"a pod needs a volume with projected.sources[].serviceAccountToken.audience: {AUDIENCE} and "
    "sends the file's content as 'Authorization: Bearer TOKEN'"
)


class AllowAll:
    """Everybody may read: who can reach a standalone agent's port is its administrator's choice."""

    def admit(self, authorization: str | None) -> None:
        """Admit."""

    def check(self, authorization: str | None, entry: Entry) -> None:
        """Permit."""

    def recognize(self, authorization: str | None) -> Admission:
        """Treat all alike."""
        return _ANYBODY


class _Anybody:
    """An admission that opens everything."""

    def opens(self, entry: Entry) -> bool:
        """Permit."""
        return True


_ANYBODY = _Anybody()


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """What is kept of a token that was good."""

    namespace: str
    until_time: float
    """Unix seconds until which it need not be looked at again."""

    def may_read(self, entry: Entry) -> bool:
        """Whether a pod of its namespace may read a configuration."""
        return entry.readers == "Cluster" or self.namespace == entry.namespace


class TokenAuth:
    """Permits by the namespace of a service-account token.

    Args:
        now: Unix seconds.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._keys: Mapping[str, jwt.Key] | None = None
        self._issuer = ""
        self._verified: OrderedDict[bytes, VerifiedToken] = OrderedDict()

    def set_keys(self, jwks: Mapping[str, object], issuer: str) -> None:
        """Replace the cluster's keys (an RFC 7517 set) and the issuer all tokens must name.

        Tokens signed by keys that are gone are refused from now on.

        Raises:
            ValueError: The set is malformed or has no usable key (RS256, ES256), or the issuer is
                empty; the old keys stay.
        """
        if not issuer:
            raise ValueError("the issuer must not be empty")
        keys = jwt.load_keys(jwks)
        self._verified.clear()
        self._keys = keys
        self._issuer = issuer

    def admit(self, authorization: str | None) -> None:
        """Refuse strangers before they learn which configurations exist.

        Before any keys came, no state has been applied either: the lookup will say so.
        """
        if self._keys is not None:
            self._token_of(authorization, self._keys)

    def check(self, authorization: str | None, entry: Entry) -> None:
        """Permit pods of the configuration's namespace, or of any for `readers: Cluster`."""
        token = self._token_of(authorization, self._present_keys())
        if not token.may_read(entry):
            raise Forbidden(
                f"pods of namespace '{entry.namespace}' may read this; its BlobCacheConfig may "
                "say 'readers: Cluster'"
            )

    def recognize(self, authorization: str | None) -> Admission:
        """Return an admission that ends with the token, or when the keys are replaced."""
        keys = self._present_keys()
        token = self._token_of(authorization, keys)
        return _TokenAdmission(self, keys, token)

    def is_valid(self, keys: Mapping[str, jwt.Key], token: VerifiedToken) -> bool:
        """Whether a token that was good under these keys still is, without another look."""
        return keys is self._keys and self._now() < token.until_time

    def _present_keys(self) -> Mapping[str, jwt.Key]:
        """Return the keys in force.

        Raises:
            NotReady: None have come.
        """
        if self._keys is None:
            raise NotReady(
                "ReaderKeysPending",
                "the keys to verify readers' tokens have not come from the operator yet",
            )
        return self._keys

    def _token_of(self, authorization: str | None, keys: Mapping[str, jwt.Key]) -> VerifiedToken:
        """Return a valid token.

        Raises:
            Unauthenticated: There is none. Nothing of the token is in the message.
        """
        if authorization is None:
            raise Unauthenticated(f"a token for audience '{AUDIENCE}' is needed: {_HOW_TO}")
        scheme, _, token = authorization.partition(" ")
        token = token.strip(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated(f"the Authorization header must be 'Bearer TOKEN': {_HOW_TO}")
        # Hashed, so that what is remembered cannot be used by who reads this memory.
        digest = hashlib.sha256(token.encode("latin-1")).digest()
        now = self._now()
        known = self._verified.get(digest)
        if known is not None:
            if now < known.until_time:
                self._verified.move_to_end(digest)
                return known
            del self._verified[digest]
        try:
            claims = jwt.verify(token, keys)
            namespace, expiry_time = self._check_claims(claims, now)
        except jwt.InvalidToken as error:
            raise Unauthenticated(
                f"the token cannot be accepted: {error}. A token for audience '{AUDIENCE}' is "
                f"needed: {_HOW_TO}"
            ) from error
        verified = VerifiedToken(namespace, min(expiry_time, now + VERIFIED_SECONDS_MAX))
        self._remember(digest, verified)
        return verified

    def _check_claims(self, claims: Mapping[str, object], now: float) -> tuple[str, float]:
        """Return namespace and expiry of claims whose signature is good."""
        if claims.get("iss") != self._issuer:
            raise jwt.InvalidToken("another cluster issued it")
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if AUDIENCE not in audiences:
            raise jwt.InvalidToken("it is for another audience")
        expiry_time = jwt.numeric_date(claims, "exp")
        if expiry_time is None:
            raise jwt.InvalidToken("it never expires")
        if now >= expiry_time + LEEWAY_SECONDS:
            raise jwt.InvalidToken("it has expired")
        not_before_time = jwt.numeric_date(claims, "nbf")
        if not_before_time is not None and now < not_before_time - LEEWAY_SECONDS:
            raise jwt.InvalidToken("it is not valid yet")
        kubernetes = claims.get("kubernetes.io")
        namespace = kubernetes.get("namespace") if isinstance(kubernetes, dict) else None
        if not isinstance(namespace, str) or not namespace:
            raise jwt.InvalidToken("it is not a service account's")
        return namespace, expiry_time

    def _remember(self, digest: bytes, token: VerifiedToken) -> None:
        """Remember a good token, forgetting the one not used for longest if there are many."""
        self._verified[digest] = token
        if len(self._verified) > VERIFIED_MAX:
            self._verified.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _TokenAdmission:
    """A reader with a token that was good."""

    auth: TokenAuth
    keys: Mapping[str, jwt.Key]
    token: VerifiedToken

    def opens(self, entry: Entry) -> bool:
        """Whether the token is still good, and good for this."""
        return self.auth.is_valid(self.keys, self.token) and self.token.may_read(entry)
