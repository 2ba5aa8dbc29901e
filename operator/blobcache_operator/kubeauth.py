"""Where the API server is and how to log in: in a pod, or by a kubeconfig outside."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from blobcache_operator.errors import SettingsError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
NAMESPACE_DEFAULT = "blobcache-system"
# Projected tokens live an hour and are replaced after 48 minutes; a minute old is young enough.
TOKEN_REFRESH_SECONDS = 60.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class KubeAccess:
    """
    One way to the API server.

    At most one of `token_file` and `token_source` is set: where a bearer token comes from. The
    files belong to the kubelet or the user; they are read, never written.
    """

    server: str
    ca_file: str | None = None
    token_file: Path | None = None
    token_source: Callable[[], str | None] | None = None
    """May run a plug-in, so it is called in a thread."""
    certificate_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    verify: bool = True
    namespace: str | None = None

    def ssl_context(self) -> ssl.SSLContext:
        """Return a context that verifies the server, with the client certificate if any."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate_file:
            context.load_cert_chain(self.certificate_file, self.key_file)
        return context

    async def read_token(self) -> str | None:
        """Return the current bearer token."""
        if self.token_source is not None:
            return await asyncio.to_thread(self.token_source)
        if self.token_file is None:
            return None
        return (await asyncio.to_thread(self.token_file.read_text)).strip()


def in_cluster(environment: dict[str, str], folder: Path = SERVICE_ACCOUNT) -> KubeAccess | None:
    """Return the access of a pod's service account, or None outside a pod."""
    host = environment.get("KUBERNETES_SERVICE_HOST")
    port = environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (folder / "token").exists():
        return None
    namespace_file = folder / "namespace"
    return KubeAccess(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        ca_file=str(folder / "ca.crt"),
        token_file=folder / "token",
        namespace=namespace_file.read_text().strip() if namespace_file.exists() else None,
    )


def from_kubeconfig(path: str | None) -> KubeAccess:
    """
    Return the access of a kubeconfig's current context.

    The official client reads the file, because it knows exec plug-ins and inline data; it is
    imported only here, so that a pod does not carry it in memory.
    """
    from kubernetes import client, config

    loaded = client.Configuration()
    try:
        config.load_kube_config(config_file=path, client_configuration=loaded)  # type: ignore[no-untyped-call]
        _contexts, current = config.list_kube_config_contexts(config_file=path)  # type: ignore[no-untyped-call]
    except config.ConfigException as error:
        raise SettingsError(
            f"no usable kubeconfig: {error}; name one with --kubeconfig or run in a pod"
        ) from error

    def token() -> str | None:
        # Version 37 of the client calls the key BearerToken, those before it authorization. Asking
        # it anew renews the short-lived tokens of exec plug-ins.
        found = loaded.get_api_key_with_prefix("BearerToken", alias="authorization")
        return str(found).removeprefix("Bearer ") if found else None

    return KubeAccess(
        server=str(loaded.host).rstrip("/"),
        ca_file=loaded.ssl_ca_cert,
        token_source=token,
        certificate_file=loaded.cert_file,
        key_file=loaded.key_file,
        server_name=loaded.tls_server_name,
        verify=bool(loaded.verify_ssl),
        namespace=(current.get("context") or {}).get("namespace"),
    )


def find_access(environment: dict[str, str], kubeconfig: str | None) -> KubeAccess:
    """Return the kubeconfig's access when one is named, else the pod's, else the default file's."""
    if kubeconfig is None:
        access = in_cluster(environment)
        if access is not None:
            return access
    return from_kubeconfig(kubeconfig)
