"""Which credentials a Secret holds for a backend; pure, for the operator and for standalone.

Messages name keys and the command that mends the Secret, never a value.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from blobcache_api.pushed_credentials import SECRET_LENGTH_MAX, PushedCredentials
from blobcache_api.v1alpha1.backend import BackendSpec, BackendType, RegistryBackend, Scheme
from blobcache_api.v1alpha1.common import describe_errors

LABEL = "blobcache.dev/credentials"
"""Label with value `true` by which a Secret's owner lets Blobcache use it."""

SERVICE_ACCOUNT_TOKEN_TYPE = "kubernetes.io/service-account-token"  # noqa: S105
DOCKER_CONFIG_KEY = ".dockerconfigjson"
DOCKER_CONFIG_SIZE_BYTES_MAX = 256 * 1024

_DOCKER_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_DEFAULT_PORTS = {Scheme.HTTPS: ":443", Scheme.HTTP: ":80"}


@dataclass(frozen=True, slots=True)
class CredentialsProblem:
    """Why a Secret cannot be used, and the command that mends it."""

    reason: str
    """CamelCase: SecretNotLabelled, SecretRefused, SecretMalformed, SecretKeysMissing,
    SecretKeysAmbiguous, SecretKeysUnfit or RegistryHostMissing."""
    message: str


