"""Configuration by files: BlobCacheConfig and Secret objects in YAML, all checked before any acts.

Everything wrong in all files is told at once, each line with file, object, field and what must
change; nothing that may be a secret is quoted.
"""

from __future__ import annotations

import base64
import binascii
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from blobcache_agent.errors import Refusal, UsageError
from blobcache_agent.settings import Permissions
from blobcache_agent.translate import Resource, Wanted, to_engine, translate
from blobcache_api.credentials import CredentialsProblem, resolve_credentials
from blobcache_api.v1alpha1.config import BlobCacheConfig
from blobcache_storage.credentials import Anonymous

API_VERSION = "blobcache.dev/v1alpha1"
DEFAULT_NAMESPACE = "default"
FILE_BYTES_MAX = 16 * 1024 * 1024
OBJECTS_MAX = 4096
PROBLEMS_MAX = 100
"""Lines printed; more of them help nobody."""

_UID_SPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "standalone.blobcache.dev")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_SECRET_FIELDS = {"apiVersion", "kind", "metadata", "type", "immutable", "data", "stringData"}


def uid_of(namespace: str, name: str) -> str:
    """Return the uid of a configuration: the same on every start, so that its bytes are found."""
    return str(uuid.uuid5(_UID_SPACE, f"{namespace}/{name}"))


def load(files: Sequence[Path], permissions: Permissions) -> list[Wanted]:
    """Read all files and return the configurations, in the files' order. Blocking.

    Raises:
        UsageError: Something is wrong; it has a line for each thing.
    """
    loading = _Loading()
    for file in files:
        loading.read(file)
    wanted = loading.resolve(permissions)
    if loading.problems:
        shown = loading.problems[:PROBLEMS_MAX]
        more = len(loading.problems) - len(shown)
        raise UsageError([*shown, f"and {more} more"] if more else shown)
    if not wanted:
        raise UsageError([f"{files[0]}: must hold at least one object of kind 'BlobCacheConfig'"])
    return wanted


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an object stands, for messages."""

    file: Path
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}: {self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, repr=False)
class _Secret:
    """A Secret's values, decoded; it does not print itself."""

    place: _Place
    type: str
    values: Mapping[str, bytes]


