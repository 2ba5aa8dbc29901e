"""
A Kubernetes control plane without nodes: etcd and kube-apiserver, for one test run.

Nothing runs here that would act on objects: no controller manager, so namespaces get no `default`
service account and stay `Terminating` once deleted (use fresh names), owner references collect
nothing, Deployments create no pods, and the roles put together from others (view, edit, admin) are
empty; no scheduler, no kubelet.
"""

import ipaddress
import json
import os
import re
import secrets
import shutil
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.harness.binaries import locate
from tests.harness.pki import Authority, private_pem, public_pem
from tests.harness.process import Child, is_listening, start_on_free_ports

READY_TIMEOUT_SECONDS = 90.0
KUBECTL_TIMEOUT_SECONDS = 60.0
ISSUER = "https://kubernetes.default.svc.cluster.local"
SERVICE_RANGE = "10.96.0.0/16"
LOOPBACK = "127.0.0.1"


class ControlPlane:
    """
    etcd and kube-apiserver on loopback ports, with RBAC and Node authorization.

    A context manager; `start()` and `stop()` do the same by hand. Service-account
    tokens are signed with RS256, as in most clusters, and may be requested for any audience; the
    server itself takes only those made for its issuer.

    Args:
        folder: Where data, logs and kubeconfigs go; by default a temporary folder that `stop()`
            removes.
        address: The address of this machine that the API server is reached at.
        service_range: Where Services get their addresses.
        apiserver_flags: More flags of the API server; a repeated flag wins over its first use.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        address: str = LOOPBACK,
        service_range: str = SERVICE_RANGE,
        apiserver_flags: Sequence[str] = (),
    ) -> None:
        self.address = address
        self.service_range = service_range
        self._apiserver_flags = list(apiserver_flags)
        self._owns_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="blobcache-control-plane-"))
        self.admin_token = secrets.token_hex(16)
        self._authority = Authority.create()
        self._etcd: Child | None = None
        self._etcd_url = ""
        self._apiserver: Child | None = None
        self._port = 0
        self._write_credentials()

    @property
    def url(self) -> str:
        """The API server's address; the same for this object's whole life."""
        return f"https://{self.address}:{self._port}"

    @property
    def ca_file(self) -> Path:
        """The authority that signs the server's certificate, PEM."""
        return self.folder / "ca.crt"

    @property
    def admin_kubeconfig(self) -> Path:
        """A kubeconfig of group `system:masters`, with a bearer token."""
        return self.folder / "admin.kubeconfig"

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [child.pid for child in (self._etcd, self._apiserver) if child is not None]

    def start(self) -> None:
        """Start everything and wait until the API server is ready."""
        try:
            self._start_etcd()
            self.start_apiserver()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop everything; the object cannot be started again when the folder was its own."""
        self.stop_apiserver()
        if self._etcd is not None:
            self._etcd.stop()
            self._etcd = None
        if self._owns_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start_apiserver(self) -> None:
        """Start the API server, after the first time on the same port with the same objects."""
        if self._apiserver is not None:
            return
        if self._port:
            self._apiserver = self._run_apiserver(self._port)
            self._apiserver.wait_until(
                lambda: self._is_ready(self._port), timeout=READY_TIMEOUT_SECONDS
            )
            return
        self._apiserver, (self._port,) = start_on_free_ports(
            1, self._run_apiserver, self._is_ready, timeout=READY_TIMEOUT_SECONDS
        )
        token = {"token": self.admin_token}
        self._write_kubeconfig(self.admin_kubeconfig, "admin", token)

    def stop_apiserver(self) -> None:
        """Stop the API server; etcd and its objects stay."""
        if self._apiserver is not None:
            self._apiserver.stop()
            self._apiserver = None

    def restart_apiserver(self) -> None:
        """Stop the API server and start it again on the same port."""
        self.stop_apiserver()
        self.start_apiserver()

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """
        Return a kubeconfig of a user in these groups, by client certificate.

        The user has the rights RBAC gives; `system:node:NAME` in `system:nodes` is a kubelet.
        """
        leaf = self._authority.issue_client(user, groups)
        stem = re.sub(r"[^A-Za-z0-9.-]", "_", user)
        path = self.folder / f"{stem}-{secrets.token_hex(4)}.kubeconfig"
        certificate = _private_file(path.with_suffix(".crt"), leaf.certificate)
        key = _private_file(path.with_suffix(".key"), leaf.key)
        files = {"client-certificate": str(certificate), "client-key": str(key)}
        return self._write_kubeconfig(path, user, files)

    def kubeconfig_for_service_account(self, namespace: str, name: str) -> Path:
        """Return a kubeconfig of an existing service account, with a token of one hour."""
        token = self.create_token(namespace, name)
        path = self.folder / f"{namespace}-{name}-{secrets.token_hex(4)}.kubeconfig"
        return self._write_kubeconfig(path, f"{namespace}-{name}", {"token": token})

    def create_token(self, namespace: str, name: str, *, audience: str | None = None) -> str:
        """Return a token of an existing service account; by default one the server itself takes."""
        wanted = ["--audience", audience] if audience else []
        return self.kubectl("create", "token", name, "-n", namespace, *wanted).stdout.strip()

    def jwks(self) -> dict[str, Any]:
        """Return the key set that verifies service-account tokens."""
        keys: dict[str, Any] = json.loads(self.kubectl("get", "--raw", "/openid/v1/jwks").stdout)
        return keys

    def kubectl(
        self,
        *arguments: str,
        input: str | None = None,  # noqa: A002
        check: bool = True,
        kubeconfig: Path | None = None,
        timeout: float = KUBECTL_TIMEOUT_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """
        Run kubectl, as the administrator unless another kubeconfig is given.

        Raises:
            CalledProcessError: It failed and `check` is on; its error output is in the message.
        """
        config = kubeconfig or self.admin_kubeconfig
        done = subprocess.run(
            [locate("kubectl"), f"--kubeconfig={config}", *arguments],
            input=input,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=self._environment(),
            cwd=self.folder,
        )
        if check and done.returncode != 0:
            error = subprocess.CalledProcessError(
                done.returncode, ["kubectl", *arguments], done.stdout, done.stderr
            )
            error.add_note(done.stderr)
            raise error
        return done

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _environment(self) -> dict[str, str]:
        """Nothing of the user's: no KUBECONFIG, no proxies, a home of its own."""
        return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.folder)}

    def _write_credentials(self) -> None:
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        inside = str(ipaddress.ip_network(self.service_range)[1])
        serving = self._authority.issue_server(names, [LOOPBACK, self.address, inside])
        signing = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ca_file.write_bytes(self._authority.certificate)
        for name, content in {
            "serving.crt": serving.certificate,
            "serving.key": serving.key,
            "service-accounts.key": private_pem(signing),
            "service-accounts.pub": public_pem(signing),
            "tokens.csv": f'{self.admin_token},admin,admin,"system:masters"\n'.encode(),
        }.items():
            _private_file(self.folder / name, content)

    def _start_etcd(self) -> None:
        self._etcd, (port, _) = start_on_free_ports(
            2,
            self._run_etcd,
            lambda client_port, _peer_port: _is_etcd_healthy(client_port),
            timeout=READY_TIMEOUT_SECONDS,
        )
        self._etcd_url = f"http://127.0.0.1:{port}"

    def _run_etcd(self, client_port: int, peer_port: int) -> Child:
        client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
        data = self.folder / "etcd"
        shutil.rmtree(data, ignore_errors=True)
        return Child(
            [
                locate("etcd"),
                "--name=test",
                f"--data-dir={data}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=test={peer}",
                "--unsafe-no-fsync",
                "--log-level=warn",
            ],
            log=self.folder / "etcd.log",
            env=self._environment(),
        )

    def _run_apiserver(self, port: int) -> Child:
        return Child(
            [
                locate("kube-apiserver"),
                f"--etcd-servers={self._etcd_url}",
                f"--bind-address={self.address}",
                f"--secure-port={port}",
                f"--cert-dir={self.folder}",
                f"--tls-cert-file={self.folder / 'serving.crt'}",
                f"--tls-private-key-file={self.folder / 'serving.key'}",
                f"--client-ca-file={self.ca_file}",
                f"--token-auth-file={self.folder / 'tokens.csv'}",
                f"--service-account-key-file={self.folder / 'service-accounts.pub'}",
                f"--service-account-signing-key-file={self.folder / 'service-accounts.key'}",
                f"--service-account-issuer={ISSUER}",
                f"--api-audiences={ISSUER}",
                f"--service-cluster-ip-range={self.service_range}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                "--endpoint-reconciler-type=none",
                "--shutdown-delay-duration=0s",
                *self._apiserver_flags,
            ],
            log=self.folder / "kube-apiserver.log",
            env=self._environment(),
        )

    def _is_ready(self, port: int) -> bool:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        request = urllib.request.Request(
            f"https://{self.address}:{port}/readyz",
            headers={"Authorization": f"Bearer {self.admin_token}"},
        )
        opener = _opener(urllib.request.HTTPSHandler(context=context))
        return is_listening(port, self.address) and _answers_ok(opener, request)

    def _write_kubeconfig(self, path: Path, user: str, credentials: dict[str, str]) -> Path:
        cluster = {"server": self.url, "certificate-authority": str(self.ca_file)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        return _private_file(path, yaml.safe_dump(config).encode())


def _private_file(path: Path, content: bytes) -> Path:
    """Write a file only its owner may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


def _opener(*handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """Return an opener that asks no proxy."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), *handlers)


def _answers_ok(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> bool:
    try:
        with opener.open(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        pass
    return False


def _is_etcd_healthy(port: int) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/readyz")
    return is_listening(port) and _answers_ok(_opener(), request)
