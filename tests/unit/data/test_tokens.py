"""Readers' tokens: who is admitted, who is not, and what is said about it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from functools import cache

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from tests.unit.data.twin import TwinBlob, TwinEntry, content, running
from tests.unit.data.wire import connected

from blobcache_agent.data import jwt, tokens
from blobcache_agent.data.catalog import Forbidden, NotReady, Unauthenticated
from blobcache_agent.data.tokens import AllowAll, TokenAuth

ISSUER = "https://kubernetes.default.svc"
NOW = 1_700_000_000.0


def b64(data: bytes) -> str:
    """Encode base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    """Encode a key's number."""
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@cache
def rsa_key(name: str = "rsa", bits: int = 2048) -> rsa.RSAPrivateKey:
    """Make an RSA key, once per name."""
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(name: str = "ec") -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key, once per name."""
    return ec.generate_private_key(ec.SECP256R1())


def rsa_jwk(kid: str = "rsa", **more: object) -> dict[str, object]:
    """Return a public key as in a JWKS."""
    numbers = rsa_key(kid).public_key().public_numbers()
    return {"kty": "RSA", "kid": kid, "n": number(numbers.n), "e": number(numbers.e), **more}


def ec_jwk(kid: str = "ec") -> dict[str, object]:
    """Return a public key as in a JWKS."""
    numbers = ec_key(kid).public_key().public_numbers()
    x, y = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
    return {"kty": "EC", "crv": "P-256", "kid": kid, "x": b64(x), "y": b64(y)}


JWKS = {"keys": [rsa_jwk(use="sig", alg="RS256"), ec_jwk()]}


def claims(**changes: object) -> dict[str, object]:
    """Return a good token's claims with changes; None leaves one out."""
    good: dict[str, object] = {
        "iss": ISSUER,
        "aud": ["blobcache.dev"],
        "exp": int(NOW) + 3600,
        "nbf": int(NOW),
        "iat": int(NOW),
        "sub": "system:serviceaccount:team:reader",
        "kubernetes.io": {"namespace": "team", "pod": {"name": "reader"}},
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


Signer = Callable[[bytes], bytes]


def sign_rs256(kid: str = "rsa") -> Signer:
    """Sign as RFC 7518 section 3.3."""
    return lambda data: rsa_key(kid).sign(data, padding.PKCS1v15(), hashes.SHA256())


def sign_es256(kid: str = "ec") -> Signer:
    """Sign as RFC 7518 section 3.4."""

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(ec_key(kid).sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign


def sign_hs256_with_public_key(data: bytes) -> bytes:
    """Take the public key for a shared secret, as a confused verifier would."""
    secret = (
        rsa_key()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return hmac.new(secret, data, hashlib.sha256).digest()


def make(header: object, payload: object, sign: Signer) -> str:
    """Return a token in compact form."""
    parts = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload).encode())}"
    return f"{parts}.{b64(sign(parts.encode()))}"


def good(payload: object | None = None, **header: object) -> str:
    """Return an RS256 token."""
    head = {"alg": "RS256", "kid": "rsa", "typ": "JWT"} | header
    return make(head, claims() if payload is None else payload, sign_rs256())


def auth_at(now: Callable[[], float] = lambda: NOW) -> TokenAuth:
    """Return an auth with the keys of this file."""
    auth = TokenAuth(now)
    auth.set_keys(JWKS, ISSUER)
    return auth


ENTRY = TwinEntry(namespace="team")
RS = {"alg": "RS256", "kid": "rsa"}
ES = {"alg": "ES256", "kid": "ec"}

ACCEPTED = {
    "rs256": good(),
    "es256": make(ES, claims(), sign_es256()),
    "one audience as a string": good(claims(aud="blobcache.dev")),
    "several audiences": good(claims(aud=["a", "blobcache.dev"])),
    "no nbf": good(claims(nbf=None)),
    "expired within the leeway": good(claims(exp=NOW - 29)),
    "early within the leeway": good(claims(nbf=NOW + 29)),
    "fractional dates": good(claims(exp=NOW + 0.5)),
}