class _StrictLoader(yaml.SafeLoader):
    """YAML without keys given twice, of which one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Loading:
    """Objects and problems gathered over all files."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._configs: dict[tuple[str, str], tuple[_Place, BlobCacheConfig]] = {}
        self._secrets: dict[tuple[str, str], _Secret] = {}
        self._broken_secrets: set[tuple[str, str]] = set()
        self._count = 0

    def read(self, file: Path) -> None:
        """Read one file's objects."""
        try:
            with file.open("rb") as stream:
                raw = stream.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            self.problems.append(f"{file}: must be readable: {error.strerror}")
            return
        if len(raw) > FILE_BYTES_MAX:
            self.problems.append(f"{file}: must be at most {FILE_BYTES_MAX} bytes")
            return
        try:
            for document in yaml.load_all(raw, _StrictLoader):
                for body in _objects(document):
                    self._take(file, body)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.problems.append(f"{file}{_yaml_problem(error)}")

    def _take(self, file: Path, body: Any) -> None:
        self._count += 1
        if self._count == OBJECTS_MAX + 1:
            self.problems.append(f"{file}: all files must hold at most {OBJECTS_MAX} objects")
        if self._count > OBJECTS_MAX:
            return
        if not isinstance(body, dict):
            self.problems.append(f"{file}: object {self._count} must be a mapping")
            return
        kind, version = body.get("kind"), body.get("apiVersion")
        place = _place(file, body)
        if kind == "BlobCacheConfig" and version == API_VERSION:
            self._take_config(place, body)
        elif kind == "Secret" and version == "v1":
            self._take_secret(place, body)
        else:
            self.problems.append(
                f"{place}: `apiVersion` and `kind` must be '{API_VERSION}' and 'BlobCacheConfig', "
                "or 'v1' and 'Secret'"
            )

    def _is_well_named(self, place: _Place) -> bool:
        wrong = [
            field
            for field, value in (("namespace", place.namespace), ("name", place.name))
            if not _NAME.fullmatch(value)
        ]
        self.problems += [
            f"{place}: `metadata.{field}` must be 1 to 63 lower-case letters, digits, '-' and '.', "
            "beginning and ending with a letter or digit"
            for field in wrong
        ]
        return not wrong

    def _take_config(self, place: _Place, body: Mapping[str, Any]) -> None:
        key = (place.namespace, place.name)
        is_usable = self._is_well_named(place)
        if key in self._configs:
            self.problems.append(
                f"{place}: must be given once; also in {self._configs[key][0].file}"
            )
            is_usable = False
        wanted = {field: value for field, value in body.items() if field != "status"}
        try:
            config = BlobCacheConfig.model_validate(wanted)
        except ValidationError as error:
            self.problems += [f"{place}: {line}" for line in _field_problems(error)]
            return
        if is_usable:
            self._configs[key] = (place, config)

    def _take_secret(self, place: _Place, body: Mapping[str, Any]) -> None:
        key = (place.namespace, place.name)
        known = len(self.problems)
        self._is_well_named(place)
        if key in self._secrets:
            self.problems.append(
                f"{place}: must be given once; also in {self._secrets[key].place.file}"
            )
        self.problems += [
            f"{place}: `{str(field)[:64]}` is not a field of a Secret"
            for field in body
            if field not in _SECRET_FIELDS
        ]
        values = dict(self._secret_values(place, body))
        if len(self.problems) == known:
            self._secrets[key] = _Secret(place, str(body.get("type", "Opaque")), values)
        else:
            self._broken_secrets.add(key)

    def _secret_values(self, place: _Place, body: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
        """Yield keys and values; `stringData` comes last and so wins, as in a cluster."""
        for section in ("data", "stringData"):
            entries = body.get(section)
            if entries is None:
                continue
            if not isinstance(entries, dict):
                self.problems.append(f"{place}: `{section}` must be a mapping")
                continue
            for key, value in entries.items():
                field = f"`{section}.{str(key)[:64]}`"
                if not isinstance(key, str) or not isinstance(value, str):
                    self.problems.append(f"{place}: {field} must be a string; put it in quotes")
                    continue
                if section == "stringData":
                    yield key, value.encode()
                    continue
                try:
                    yield key, base64.b64decode(value, validate=True)
                except (binascii.Error, ValueError):
                    self.problems.append(
                        f"{place}: {field} must be base64; plain text goes into `stringData`"
                    )

    def resolve(self, permissions: Permissions) -> list[Wanted]:
        """Join configurations with their Secrets and check what is allowed here."""
        wanted = []
        for place, config in self._configs.values():
            resource = Resource(
                namespace=config.metadata.namespace,
                name=config.metadata.name,
                uid=uid_of(config.metadata.namespace, config.metadata.name),
                spec=config.spec,
            )
            try:
                found = self._wanted(resource, str(place))
                if found is not None:
                    translate(found.resource, found.credentials, permissions)
                    wanted.append(found)
            except Refusal as refusal:
                self.problems.append(f"{place}: {refusal.message}")
        return wanted

    def _wanted(self, resource: Resource, place: str) -> Wanted | None:
        """Return the configuration with its credentials; None if its Secret is wrong already."""
        reference = resource.spec.backend.credentials_secret_ref
        if reference is None:
            return Wanted(resource, Anonymous(), place=place)
        key = (resource.namespace, reference.name)
        if key in self._broken_secrets:
            return None
        if key not in self._secrets:
            raise Refusal(
                "SecretNotFound",
                f"`spec.backend.credentialsSecretRef.name` must name a Secret of namespace "
                f"'{resource.namespace}' in one of the files; there is no '{reference.name}'",
            )
        secret = self._secrets[key]
        resolved = resolve_credentials(
            secret.type, secret.values, resource.spec.backend, namespace=resource.namespace
        )
        if isinstance(resolved, CredentialsProblem):
            # The rest of the sentence is a kubectl command, which is of no use here.
            raise Refusal(resolved.reason, resolved.message.partition(": kubectl ")[0])
        return Wanted(resource, to_engine(resolved), place=place)


def _objects(document: Any) -> Iterator[Any]:
    """Yield the objects of a document; `kubectl get -o yaml` wraps several in a List."""
    if document is None:
        return
    if isinstance(document, dict) and document.get("kind") == "List":
        items = document.get("items")
        yield from items if isinstance(items, list) else ()
        return
    yield document


def _place(file: Path, body: Mapping[str, Any]) -> _Place:
    metadata = body.get("metadata")
    known = metadata if isinstance(metadata, dict) else {}
    return _Place(
        file,
        str(body.get("kind", "object"))[:64],
        str(known.get("namespace", DEFAULT_NAMESPACE))[:63],
        str(known.get("name", ""))[:63],
    )


def _field_problems(error: ValidationError) -> Iterator[str]:
    """Yield a line for each field that is wrong, without its value."""
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        path = ""
        for part in fault["loc"]:
            path += f"[{part}]" if isinstance(part, int) else f".{str(part)[:64]}"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "is not a field; check its spelling and place"
        elif fault["type"] == "missing":
            message = "must be given"
        yield f"`{path.removeprefix('.') or '.'}` {message}"


def _yaml_problem(error: Exception) -> str:
    """Return place and kind of a YAML error; what the parser quotes may be a secret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = _QUOTED.sub("…", error.problem or "it cannot be read")
        return f":{mark.line + 1}:{mark.column + 1}: must be valid YAML: {problem}"
    return ": must be valid YAML"
