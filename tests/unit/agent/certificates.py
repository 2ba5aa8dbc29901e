"""Certificates for tests of the control API: right ones, and each kind of wrong one."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

OPERATOR = "blobcache://operator"
AGENT = "blobcache-agent"
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Leaf:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs what a test asks for."""

    def __init__(self, name: str = "test") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(
            self._name,
            self._key,
            x509.BasicConstraints(ca=True, path_length=0),
        ).public_bytes(serialization.Encoding.PEM)

    def agent(self) -> Leaf:
        """Return the agents' server certificate."""
        return self._leaf(x509.DNSName(AGENT), ExtendedKeyUsageOID.SERVER_AUTH)

    def operator(self) -> Leaf:
        """Return the operator's client certificate."""
        return self.client(OPERATOR)

    def client(self, uri: str) -> Leaf:
        """Return a client certificate with this URI."""
        return self._leaf(x509.UniformResourceIdentifier(uri), ExtendedKeyUsageOID.CLIENT_AUTH)

    def expired_operator(self) -> Leaf:
        """Return a client certificate that ended yesterday."""
        name = x509.UniformResourceIdentifier(OPERATOR)
        return self._leaf(name, ExtendedKeyUsageOID.CLIENT_AUTH, age=3 * _DAY)

    def _leaf(
        self,
        name: x509.GeneralName,
        usage: x509.ObjectIdentifier,
        age: datetime.timedelta = datetime.timedelta(0),
    ) -> Leaf:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])
        certificate = self._sign(
            subject,
            key,
            x509.BasicConstraints(ca=False, path_length=None),
            x509.ExtendedKeyUsage([usage]),
            x509.SubjectAlternativeName([name]),
            age=age,
        )
        return Leaf(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *extensions: x509.ExtensionType,
        age: datetime.timedelta = datetime.timedelta(0),
    ) -> x509.Certificate:
        start = datetime.datetime.now(datetime.UTC) - age - _DAY / 24
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + 2 * _DAY)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def write_tls_dir(folder: Path, bundle: bytes, leaf: Leaf) -> Path:
    """Write ca.crt, tls.crt and tls.key, each at once, and return the folder."""
    folder.mkdir(exist_ok=True)
    files = {"ca.crt": bundle, "tls.key": leaf.key, "tls.crt": leaf.certificate}
    for name, content in files.items():
        (folder / f".{name}").write_bytes(content)
        (folder / f".{name}").rename(folder / name)
    return folder


def client_context(folder: Path, bundle: bytes, leaf: Leaf | None) -> ssl.SSLContext:
    """Return a client's context that trusts the bundle and shows the leaf, if any."""
    context = ssl.create_default_context(cadata=bundle.decode())
    if leaf is not None:
        folder.mkdir(exist_ok=True)
        path = folder / "client.pem"
        path.write_bytes(leaf.certificate + leaf.key)
        context.load_cert_chain(path)
    return context
