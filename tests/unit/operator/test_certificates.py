"""Certificates: issued, renewed in time, their authority replaced without a gap."""

from __future__ import annotations

import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from blobcache_operator import certificates
from blobcache_operator.certificate_store import client_context

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def test_leaves_carry_the_names_and_uses_of_the_contract() -> None:
    """The operator is a client with a URI, agents are a server with a DNS name."""
    authority = certificates.create_authority(NOW)
    operator = x509.load_pem_x509_certificate(
        certificates.operator_leaf(authority, NOW).certificate
    )
    agent = x509.load_pem_x509_certificate(certificates.agent_leaf(authority, NOW).certificate)
    names = x509.SubjectAlternativeName
    uris = operator.extensions.get_extension_for_class(names).value.get_values_for_type(
        x509.UniformResourceIdentifier
    )
    assert uris == ["blobcache://operator"]
    dns = agent.extensions.get_extension_for_class(names).value.get_values_for_type(x509.DNSName)
    assert dns == ["blobcache-agent"]
    usage = x509.ExtendedKeyUsage
    assert list(operator.extensions.get_extension_for_class(usage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert list(agent.extensions.get_extension_for_class(usage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    ca = x509.load_pem_x509_certificate(authority.certificate)
    assert ca.not_valid_after_utc - NOW == datetime.timedelta(days=3650)
    assert agent.not_valid_after_utc - NOW == datetime.timedelta(days=90)


@pytest.mark.parametrize(("days", "current"), [(0, True), (59, True), (61, False), (95, False)])
def test_leaves_are_renewed_at_sixty_days(days: int, current: bool) -> None:
    """A third of their life is left for whatever goes wrong."""
    authority = certificates.create_authority(NOW)
    leaf = certificates.agent_leaf(authority, NOW).to_secret()
    assert certificates.is_leaf_current(leaf, authority, NOW + days * DAY) is current


@pytest.mark.parametrize("damage", ["tls.crt", "tls.key", "ca.crt", "foreign"])
def test_a_damaged_secret_is_not_current(damage: str) -> None:
    """Whatever of it is missing, torn or somebody else's."""
    authority = certificates.create_authority(NOW)
    leaf = certificates.agent_leaf(authority, NOW).to_secret()
    if damage == "foreign":
        leaf = certificates.agent_leaf(certificates.create_authority(NOW), NOW).to_secret()
    else:
        leaf[damage] = leaf[damage][:100]
    assert not certificates.is_leaf_current(leaf, authority, NOW)


def test_an_authority_survives_its_secret() -> None:
    """What is read is what was written, in every state of a rotation."""
    authority = certificates.create_authority(NOW)
    later = NOW + datetime.timedelta(days=3300)
    for state in (authority, certificates.advance_authority(authority, later)):
        assert certificates.read_authority(state.to_secret()) == state
    assert certificates.read_authority({}) is None
    torn = {**authority.to_secret(), "tls.key": b"-----BEGIN"}
    assert certificates.read_authority(torn) is None
    foreign = certificates.create_authority(NOW)
    mixed = {**authority.to_secret(), "tls.key": foreign.key}
    assert certificates.read_authority(mixed) is None


def _rsa_authority() -> dict[str, bytes]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "of somebody else")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + 3650 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return {
        "tls.crt": certificate.public_bytes(pem),
        "tls.key": key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }


@pytest.mark.parametrize("kind", ["leaf", "rsa"])
def test_what_cannot_sign_for_us_is_no_authority(kind: str) -> None:
    """It would break every signature, and the operator with it; a new one is made."""
    leaf = certificates.agent_leaf(certificates.create_authority(NOW), NOW).to_secret()
    assert certificates.read_authority(leaf if kind == "leaf" else _rsa_authority()) is None


@pytest.mark.parametrize("damaged", ["next.crt", "next.key", "next-since", "previous.crt"])
def test_damage_beside_an_authority_costs_only_what_is_damaged(damaged: str) -> None:
    """The authority goes on signing, its bundle can be read, a rotation begins anew."""
    first = certificates.create_authority(NOW)
    rotating = certificates.advance_authority(
        certificates.create_authority(NOW, previous=first.certificate), NOW + 3300 * DAY
    )
    data = {**rotating.to_secret(), damaged: b"-----BEGIN nonsense"}
    found = certificates.read_authority(data)
    assert found is not None
    assert found.certificate == rotating.certificate
    later = certificates.advance_authority(found, NOW + 3301 * DAY)
    assert later.bundle
    context = client_context(certificates.operator_leaf(later, NOW + 3301 * DAY))
    assert context.get_ca_certs()


def test_a_rotation_publishes_before_it_signs() -> None:
    """First both are trusted while the old one signs; then the new one signs and both are."""
    old = certificates.create_authority(NOW)
    assert certificates.advance_authority(old, NOW + 3000 * DAY) == old
    start = NOW + 3300 * DAY
    published = certificates.advance_authority(old, start)
    assert published.certificate == old.certificate
    assert published.next_certificate is not None
    assert published.next_certificate in published.bundle
    waiting = certificates.advance_authority(published, start + datetime.timedelta(seconds=599))
    assert waiting == published
    signing = certificates.advance_authority(published, start + datetime.timedelta(seconds=601))
    assert signing.certificate == published.next_certificate
    assert old.certificate in signing.bundle
    expired = certificates.advance_authority(signing, NOW + 6700 * DAY)
    assert old.certificate not in expired.bundle


def test_peers_of_both_sides_of_a_rotation_speak() -> None:
    """An operator with the new bundle and an agent with an old leaf trust each other."""
    old = certificates.create_authority(NOW)
    new = certificates.create_authority(NOW, previous=old.certificate)
    context = client_context(certificates.operator_leaf(new, NOW))
    loaded = {int(item["serialNumber"], 16) for item in context.get_ca_certs()}
    for authority in (old, new):
        certificate = x509.load_pem_x509_certificate(authority.certificate)
        assert certificate.serial_number in loaded
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
