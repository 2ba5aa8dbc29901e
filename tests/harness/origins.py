"""Real origins on loopback ports, each behind a proxy that counts what is asked of it."""

import base64
import hashlib
import json
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import boto3
import yaml
from botocore.config import Config

from tests.harness.binaries import locate
from tests.harness.process import Child, environment, is_listening, start_on_free_ports
from tests.harness.proxy import LOOPBACK, CountingProxy

READY_TIMEOUT_SECONDS = 60.0
REQUEST_TIMEOUT_SECONDS = 30.0
REGION = "us-east-1"
EMPTY_CONFIG = b"{}"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


class OriginError(RuntimeError):
    """An origin did not do what the harness asked of it."""


class _Origin:
    """
    A server process in a folder, and the proxy in front of it.

    Args:
        folder: Where its files go; by default a temporary one.
        listen: The address of this machine that the proxy, but not the server, is reached at.
    """

    prefix: ClassVar[str]

    def __init__(self, folder: Path | None = None, *, listen: str = LOOPBACK) -> None:
        self._listen = listen
        self._owns_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix=f"blobcache-{self.prefix}-"))
        self._child: Child | None = None
        self._port = 0
        self._proxy: CountingProxy | None = None

    @property
    def url(self) -> str:
        """Base URL through the counting proxy: what the software under test is given."""
        return self.requests.url

    @property
    def direct_url(self) -> str:
        """Base URL of the server itself: what nobody counts."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def requests(self) -> CountingProxy:
        """What was asked through `url`."""
        if self._proxy is None:
            raise RuntimeError("the origin is not started")
        return self._proxy

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [] if self._child is None else [self._child.pid]

    def start(self) -> None:
        """Start the server and wait until it answers."""
        try:
            self._child, (self._port,) = start_on_free_ports(
                1, self._run, is_listening, timeout=READY_TIMEOUT_SECONDS
            )
            self._proxy = CountingProxy(self.direct_url, listen=self._listen)
            self._proxy.start()
            self._prepare()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and the proxy."""
        if self._proxy is not None:
            self._proxy.stop()
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._owns_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

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

    def _run(self, port: int) -> Child:
        raise NotImplementedError

    def _prepare(self) -> None:
        """Do what has to be done once, after the server answers."""


@dataclass(frozen=True, repr=False)
class S3Credentials:
    """What an S3 client signs with."""

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None


WORTHLESS = S3Credentials("AKIAIOSFODNN7EXAMPLE", "worthless-worthless-worthless-worthless")
"""Well-formed, and known to no server."""


class S3Server(_Origin):
    """
    moto's S3 server, with signatures and policies enforced.

    moto by default takes any credentials. Here an administrator is made first, then moto's count
    of calls it lets pass unchecked is set to zero (`/moto-api/reset-auth`), so from then on every
    signed call needs a known key, a fitting signature and a policy that allows it, else 403.
    """

    prefix = "s3"

    admin: S3Credentials
    """May do everything; what the methods here use."""

    def __init__(self, folder: Path | None = None, *, listen: str = LOOPBACK) -> None:
        super().__init__(folder, listen=listen)
        self._clients: dict[tuple[str, S3Credentials, str], Any] = {}

    def stop(self) -> None:
        """Stop the server and the proxy, and close the clients."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        super().stop()

    def client(self, credentials: S3Credentials | None = None, *, service: str = "s3") -> Any:
        """Return a boto3 client that talks to the server directly and does not retry."""
        return self._client(service, credentials or self.admin, self.direct_url)

    def counted_client(self, credentials: S3Credentials) -> Any:
        """Return a boto3 S3 client that talks through the counting proxy."""
        return self._client("s3", credentials, self.url)

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket."""
        self.client().create_bucket(Bucket=bucket)

    def put_object(self, bucket: str, key: str, data: bytes) -> str:
        """Store an object and return its entity tag, quotes included."""
        etag: str = self.client().put_object(Bucket=bucket, Key=key, Body=data)["ETag"]
        return etag

    def delete_object(self, bucket: str, key: str) -> None:
        """Delete an object."""
        self.client().delete_object(Bucket=bucket, Key=key)

    def create_reader(self, user: str, buckets: Sequence[str]) -> S3Credentials:
        """Create a user who may read these buckets and nothing else; return its key."""
        resources = [f"arn:aws:s3:::{bucket}{tail}" for bucket in buckets for tail in ("", "/*")]
        return self._create_user(user, ["s3:GetObject", "s3:ListBucket"], resources)

    def create_another_key(self, user: str) -> S3Credentials:
        """Return a further key of an existing user, as in a rotation."""
        answer = self.client(service="iam").create_access_key(UserName=user)["AccessKey"]
        return S3Credentials(answer["AccessKeyId"], answer["SecretAccessKey"])

    def revoke(self, user: str, credentials: S3Credentials) -> None:
        """Delete a user's key: calls signed with it are refused from now on."""
        self.client(service="iam").delete_access_key(
            UserName=user, AccessKeyId=credentials.access_key_id
        )

    def _run(self, port: int) -> Child:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        return Child(command, log=self.folder / "moto.log", env=environment(), cwd=self.folder)

    def _prepare(self) -> None:
        self.admin = WORTHLESS
        self.admin = self._create_user("administrator", ["*"], ["*"])
        plain = {"Content-Type": "text/plain"}
        _request("POST", f"{self.direct_url}/moto-api/reset-auth", data=b"0", headers=plain)

    def _create_user(
        self, user: str, actions: Sequence[str], resources: Sequence[str]
    ) -> S3Credentials:
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": list(resources)}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        iam = self.client(service="iam")
        iam.create_user(UserName=user)
        iam.put_user_policy(UserName=user, PolicyName="own", PolicyDocument=json.dumps(policy))
        return self.create_another_key(user)

    def _client(self, service: str, credentials: S3Credentials, endpoint: str) -> Any:
        key = (service, credentials, endpoint)
        if key not in self._clients:
            self._clients[key] = _boto_client(*key)
        return self._clients[key]