class _KeySet(Enum):
    """Sets of keys: what must be there, and what may be."""

    ACCESS_KEY = (("accessKeyID", "secretAccessKey"), ("sessionToken",))
    BASIC = (("username", "password"), ())
    TOKEN = (("token",), ())
    DOCKER_CONFIG = ((DOCKER_CONFIG_KEY,), ())

    def __init__(self, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
        self.required = required
        self.known = required + optional


_PERMITTED = {
    BackendType.S3: (_KeySet.ACCESS_KEY,),
    BackendType.OSS: (_KeySet.ACCESS_KEY,),
    BackendType.REGISTRY: (_KeySet.BASIC, _KeySet.TOKEN, _KeySet.DOCKER_CONFIG),
    BackendType.HTTP_PROXY: (_KeySet.BASIC, _KeySet.TOKEN),
    BackendType.LOCAL_FS: (),
}


@dataclass(frozen=True, slots=True)
class _SecretName:
    """A Secret as kubectl names it."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"Secret '{self.namespace}/{self.name}'"

    def replace_command(self, keys: tuple[str, ...]) -> str:
        """
        Return the command that replaces the Secret by one with these keys.

        By force, which deletes it first: `apply` keeps other keys, and refuses another type.
        """
        create = f"{self._create_command(keys)} --dry-run=client -o yaml"
        return f"{create} | kubectl replace --force -f -, then {self.label_command}"

    def create_command(self, keys: tuple[str, ...]) -> str:
        """Return the command that creates the Secret with these keys."""
        return f"{self._create_command(keys)}, then {self.label_command}"

    def _create_command(self, keys: tuple[str, ...]) -> str:
        kind, values = "generic", "".join(f" --from-literal={key}=..." for key in keys)
        if keys == (DOCKER_CONFIG_KEY,):
            kind = "docker-registry"
            values = " --docker-server=... --docker-username=... --docker-password=..."
        return f"kubectl -n {self.namespace} create secret {kind} {self.name}{values}"

    @property
    def label_command(self) -> str:
        """The command that labels the Secret."""
        return f"kubectl -n {self.namespace} label secret {self.name} {LABEL}=true"


def find_label_problem(
    labels: Mapping[str, str], *, namespace: str, name: str
) -> CredentialsProblem | None:
    """Return the problem of a Secret that its owner has not opened to Blobcache, or None."""
    if labels.get(LABEL) == "true":
        return None
    secret = _SecretName(namespace, name)
    return CredentialsProblem(
        "SecretNotLabelled",
        f"{secret} must have the label {LABEL}=true to be used: {secret.label_command}",
    )


def resolve_credentials(
    secret_type: str,
    data: Mapping[str, bytes],
    backend: BackendSpec,
    *,
    namespace: str = "default",
) -> PushedCredentials | CredentialsProblem:
    """
    Return the one set of credentials that a Secret holds for a backend.

    Args:
        secret_type: The Secret's `type`; service-account tokens are refused.
        data: Its decoded `data`; keys of no set are ignored, a line's end after a value is cut.
        backend: Says what sets are possible, and the host a docker configuration must serve.
        namespace: For messages; the Secret's name is that of `credentialsSecretRef`.
    """
    reference = backend.credentials_secret_ref
    secret = _SecretName(namespace, reference.name if reference else "NAME")
    permitted = _PERMITTED[backend.type]
    if secret_type == SERVICE_ACCOUNT_TOKEN_TYPE:
        return CredentialsProblem(
            "SecretRefused",
            f"{secret} is a service account's token, which is never sent to an origin; create "
            f"another and name it in `spec.backend.credentialsSecretRef`: "
            f"{_other_command(namespace, permitted)}",
        )
    chosen = _choose_set(data, permitted, backend.type, secret)
    if isinstance(chosen, CredentialsProblem):
        return chosen
    if chosen is _KeySet.DOCKER_CONFIG and backend.registry is not None:
        return _read_docker_config(data[DOCKER_CONFIG_KEY], backend.registry, secret)
    values = {}
    for key in chosen.known:
        if key not in data:
            continue
        text = _read_text(data[key])
        if text is None:
            return CredentialsProblem(
                "SecretMalformed",
                f"{secret}: key `{key}` must be text of 1 to {SECRET_LENGTH_MAX} characters "
                f"without control characters: {secret.replace_command(chosen.required)}",
            )
        values[key] = text
    return _build(values, secret)


def _choose_set(
    data: Mapping[str, bytes],
    permitted: tuple[_KeySet, ...],
    backend_type: BackendType,
    secret: _SecretName,
) -> _KeySet | CredentialsProblem:
    if not permitted:
        return CredentialsProblem(
            "SecretKeysUnfit",
            f"a {backend_type.value} backend takes no credentials; remove "
            "`spec.backend.credentialsSecretRef`",
        )
    present = [keys for keys in _KeySet if any(key in data for key in keys.known)]
    if not present:
        wanted = " or ".join("`" + "` and `".join(keys.required) + "`" for keys in permitted)
        return CredentialsProblem(
            "SecretKeysMissing",
            f"{secret} must have the keys {wanted}: {_commands(secret, permitted)}",
        )
    if len(present) > 1:
        found = ", ".join(f"`{key}`" for keys in present for key in keys.known if key in data)
        return CredentialsProblem(
            "SecretKeysAmbiguous",
            f"{secret} must have exactly one set of keys but has {found}: "
            f"{_commands(secret, permitted)}",
        )
    chosen = present[0]
    if chosen not in permitted:
        return CredentialsProblem(
            "SecretKeysUnfit",
            f"{secret}: key `{chosen.required[0]}` does not fit a {backend_type.value} backend: "
            f"{_commands(secret, permitted)}",
        )
    for key in chosen.required:
        if key not in data:
            return CredentialsProblem(
                "SecretKeysMissing",
                f"{secret} must also have the key `{key}`: "
                f"{secret.replace_command(chosen.required)}",
            )
    return chosen


def _commands(secret: _SecretName, permitted: tuple[_KeySet, ...]) -> str:
    if not permitted:
        return "remove `spec.backend.credentialsSecretRef`"
    return secret.replace_command(permitted[0].required)


def _other_command(namespace: str, permitted: tuple[_KeySet, ...]) -> str:
    """Return the command that creates a Secret beside the one that cannot be used."""
    other = _SecretName(namespace, "origin-credentials")
    return other.create_command(permitted[0].required) if permitted else _commands(other, ())


def _read_text(raw: bytes) -> str | None:
    """Return a value as text without its line's end; None when it cannot be a credential."""
    try:
        text = raw.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return None
    if not 1 <= len(text) <= SECRET_LENGTH_MAX:
        return None
    return None if any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in text) else text