@pytest.mark.parametrize("token", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(token: str) -> None:
    """Good tokens of the configuration's namespace may read, also a second time."""
    auth = auth_at()
    for authorization in (f"Bearer {token}", f"bearer {token}", f"BEARER  {token}"):
        auth.admit(authorization)
        auth.check(authorization, ENTRY)


def _without_signature(payload: object, alg: object) -> str:
    return make({"alg": alg, "kid": "rsa"}, payload, lambda data: b"").rstrip(".") + "."


def _tampered() -> str:
    header, _, signature = good().split(".")
    return f"{header}.{b64(json.dumps(claims(exp=NOW + 9999)).encode())}.{signature}"


def _raw(payload: bytes) -> str:
    parts = f"{b64(json.dumps(RS).encode())}.{b64(payload)}"
    return f"{parts}.{b64(sign_rs256()(parts.encode()))}"


REFUSED = {
    "expired": good(claims(exp=NOW - 31)),
    "expired long ago": good(claims(exp=1)),
    "no expiry": good(claims(exp=None)),
    "expiry as text": good(claims(exp=str(int(NOW) + 3600))),
    "expiry as a boolean": good(claims(exp=True)),
    "endless expiry": _raw(json.dumps(claims(exp=float("inf"))).encode()),
    "expiry not a number": _raw(json.dumps(claims(exp=float("nan"))).encode()),
    "expiry beyond floats": good(claims(exp=10**400)),
    "expiry overflowing to infinity": _raw(
        json.dumps(claims(exp="X")).replace('"X"', "1e999").encode()
    ),
    "not yet valid": good(claims(nbf=NOW + 31)),
    "nbf as text": good(claims(nbf="0")),
    "other audience": good(claims(aud=["https://kubernetes.default.svc"])),
    "audience prefix": good(claims(aud="blobcache.dev.example.com")),
    "no audience": good(claims(aud=None)),
    "empty audience": good(claims(aud=[])),
    "audience as an object": good(claims(aud={"blobcache.dev": True})),
    "other issuer": good(claims(iss="https://other")),
    "issuer with a slash": good(claims(iss=ISSUER + "/")),
    "no issuer": good(claims(iss=None)),
    "no namespace": good(claims(**{"kubernetes.io": {}})),
    "no kubernetes claims": good(claims(**{"kubernetes.io": None})),
    "empty namespace": good(claims(**{"kubernetes.io": {"namespace": ""}})),
    "namespace as a list": good(claims(**{"kubernetes.io": {"namespace": ["team"]}})),
    "kubernetes claims as text": good(claims(**{"kubernetes.io": "team"})),
    "alg none": _without_signature(claims(), "none"),
    "alg None": _without_signature(claims(), "None"),
    "alg null": _without_signature(claims(), None),
    "alg none with a good signature": good(alg="none"),
    "hs256 with the public key": make(RS | {"alg": "HS256"}, claims(), sign_hs256_with_public_key),
    "rs256 by hs256": make(RS, claims(), sign_hs256_with_public_key),
    "no alg": make({"kid": "rsa"}, claims(), sign_rs256()),
    "rs384 by name": good(alg="RS384"),
    "ps256 by name": good(alg="PS256"),
    "rs256 with the ec key's id": good(kid="ec"),
    "es256 with the rsa key's id": make(ES | {"kid": "rsa"}, claims(), sign_es256()),
    "unknown kid": good(kid="gone"),
    "no kid": make({"alg": "RS256"}, claims(), sign_rs256()),
    "kid as a number": good(kid=1),
    "kid as a list": good(kid=["rsa"]),
    "other rsa key": make(RS, claims(), sign_rs256("another")),
    "other ec key": make(ES, claims(), sign_es256("another")),
    "es256 in der": make(ES, claims(), lambda d: ec_key().sign(d, ec.ECDSA(hashes.SHA256()))),
    "es256 of zeros": make(ES, claims(), lambda d: bytes(64)),
    "es256 too short": make(ES, claims(), lambda d: sign_es256()(d)[:63]),
    "key in the header": good(jwk=rsa_jwk("another"), kid="another"),
    "critical extension": good(crit=["exp"]),
    "tampered claims": _tampered(),
    "no signature": good().rsplit(".", 1)[0] + ".",
    "two parts": good().rsplit(".", 1)[0],
    "four parts": good() + ".x",
    "five parts": "a.b.c.d.e",
    "padded": good() + "==",
    "spaces within": good().replace(".", ". ", 1),
    "standard base64": good().replace(".", "+.", 1),
    "claims not base64": "x".join(good().rpartition(".")[0].split(".")) + ".a.b",
    "latin-1": "caf\xe9.caf\xe9.caf\xe9",
    "latin-1 claims": f"{good().split('.', maxsplit=1)[0]}.caf\xe9.AAAA",
    "garbage": "garbage",
    "dots": "..",
    "header not json": f"{b64(b'nonsense')}.{b64(b'{}')}.AAAA",
    "header a list": make([RS], claims(), sign_rs256()),
    "claims a list": good([claims()]),
    "claims not json": _raw(b"nonsense"),
    "claims not utf-8": _raw(b'{"iss": "\xff"}'),
    "deeply nested": _raw(b"[" * 5000),
    "too long": good(claims(sub="x" * 16384)),
}


@pytest.mark.parametrize("token", REFUSED.values(), ids=REFUSED.keys())
def test_refused(token: str) -> None:
    """Anything else is 401, says what is needed, and quotes nothing of the token."""
    auth = auth_at()
    for ask in (auth.admit, lambda value: auth.check(value, ENTRY)):
        with pytest.raises(Unauthenticated) as caught:
            ask(f"Bearer {token}")
        message = caught.value.message
        assert "blobcache.dev" in message
        assert "serviceAccountToken" in message
        assert not any(part in message for part in token.split(".") if len(part) > 4)


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Basic dTpw", good(), f"Token {good()}"]
)
def test_no_bearer_token(authorization: str | None) -> None:
    """Without a bearer token the answer tells how to get one."""
    with pytest.raises(Unauthenticated, match=r"blobcache\.dev"):
        auth_at().admit(authorization)


