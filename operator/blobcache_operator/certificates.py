"""
Pure certificate work: who signs what, when to renew, how an authority is replaced.

An authority's successor is published (in every `ca.crt`) long before anything is signed by it: a
Secret takes up to a minute and a half to reach a pod. So a rotation has two steps, and the state
between them is kept in the authority's own Secret:

1. `next` appears beside the current authority; every bundle holds both.
2. after `PUBLISH_SECONDS` the next one becomes current and signs new leaves; the old certificate
   stays in the bundle as `previous`, for peers whose leaf it signed, until it expires.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_LIFETIME = datetime.timedelta(days=3650)
CA_RENEW_BEFORE = datetime.timedelta(days=365)
LEAF_LIFETIME = datetime.timedelta(days=90)
LEAF_RENEW_BEFORE = datetime.timedelta(days=30)
PUBLISH_SECONDS = 600
CLOCK_SKEW = datetime.timedelta(minutes=10)

OPERATOR_URI = "blobcache://operator"
AGENT_DNS_NAME = "blobcache-agent"


@dataclass(frozen=True)
class Leaf:
    """A certificate, its key and the bundle that verifies its peers; PEM."""

    certificate: bytes
    key: bytes
    bundle: bytes

    def to_secret(self) -> dict[str, bytes]:
        """Return the data of a Secret of type kubernetes.io/tls with its authority."""
        return {"ca.crt": self.bundle, "tls.crt": self.certificate, "tls.key": self.key}


@dataclass(frozen=True)
class Authority:
    """The signing authority and, during a rotation, its neighbours; PEM."""

    certificate: bytes
    key: bytes
    next_certificate: bytes | None = None
    next_key: bytes | None = None
    next_since: int | None = None
    previous: bytes = b""

    @property
    def bundle(self) -> bytes:
        """All certificates a peer must trust now, the signing one first."""
        return self.certificate + (self.next_certificate or b"") + self.previous

    def to_secret(self) -> dict[str, bytes]:
        """Return the data of the Secret that keeps the authority."""
        data = {"tls.crt": self.certificate, "tls.key": self.key, "ca.crt": self.bundle}
        if self.next_certificate and self.next_key and self.next_since is not None:
            data["next.crt"] = self.next_certificate
            data["next.key"] = self.next_key
            data["next-since"] = str(self.next_since).encode()
        if self.previous:
            data["previous.crt"] = self.previous
        return data


def read_authority(data: Mapping[str, bytes]) -> Authority | None:
    """
    Return what a Secret keeps, or None when it keeps no usable authority.

    What is damaged beside a usable one is left out: people edit Secrets.
    """
    if not _is_authority(data.get("tls.crt", b""), data.get("tls.key", b"")):
        return None
    authority = Authority(
        certificate=data["tls.crt"],
        key=data["tls.key"],
        previous=_readable(data.get("previous.crt", b"")),
    )
    if not _is_authority(data.get("next.crt", b""), data.get("next.key", b"")):
        return authority
    since = data.get("next-since", b"")
    return replace(
        authority,
        next_certificate=data["next.crt"],
        next_key=data["next.key"],
        next_since=int(since) if since.isdigit() and len(since) <= 12 else 0,
    )


def _is_authority(certificate: bytes, key: bytes) -> bool:
    """Say whether these are an authority's certificate and its key, of a kind we sign with."""
    try:
        found = x509.load_pem_x509_certificate(certificate)
        constraints = found.extensions.get_extension_for_class(x509.BasicConstraints).value
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return False
    return (
        constraints.ca
        and isinstance(private, ec.EllipticCurvePrivateKey)
        and found.public_key() == private.public_key()
    )


def create_authority(now: datetime.datetime, *, previous: bytes = b"") -> Authority:
    """Return a new authority; `previous` are certificates peers may still show or trust."""
    certificate, key = _self_signed(now)
    return Authority(certificate, key, previous=_unexpired(previous, now))


def advance_authority(authority: Authority, now: datetime.datetime) -> Authority:
    """Return the authority as it must be now: unchanged, with a next one, or replaced by it."""
    seconds = int(now.timestamp())
    if authority.next_certificate and authority.next_key and authority.next_since is not None:
        if seconds - authority.next_since < PUBLISH_SECONDS:
            return authority
        return Authority(
            authority.next_certificate,
            authority.next_key,
            previous=_unexpired(authority.certificate + authority.previous, now),
        )
    if expiry(authority.certificate) - now > CA_RENEW_BEFORE:
        return authority
    certificate, key = _self_signed(now)
    return Authority(
        authority.certificate,
        authority.key,
        next_certificate=certificate,
        next_key=key,
        next_since=seconds,
        previous=_unexpired(authority.previous, now),
    )


def operator_leaf(authority: Authority, now: datetime.datetime) -> Leaf:
    """Return the operator's client certificate."""
    name = x509.UniformResourceIdentifier(OPERATOR_URI)
    return _leaf(authority, now, "blobcache-operator", name, ExtendedKeyUsageOID.CLIENT_AUTH)


def agent_leaf(authority: Authority, now: datetime.datetime) -> Leaf:
    """Return the agents' common server certificate."""
    name = x509.DNSName(AGENT_DNS_NAME)
    return _leaf(authority, now, AGENT_DNS_NAME, name, ExtendedKeyUsageOID.SERVER_AUTH)


def is_leaf_current(
    data: Mapping[str, bytes], authority: Authority, now: datetime.datetime
) -> bool:
    """Say whether a leaf's Secret is signed by this authority, carries its bundle and is fresh."""
    try:
        leaf = x509.load_pem_x509_certificate(data["tls.crt"])
        key = serialization.load_pem_private_key(data["tls.key"], None)
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate))
    except (KeyError, ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    fresh = leaf.not_valid_after_utc - now > LEAF_RENEW_BEFORE
    return (
        fresh and leaf.public_key() == key.public_key() and data.get("ca.crt") == authority.bundle
    )


def expiry(certificate: bytes) -> datetime.datetime:
    """Return when a PEM certificate ends."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def _unexpired(bundle: bytes, now: datetime.datetime) -> bytes:
    """Return the certificates of a bundle that are still of use, each once."""
    certificates = x509.load_pem_x509_certificates(found) if (found := _readable(bundle)) else []
    kept = dict.fromkeys(
        certificate.public_bytes(serialization.Encoding.PEM)
        for certificate in certificates
        if certificate.not_valid_after_utc > now
    )
    return b"".join(kept)


def _readable(bundle: bytes) -> bytes:
    """Return a bundle if all of it can be read, else nothing."""
    try:
        x509.load_pem_x509_certificates(bundle)
    except ValueError:
        return b""
    return bundle


def _self_signed(now: datetime.datetime) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"blobcache {now:%Y-%m-%d %H:%M:%S}")]
    )
    certificate = (
        _builder(name, name, key.public_key(), now, CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


def _leaf(
    authority: Authority,
    now: datetime.datetime,
    common_name: str,
    alternative: x509.GeneralName,
    purpose: x509.ObjectIdentifier,
) -> Leaf:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_key = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), now, LEAF_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    return Leaf(
        certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key), authority.bundle
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