@dataclass(frozen=True, repr=False)
class RegistryLogin:
    """A password and its bcrypt hash: precomputed, for nothing here computes one."""

    password: str
    hashed: str


FIRST_LOGIN = RegistryLogin(
    "first-password", "$2b$05$KBlAQP/TqJlyOYd/JCddveTCqgacB35CUFmh9BJs13edxtGKw1y2."
)
SECOND_LOGIN = RegistryLogin(
    "second-password", "$2b$05$9m7VvR49iDYybMk32XGAYeZlbd0sW4aJlwD5Bl4f5dezp3Qnb2nPu"
)


class RegistryServer(_Origin):
    """
    The distribution registry over plain HTTP, serving a folder.

    Args:
        users: With any, every request needs basic credentials of one of them.
        folder: Where blobs, configuration and logs go; by default a temporary one.
    """

    prefix = "registry"

    def __init__(
        self,
        users: Mapping[str, RegistryLogin] | None = None,
        folder: Path | None = None,
        *,
        listen: str = LOOPBACK,
    ) -> None:
        super().__init__(folder, listen=listen)
        self._users = dict(users or {})

    @property
    def host(self) -> str:
        """Host and port through the counting proxy, as in an image reference."""
        return self.requests.address

    def set_users(self, users: Mapping[str, RegistryLogin]) -> None:
        """Replace who may log in; the running registry notices at its next request."""
        if not self._users or not users:
            raise ValueError("a registry is with or without users for its whole life")
        self._users = dict(users)
        self._write_users()

    def push_blob(self, repository: str, data: bytes) -> str:
        """Upload a blob and return its digest."""
        digest = digest_of(data)
        begun = self._ask("POST", f"{self.direct_url}/v2/{repository}/blobs/uploads/")
        location = begun.headers["Location"]
        separator = "&" if "?" in location else "?"
        octets = {"Content-Type": "application/octet-stream"}
        self._ask("PUT", f"{location}{separator}digest={digest}", data=data, headers=octets)
        return digest

    def push_manifest(self, repository: str, tag: str, blobs: Mapping[str, int]) -> str:
        """Upload an OCI manifest with these layers (digest to size) and return its digest."""
        layers = [_descriptor("application/octet-stream", *blob) for blob in blobs.items()]
        config = self.push_blob(repository, EMPTY_CONFIG)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": _descriptor("application/vnd.oci.empty.v1+json", config, len(EMPTY_CONFIG)),
            "layers": layers,
        }
        return self.push_raw_manifest(repository, tag, json.dumps(manifest).encode(), MANIFEST_TYPE)

    def push_raw_manifest(self, repository: str, tag: str, data: bytes, media_type: str) -> str:
        """Upload a manifest as it is and return its digest."""
        url = f"{self.direct_url}/v2/{repository}/manifests/{tag}"
        self._ask("PUT", url, data=data, headers={"Content-Type": media_type})
        return digest_of(data)

    def delete_blob(self, repository: str, digest: str) -> None:
        """Delete a blob from a repository."""
        self._ask("DELETE", f"{self.direct_url}/v2/{repository}/blobs/{digest}")

    def _run(self, port: int) -> Child:
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(self._config(port)))
        home = environment(OTEL_TRACES_EXPORTER="none")
        command: list[str | Path] = [locate("registry"), "serve", config]
        return Child(command, log=self.folder / "registry.log", env=home, cwd=self.folder)

    def _config(self, port: int) -> dict[str, Any]:
        storage = {
            "filesystem": {"rootdirectory": str(self.folder / "data")},
            "delete": {"enabled": True},
        }
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "info"},
            "storage": storage,
            "http": {"addr": f"127.0.0.1:{port}", "secret": "for one test run"},
        }
        if self._users:
            path = str(self._write_users())
            config["auth"] = {"htpasswd": {"realm": "blobcache", "path": path}}
        return config

    def _write_users(self) -> Path:
        path = self.folder / "htpasswd"
        lines = [f"{user}:{login.hashed}\n" for user, login in self._users.items()]
        path.write_text("".join(lines))
        return path

    def _ask(
        self,
        method: str,
        url: str,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> "Answer":
        login = next(iter(self._users.items()), None)
        given = {} if login is None else basic_authorization(login[0], login[1].password)
        return _request(method, url, data=data, headers={**given, **(headers or {})})


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def digest_of(data: bytes) -> str:
    """Return the OCI digest of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def basic_authorization(user: str, password: str) -> dict[str, str]:
    """Return the header of HTTP's basic scheme."""
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {pair}"}


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, str | int]:
    return {"mediaType": media_type, "digest": digest, "size": size}


def _request(
    method: str,
    url: str,
    *,
    data: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """
    Ask once, through no proxy.

    Raises:
        OriginError: The answer was an error, or there was none.
    """
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=REQUEST_TIMEOUT_SECONDS) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            told = error.read().decode(errors="replace")
        raise OriginError(f"{method} {url} was answered {error.code}: {told}") from None
    except OSError as error:
        raise OriginError(f"{method} {url} was not answered: {error}") from error


def _boto_client(service: str, credentials: S3Credentials, endpoint: str) -> Any:
    session = boto3.session.Session(
        aws_access_key_id=credentials.access_key_id,
        aws_secret_access_key=credentials.secret_access_key,
        aws_session_token=credentials.session_token,
        region_name=REGION,
    )
    plain = Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    return session.client(service, endpoint_url=endpoint, config=plain)