def test_other_namespace() -> None:
    """A good token of another namespace is admitted, but reads only what the cluster may."""
    auth = auth_at()
    token = "Bearer " + good(claims(**{"kubernetes.io": {"namespace": "other"}}))
    auth.admit(token)
    with pytest.raises(Forbidden, match="namespace 'team'"):
        auth.check(token, ENTRY)
    auth.check(token, TwinEntry(namespace="team", readers="Cluster"))


def test_readers_cluster_still_needs_a_token() -> None:
    """`readers: Cluster` means any pod, not anybody."""
    with pytest.raises(Unauthenticated):
        auth_at().check(None, TwinEntry(readers="Cluster"))


def test_before_any_keys() -> None:
    """Without keys nobody is told that the token is bad, and nobody reads."""
    auth = TokenAuth()
    auth.admit(None)
    with pytest.raises(NotReady):
        auth.check(f"Bearer {good()}", ENTRY)


def test_a_remembered_token_expires() -> None:
    """Remembering a token never prolongs it."""
    now = NOW
    auth = auth_at(lambda: now)
    token = "Bearer " + good(claims(exp=NOW + 100))
    auth.check(token, ENTRY)
    now = NOW + 129
    auth.check(token, ENTRY)
    now = NOW + 131
    with pytest.raises(Unauthenticated, match="expired"):
        auth.check(token, ENTRY)


def test_removed_keys_end_remembered_tokens() -> None:
    """A key taken out of the set is refused from then on."""
    auth = auth_at()
    auth.check(f"Bearer {good()}", ENTRY)
    auth.set_keys({"keys": [ec_jwk()]}, ISSUER)
    with pytest.raises(Unauthenticated):
        auth.check(f"Bearer {good()}", ENTRY)


