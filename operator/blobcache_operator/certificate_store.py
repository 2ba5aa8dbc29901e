"""
The three certificate Secrets: made, renewed and read.

Any replica may run this: a Secret is created (the second creator reads the first one's) or
replaced on the resourceVersion it was read with, so two at once agree after one more round.
"""

import asyncio
import base64
import contextlib
import datetime
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import structlog

from blobcache_operator import certificates, errors, metrics
from blobcache_operator.kube import JSONObject, Kube

CA_SECRET = "blobcache-ca"  # noqa: S105 - the names of Secrets, not their content
OPERATOR_SECRET = "blobcache-operator-tls"  # noqa: S105
AGENT_SECRET = "blobcache-agent-tls"  # noqa: S105
SECRET_TYPE = "kubernetes.io/tls"  # noqa: S105
CONFLICT_ROUNDS_MAX = 5

log = structlog.get_logger(__name__)


class CertificateStore:
    """
    Keeps the Secrets of one namespace.

    Args:
        kube: The API server.
        namespace: The operator's own.
        deployment: The Deployment that shall own the Secrets, if there is one of this name.
    """

    def __init__(self, kube: Kube, *, namespace: str, deployment: str | None) -> None:
        self._kube = kube
        self._namespace = namespace
        self._deployment = deployment

    async def ensure(self, now: datetime.datetime) -> tuple[certificates.Leaf, certificates.Leaf]:
        """
        Return the operator's and the agents' leaf, after making what is missing or old.

        Raises:
            KubeError: The namespace is missing, a right is, or the server.
            SecretUnusable: A Secret of such a name is of another type.
        """
        for _round in range(CONFLICT_ROUNDS_MAX):
            with contextlib.suppress(errors.Conflict):
                authority = await self._ensure_authority(now)
                operator = await self._ensure_leaf(OPERATOR_SECRET, authority, now)
                agent = await self._ensure_leaf(AGENT_SECRET, authority, now)
                for name, certificate in (
                    ("ca", authority.certificate),
                    ("operator", operator.certificate),
                    ("agent", agent.certificate),
                ):
                    end = certificates.expiry(certificate).timestamp()
                    metrics.CERTIFICATE_EXPIRY.labels(certificate=name).set(end)
                return operator, agent
        raise errors.KubeUnavailable(409, "Conflict", "other writers keep changing the Secrets")

    async def _ensure_authority(self, now: datetime.datetime) -> certificates.Authority:
        found, version = await self._read(CA_SECRET)
        current = certificates.read_authority(found) if found is not None else None
        if current is None:
            # Peers may hold leaves of an authority that is gone: keep trusting what they show.
            known = await self._read(AGENT_SECRET)
            previous = (known[0] or {}).get("ca.crt", b"")
            wanted = certificates.create_authority(now, previous=previous)
            log.info("Certificate authority created", namespace=self._namespace)
        elif certificates.expiry(current.certificate) <= now:
            # Nobody trusts it any more, so there is nobody to tell before the new one signs.
            wanted = certificates.create_authority(now)
            log.warning(
                "Certificate authority had expired and was replaced; agents are reached again when "
                "their Secret has come to them, within two minutes",
                expired=certificates.expiry(current.certificate).isoformat(),
            )
        else:
            wanted = certificates.advance_authority(current, now)
        if found is None or wanted != current:
            await self._write(CA_SECRET, wanted.to_secret(), version)
        return wanted

    async def _ensure_leaf(
        self, name: str, authority: certificates.Authority, now: datetime.datetime
    ) -> certificates.Leaf:
        found, version = await self._read(name)
        if found is not None and certificates.is_leaf_current(found, authority, now):
            return certificates.Leaf(found["tls.crt"], found["tls.key"], found["ca.crt"])
        make = certificates.operator_leaf if name == OPERATOR_SECRET else certificates.agent_leaf
        leaf = make(authority, now)
        await self._write(name, leaf.to_secret(), version)
        log.info(
            "Certificate issued",
            secret=name,
            expires=certificates.expiry(leaf.certificate).isoformat(),
        )
        return leaf

    async def _read(self, name: str) -> tuple[dict[str, bytes] | None, str | None]:
        try:
            secret = await self._kube.get(f"{self._collection()}/{name}")
        except errors.NotFound:
            return None, None
        if (found := secret.get("type")) != SECRET_TYPE:
            # A Secret's type cannot be changed, and what is in it may be somebody's.
            raise errors.SecretUnusable(
                f"The Secret '{name}' is of type '{found}', not '{SECRET_TYPE}', so the operator "
                "did not make it. Save what is in it, then delete it and a new one is made: "
                f"kubectl -n {self._namespace} delete secret {name}"
            )
        data = {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}
        return data, str(secret["metadata"]["resourceVersion"])

    async def _write(self, name: str, data: Mapping[str, bytes], version: str | None) -> None:
        metadata: JSONObject = {
            "name": name,
            "namespace": self._namespace,
            "labels": {
                "app.kubernetes.io/name": "blobcache",
                "app.kubernetes.io/managed-by": "blobcache-operator",
            },
        }
        owner = await self._owner()
        if owner is not None:
            metadata["ownerReferences"] = [owner]
        body: JSONObject = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": SECRET_TYPE,
            "metadata": metadata,
            "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
        }
        if version is None:
            await self._kube.create(self._collection(), body)
            return
        metadata["resourceVersion"] = version
        await self._kube.replace(f"{self._collection()}/{name}", body)

    async def _owner(self) -> JSONObject | None:
        if not self._deployment:
            return None
        path = f"/apis/apps/v1/namespaces/{self._namespace}/deployments/{self._deployment}"
        try:
            deployment = await self._kube.get(path)
        except (errors.NotFound, errors.Forbidden) as error:
            log.info("Deployment not found, certificates have no owner", error=str(error))
            return None
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": self._deployment,
            "uid": deployment["metadata"]["uid"],
        }

    def _collection(self) -> str:
        return f"/api/v1/namespaces/{self._namespace}/secrets"


def client_context(leaf: certificates.Leaf) -> ssl.SSLContext:
    """Return the operator's side of mutual TLS."""
    context = ssl.create_default_context(cadata=leaf.bundle.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    renew_context(context, leaf)
    return context


def renew_context(context: ssl.SSLContext, leaf: certificates.Leaf) -> None:
    """
    Let new connections use a new certificate, and trust what its bundle names as well.

    The key goes through an anonymous memory file, for `ssl` reads only files and the root file
    system is read-only. Authorities that ended are refused by their dates.
    """
    context.load_verify_locations(cadata=leaf.bundle.decode())
    descriptor = os.memfd_create("blobcache-tls")
    try:
        os.write(descriptor, leaf.certificate + leaf.key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


async def write_leaf(leaf: certificates.Leaf, directory: Path) -> None:
    """Write ca.crt, tls.crt and tls.key for an agent outside the cluster, each by rename."""
    await asyncio.to_thread(_write_files, leaf.to_secret(), directory)


def _write_files(files: Mapping[str, bytes], directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = directory / f".{name}.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(directory / name)
