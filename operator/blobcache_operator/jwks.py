"""The cluster's token issuer and its keys, which agents verify readers' tokens with."""

from dataclasses import dataclass
from typing import Any

from blobcache_operator import errors
from blobcache_operator.kube import JSONObject, Kube

KEYS_MAX = 32
KEY_FIELDS = ("kty", "kid", "use", "alg", "n", "e", "crv", "x", "y")


@dataclass(frozen=True)
class TokenIssuer:
    """What a reader's token must come from."""

    issuer: str
    keys: tuple[JSONObject, ...]


async def read_token_issuer(kube: Kube) -> TokenIssuer:
    """
    Return the issuer and the public keys the API server publishes.

    The keys are read from the server itself, not from the issuer's own `jwks_uri`: that may be a
    public URL, and whoever answers there would decide who may read.

    Raises:
        KubeError: They cannot be read, or what came is no key set.
    """
    configuration = await kube.get("/.well-known/openid-configuration")
    # The server refuses to serve this path as plain JSON.
    found = await kube.get("/openid/v1/jwks", accept="application/jwk-set+json")
    return parse_token_issuer(configuration, found)


def parse_token_issuer(configuration: JSONObject, found: JSONObject) -> TokenIssuer:
    """Return the public parts only; a key set with a private part would be somebody's mistake."""
    issuer, keys = configuration.get("issuer"), found.get("keys")
    if not isinstance(issuer, str) or not issuer or not isinstance(keys, list):
        raise errors.KubeError(0, "NotAKeySet", "the API server publishes no issuer and keys")
    public: list[dict[str, Any]] = [
        {field: key[field] for field in KEY_FIELDS if field in key}
        for key in keys[:KEYS_MAX]
        if isinstance(key, dict)
    ]
    # Sorted, so that the server's order does not change the digest of what is pushed.
    return TokenIssuer(issuer, tuple(sorted(public, key=lambda key: str(key.get("kid")))))