def test_verification_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One verification serves many reads, and no more tokens than that are held."""
    verified = 0
    original = jwt.verify

    def counting(token: str, keys: Mapping[str, jwt.Key]) -> dict[str, object]:
        nonlocal verified
        verified += 1
        return original(token, keys)

    monkeypatch.setattr(jwt, "verify", counting)
    monkeypatch.setattr(tokens, "VERIFIED_MAX", 2)
    auth = auth_at()
    first, second, third = (f"Bearer {good(claims(sub=str(index)))}" for index in range(3))
    for token in (first, first, second, first, third):
        auth.check(token, ENTRY)
    assert verified == 3
    auth.check(first, ENTRY)
    assert verified == 3, "the one used last is kept"
    auth.check(second, ENTRY)
    assert verified == 4, "the one not used for longest was dropped"


BAD_SETS: dict[str, dict[str, object]] = {
    "nothing": {},
    "keys not a list": {"keys": {}},
    "no keys": {"keys": []},
    "a key that is text": {"keys": ["key"]},
    "only keys of other kinds": {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": "AA"}]},
    "a key for encryption": {"keys": [rsa_jwk(use="enc")]},
    "a key for another algorithm": {"keys": [rsa_jwk(alg="RS512")]},
    "a key without id": {"keys": [{**rsa_jwk(), "kid": None}]},
    "one id twice": {"keys": [rsa_jwk(), rsa_jwk()]},
    "a point off the curve": {"keys": [{**ec_jwk(), "x": b64(bytes(32))}]},
    "no modulus": {"keys": [{**rsa_jwk(), "n": None}]},
    "a modulus not base64url": {"keys": [{**rsa_jwk(), "n": "***"}]},
    "a weak key": {"keys": [{**rsa_jwk(), "n": number((1 << 1023) + 1)}]},
    "too many": {"keys": [rsa_jwk()] * 65},
}


@pytest.mark.parametrize("jwks", BAD_SETS.values(), ids=BAD_SETS.keys())
def test_bad_key_sets_change_nothing(jwks: dict[str, object]) -> None:
    """A set that cannot be used is refused whole, and the old one stays."""
    auth = auth_at()
    with pytest.raises(ValueError, match=r"key|must|point|curve"):
        auth.set_keys(jwks, ISSUER)
    auth.check(f"Bearer {good()}", ENTRY)
    with pytest.raises(ValueError, match="issuer"):
        auth.set_keys(JWKS, "")


def test_allow_all() -> None:
    """Standalone, nobody is asked."""
    AllowAll().admit(None)
    AllowAll().check("Basic x", ENTRY)


async def test_on_the_wire() -> None:
    """401 with its challenge, 403 with a name, 404 only for who may know, 200."""
    auth = TokenAuth(time.time)
    auth.set_keys(JWKS, ISSUER)
    fresh = int(time.time())
    mine = "Bearer " + good(claims(exp=fresh + 600, nbf=fresh))
    other = "Bearer " + good(
        claims(exp=fresh + 600, nbf=fresh, **{"kubernetes.io": {"namespace": "other"}})
    )
    async with running(auth=auth) as twin, connected(twin.host, twin.port) as wire:
        blob = twin.add("blob", TwinBlob(content(10)))
        for path in ("/v1/blobs/team/models/blob", "/v1/blobs/team/none/blob"):
            for method in ("GET", "HEAD"):
                answer = await wire.ask(method, path)
                assert (answer.status, answer["WWW-Authenticate"]) == (401, "Bearer")
        answer = await wire.ask(headers={"Authorization": other})
        assert (answer.status, json.loads(answer.body)["code"]) == (403, "Forbidden")
        answer = await wire.ask(path="/v1/blobs/team/none/blob", headers={"Authorization": mine})
        assert answer.status == 404
        answer = await wire.ask(headers={"Authorization": mine})
        assert (answer.status, answer.body) == (200, blob.data)
        assert blob.total_reads == 1
        text = repr(twin.observer.records)
        assert mine.split()[1] not in text
        assert other.split()[1] not in text