def _build(
    values: Mapping[str, str], secret: _SecretName
) -> PushedCredentials | CredentialsProblem:
    try:
        return PushedCredentials.model_validate(dict(values))
    except ValidationError as error:
        return CredentialsProblem("SecretMalformed", f"{secret}: {describe_errors(error)}")


def _read_docker_config(
    raw: bytes, registry: RegistryBackend, secret: _SecretName
) -> PushedCredentials | CredentialsProblem:
    remedy = secret.replace_command((DOCKER_CONFIG_KEY,))
    auths = _read_auths(raw)
    if auths is None:
        return CredentialsProblem(
            "SecretMalformed",
            f"{secret}: key `{DOCKER_CONFIG_KEY}` must be a docker configuration, JSON with "
            f"`auths`: {remedy}",
        )
    entry = _find_entry(auths, registry)
    if entry is None:
        return CredentialsProblem(
            "RegistryHostMissing",
            f"{secret}: key `{DOCKER_CONFIG_KEY}` must have an entry for '{registry.host}', "
            f"whose credentials are sent to no other host: {remedy}",
        )
    values = _read_entry(entry)
    if values is None:
        return CredentialsProblem(
            "SecretMalformed",
            f"{secret}: key `{DOCKER_CONFIG_KEY}`: the entry for '{registry.host}' must have "
            f"`username` and `password`, `auth` (base64 of both) or `registrytoken`; an "
            f"`identitytoken` cannot be used: {remedy}",
        )
    return _build(values, secret)


def _read_auths(raw: bytes) -> dict[str, Any] | None:
    if len(raw) > DOCKER_CONFIG_SIZE_BYTES_MAX:
        return None
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    auths = body.get("auths") if isinstance(body, dict) else None
    return auths if isinstance(auths, dict) else None


def _find_entry(auths: Mapping[str, Any], registry: RegistryBackend) -> dict[str, Any] | None:
    """Return the entry with the longest path that covers the registry's repository."""
    host = _normalize_host(registry.host, registry.scheme)
    repository = f"{registry.repository or ''}/"
    found: tuple[int, dict[str, Any]] | None = None
    for key, entry in auths.items():
        parts = _split_key(key)
        if parts is None or _normalize_host(parts[0], registry.scheme) != host:
            continue
        covers = parts[1] == "" or repository.startswith(f"{parts[1]}/")
        if covers and isinstance(entry, dict) and (found is None or len(parts[1]) > found[0]):
            found = (len(parts[1]), entry)
    return None if found is None else found[1]


def _split_key(key: str) -> tuple[str, str] | None:
    """Return host and path of a key such as 'https://index.docker.io/v1/' or 'ghcr.io/team'."""
    try:
        parts = urlsplit(key if "://" in key else f"//{key}")
    except ValueError:
        return None
    path = parts.path.strip("/")
    # The registry API's own version is not part of a repository's name.
    return parts.netloc, "" if path in ("v1", "v2") else path


def _normalize_host(host: str, scheme: Scheme) -> str:
    lowered = host.lower().removesuffix(_DEFAULT_PORTS[scheme])
    return "docker.io" if lowered in _DOCKER_HUB else lowered


def _read_entry(entry: Mapping[str, Any]) -> dict[str, str] | None:
    username, password = entry.get("username"), entry.get("password")
    if not (username and password) and isinstance(entry.get("auth"), str):
        try:
            decoded = base64.b64decode(entry["auth"], validate=True)
        except (binascii.Error, ValueError):
            return None
        username, _, password = (_read_text(decoded) or "").partition(":")
    if isinstance(username, str) and isinstance(password, str) and username and password:
        return {"username": username, "password": password}
    token = entry.get("registrytoken")
    return {"token": token} if isinstance(token, str) and token else None
