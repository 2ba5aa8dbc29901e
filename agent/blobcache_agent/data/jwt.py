"""Signed tokens: RFC 7515 compact form, RFC 7517 keys, RS256 and ES256 of RFC 7518. No more.

The algorithm comes from the key alone. A header that names another one ('none', an HMAC whose
secret would be the public key) is refused, not obeyed.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

TOKEN_BYTES_MAX = 16 * 1024
KEYS_MAX = 64
KEY_ID_CHARS_MAX = 256
RSA_BITS_MIN = 2048
RSA_BITS_MAX = 8192
P256_BYTES = 32

_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")


class InvalidToken(Exception):
    """A token that proves nothing; the message quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key and the one algorithm it is for."""

    algorithm: str
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey


def load_keys(jwks: Mapping[str, object]) -> dict[str, Key]:
    """Return the usable keys of a set by their id; those of other kinds are passed over.

    Raises:
        ValueError: The set is malformed, too large, or has no usable key.
    """
    entries = jwks.get("keys")
    if not isinstance(entries, list) or len(entries) > KEYS_MAX:
        raise ValueError(f"a key set must have a list of at most {KEYS_MAX} keys")
    keys: dict[str, Key] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError("each key must be an object")  # noqa: TRY004 - it is data
        key_id = entry.get("kid")
        key = _load_key(entry)
        if key is None or not isinstance(key_id, str) or len(key_id) > KEY_ID_CHARS_MAX:
            continue
        if key_id in keys:
            raise ValueError("each key must have an id of its own")
        keys[key_id] = key
    if not keys:
        raise ValueError("the key set must have an RSA or P-256 signing key with an id")
    return keys


def _load_key(entry: Mapping[str, object]) -> Key | None:
    """Return an RS256 or ES256 key, None for another kind.

    Raises:
        ValueError: It is of these kinds but malformed or weak.
    """
    if entry.get("use", "sig") != "sig":
        return None
    kind = (entry.get("kty"), entry.get("crv"))
    if kind[0] == "RSA" and entry.get("alg", "RS256") == "RS256":
        numbers = rsa.RSAPublicNumbers(e=_integer(entry, "e"), n=_integer(entry, "n"))
        if not RSA_BITS_MIN <= numbers.n.bit_length() <= RSA_BITS_MAX:
            raise ValueError(f"RSA keys must have {RSA_BITS_MIN} to {RSA_BITS_MAX} bits")
        return Key("RS256", numbers.public_key())
    if kind == ("EC", "P-256") and entry.get("alg", "ES256") == "ES256":
        point = ec.EllipticCurvePublicNumbers(
            _integer(entry, "x"), _integer(entry, "y"), ec.SECP256R1()
        )
        return Key("ES256", point.public_key())
    return None


def verify(token: str, keys: Mapping[str, Key]) -> dict[str, object]:
    """Return the claims of a token with a good signature. Claims are not looked at.

    Raises:
        InvalidToken: It is too long, malformed, of an unknown key, or not signed by it.
    """
    if len(token) > TOKEN_BYTES_MAX:
        raise InvalidToken(f"it is longer than {TOKEN_BYTES_MAX} bytes")
    parts = token.split(".")
    if len(parts) != 3:
        raise InvalidToken("it is not a signed token")
    header = _json_object(_decode(parts[0]))
    key_id = header.get("kid")
    key = keys.get(key_id) if isinstance(key_id, str) else None
    if key is None:
        raise InvalidToken("no key of this cluster signed it")
    if header.get("alg") != key.algorithm:
        raise InvalidToken("its algorithm is not that of its key")
    if "crit" in header:
        raise InvalidToken("it has critical extensions, of which none is known here")
    payload, signature = _decode(parts[1]), _decode(parts[2])
    signed = f"{parts[0]}.{parts[1]}".encode("ascii")
    try:
        _verify_signature(key, signature, signed)
    except InvalidSignature as error:
        raise InvalidToken("its signature is wrong") from error
    return _json_object(payload)


def _verify_signature(key: Key, signature: bytes, signed: bytes) -> None:
    """Raise InvalidSignature unless the key made the signature."""
    if isinstance(key.public_key, rsa.RSAPublicKey):
        key.public_key.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
        return
    # RFC 7518 section 3.4: both numbers in full width, one after the other; not DER.
    if len(signature) != 2 * P256_BYTES:
        raise InvalidSignature
    r = int.from_bytes(signature[:P256_BYTES], "big")
    s = int.from_bytes(signature[P256_BYTES:], "big")
    key.public_key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))


def numeric_date(claims: Mapping[str, object], name: str) -> float | None:
    """Return a claim that is unix seconds, None if there is no such claim.

    Raises:
        InvalidToken: It is something else.
    """
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidToken(f"its '{name}' is not a date")
    try:
        seconds = float(value)
    except OverflowError as error:
        raise InvalidToken(f"its '{name}' is not a date") from error
    if not math.isfinite(seconds):
        raise InvalidToken(f"its '{name}' is not a date")
    return seconds


def _decode(text: str) -> bytes:
    """Decode base64url without padding, in its one canonical spelling."""
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError) as error:
        raise InvalidToken("it is not base64url") from error
    canonical = base64.urlsafe_b64encode(decoded).rstrip(b"=").decode("ascii")
    if not _BASE64URL.fullmatch(text) or canonical != text:
        raise InvalidToken("it is not base64url")
    return decoded


def _integer(entry: Mapping[str, object], name: str) -> int:
    """Return a key's number.

    Raises:
        ValueError: It is missing or malformed.
    """
    value = entry.get(name)
    if not isinstance(value, str):
        raise ValueError(f"a key must have '{name}'")  # noqa: TRY004 - it is data
    try:
        return int.from_bytes(_decode(value), "big")
    except InvalidToken as error:
        raise ValueError(f"a key's '{name}' must be base64url") from error


def _json_object(encoded: bytes) -> dict[str, object]:
    """Return a JSON object; nesting and numbers are bounded by the token's size."""
    try:
        value = json.loads(encoded.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidToken("it does not hold JSON") from error
    if not isinstance(value, dict):
        raise InvalidToken("it does not hold JSON objects")
    return value


def _refuse_constant(name: str) -> NoReturn:
    """NaN and infinities are not JSON, though Python reads them."""
    raise ValueError(f"{name} is not JSON")
