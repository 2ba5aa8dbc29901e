"""What a message tells people to type mends the Secret, on a real API server."""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

import pytest
from tests.harness.controlplane import ControlPlane

from blobcache_api.credentials import CredentialsProblem, find_label_problem, resolve_credentials
from blobcache_api.pushed_credentials import PushedCredentials
from blobcache_api.v1alpha1.backend import BackendSpec

BACKENDS: dict[str, dict[str, Any]] = {
    "S3": {"type": "S3", "s3": {"endpoint": "http://s3.example.com", "bucket": "models"}},
    "Registry": {"type": "Registry", "registry": {"host": "registry.example.com"}},
}
VALUES = {
    "--docker-server=...": "--docker-server=registry.example.com",
    "--docker-username=...": "--docker-username=u",
}
DOCKER = json.dumps({"auths": {"other.example.com": {"username": "u", "password": "p"}}})


@pytest.mark.parametrize(
    ("backend", "kind", "data", "reason"),
    [
        ("S3", "Opaque", {"note": "x"}, "SecretKeysMissing"),
        ("S3", "Opaque", {"accessKeyID": "x"}, "SecretKeysMissing"),
        ("S3", "Opaque", {"accessKeyID": "x", "token": "x"}, "SecretKeysAmbiguous"),
        ("S3", "Opaque", {"accessKeyID": "a\nb", "secretAccessKey": "x"}, "SecretMalformed"),
        ("S3", "kubernetes.io/dockerconfigjson", {".dockerconfigjson": DOCKER}, "SecretKeysUnfit"),
        ("Registry", "Opaque", {".dockerconfigjson": DOCKER}, "RegistryHostMissing"),
    ],
)
def test_the_command_told_mends_the_secret(
    control_plane: ControlPlane, backend: str, kind: str, data: dict[str, str], reason: str
) -> None:
    """Whatever keys and type it had before."""
    namespace = f"remedy-{uuid.uuid4().hex[:8]}"
    control_plane.kubectl("create", "namespace", namespace)
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "key", "labels": {"blobcache.dev/credentials": "true"}},
        "type": kind,
        "stringData": data,
    }
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(body))
    found = _resolve(control_plane, namespace, backend)
    assert isinstance(found, CredentialsProblem)
    assert found.reason == reason
    _obey(control_plane, found.message)
    assert isinstance(_resolve(control_plane, namespace, backend), PushedCredentials)


def _resolve(
    plane: ControlPlane, namespace: str, backend: str
) -> PushedCredentials | CredentialsProblem:
    secret = json.loads(plane.kubectl("get", "secret", "key", "-n", namespace, "-o", "json").stdout)
    labels = secret["metadata"].get("labels") or {}
    assert find_label_problem(labels, namespace=namespace, name="key") is None
    data = {key: base64.b64decode(value) for key, value in secret["data"].items()}
    spec = BackendSpec.model_validate(
        {**BACKENDS[backend], "credentialsSecretRef": {"name": "key"}}
    )
    return resolve_credentials(secret["type"], data, spec, namespace=namespace)


def _obey(plane: ControlPlane, message: str) -> None:
    """Type what the message says: commands with pipes, one after the other."""
    for command in message[message.index("kubectl") :].split(", then "):
        output = None
        for part in command.split(" | "):
            words = [VALUES.get(word, word.replace("=...", "=x")) for word in part.split()]
            assert words.pop(0) == "kubectl"
            output = plane.kubectl(*words, input=output).stdout
