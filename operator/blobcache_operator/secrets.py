"""
Credentials from Secrets: read one by one by name, never listed or watched.

The operator may read a Secret only where its administrator bound it to, and uses it only if its
owner labelled it. What was read stays in memory, for a config's credentials depend on its backend.
"""

import asyncio
import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import structlog

from blobcache_api import credentials as rules
from blobcache_operator import errors
from blobcache_operator.kube import JSONObject, Kube
from blobcache_operator.snapshot import ConfigFacts, CredentialFacts, Failure

READS_AT_ONCE_MAX = 8
# So long a Secret that cannot be read holds back the first plan; then its config goes without.
UNREADABLE_SECONDS_MAX = 60.0
# Somebody is likely mending what is missing or unusable, and waits.
PROBLEM_INTERVAL_SECONDS = 10.0

SecretName = tuple[str, str]

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Known:
    """The last good answer for a Secret: its content, or why there is none."""

    version: str = ""
    type: str = ""
    labels: Mapping[str, str] | None = None
    data: Mapping[str, bytes] | None = None
    failure: Failure | None = None


class SecretReader:
    """
    Reads the Secrets that configs name.

    Args:
        kube: The API server.
        interval_seconds: Age at which a Secret is read again.
        operator_namespace: For messages.
    """

    def __init__(self, kube: Kube, *, interval_seconds: float, operator_namespace: str) -> None:
        self._kube = kube
        self._operator_namespace = operator_namespace
        self._interval_seconds = interval_seconds
        self._known: dict[SecretName, _Known] = {}
        self._read_time: dict[SecretName, float] = {}
        self._users: dict[SecretName, frozenset[tuple[str, int]]] = {}
        """Uid and generation of the configs that a Secret was last read for."""
        self._unreadable_since: dict[SecretName, float] = {}
        self._unfit: set[SecretName] = set()
        """Secrets that were read but gave a config no credentials."""
        self._slots = asyncio.Semaphore(READS_AT_ONCE_MAX)

    async def refresh(self, configs: Iterable[ConfigFacts]) -> bool:
        """
        Read what is due. What nobody names any more stays until `forget_unnamed`.

        Returns:
            Whether anything is different now.

        Raises:
            KubeUnavailable: A Secret that was never read cannot be read, for less than
                `UNREADABLE_SECONDS_MAX`: agents may have its credentials, so no plan yet.
        """
        found: dict[SecretName, set[tuple[str, int]]] = {}
        for config in configs:
            if (name := secret_name(config)) is not None:
                found.setdefault(name, set()).add((config.uid, config.generation))
        users = {name: frozenset(uses) for name, uses in found.items()}
        now = asyncio.get_running_loop().time()
        # Who changes a config has often just changed its Secret, too.
        due = [
            name
            for name in sorted(users)
            if self._due_time(name) <= now or self._users.get(name) != users[name]
        ]
        before = dict(self._known)
        self._users = users
        answers = await asyncio.gather(*(self._read(name) for name in due), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return before != self._known

    def forget_unnamed(self) -> None:
        """
        Drop what the configs of the last refresh do not name.

        To be called once nobody asks for the configs of an earlier one any more.
        """
        for table in (self._known, self._read_time, self._unreadable_since):
            for gone in table.keys() - self._users.keys():
                del table[gone]
        self._unfit &= self._users.keys()

    def seconds_until_due(self) -> float:
        """Return when the next Secret is to be read, at most the interval from now."""
        now = asyncio.get_running_loop().time()
        next_time = min(map(self._due_time, self._users), default=now + self._interval_seconds)
        return min(max(next_time - now, 0.0), self._interval_seconds)

    def _due_time(self, name: SecretName) -> float:
        known = self._known.get(name)
        if known is None:
            return float("-inf")
        labels = known.labels or {}
        is_usable = known.failure is None and labels.get(rules.LABEL) == "true"
        interval = self._interval_seconds
        if not is_usable or name in self._unfit or name in self._unreadable_since:
            interval = min(interval, PROBLEM_INTERVAL_SECONDS)
        return self._read_time.get(name, float("-inf")) + interval

    def find(self, config: ConfigFacts) -> CredentialFacts:
        """Return a config's credentials as of the last refresh."""
        name = secret_name(config)
        if name is None or config.spec is None:
            return CredentialFacts()
        known = self._known[name]
        if known.failure is not None:
            return CredentialFacts(version=known.version, problem=known.failure)
        unlabelled = rules.find_label_problem(known.labels or {}, namespace=name[0], name=name[1])
        found = unlabelled or rules.resolve_credentials(
            known.type, known.data or {}, config.spec.backend, namespace=name[0]
        )
        if isinstance(found, rules.CredentialsProblem):
            self._unfit.add(name)
            return CredentialFacts(
                version=known.version, problem=Failure(found.reason, found.message)
            )
        return CredentialFacts(credentials=found, version=known.version)

    async def _read(self, name: SecretName) -> None:
        loop = asyncio.get_running_loop()
        namespace, secret = name
        try:
            async with self._slots:
                body = await self._kube.get(f"/api/v1/namespaces/{namespace}/secrets/{secret}")
            self._known[name] = _decode(body)
        except errors.NotFound:
            self._known[name] = _Known(failure=_not_found(namespace, secret))
        except errors.Forbidden:
            self._known[name] = _Known(
                failure=_forbidden(namespace, secret, self._operator_namespace)
            )
        except errors.KubeError as error:
            since = self._unreadable_since.setdefault(name, loop.time())
            if name in self._known:
                log.info("Secret was not read, keeping what is known", secret="/".join(name))
                self._read_time[name] = loop.time()  # each look lists the cluster: not at once
                return
            if loop.time() - since < UNREADABLE_SECONDS_MAX:
                raise
            self._known[name] = _Known(
                failure=Failure(
                    "SecretUnreadable",
                    f"Secret '{namespace}/{secret}' cannot be read: {error.reason}. See the API "
                    "server's log.",
                )
            )
        self._read_time[name] = loop.time()
        self._unreadable_since.pop(name, None)
        self._unfit.discard(name)


def secret_name(config: ConfigFacts) -> SecretName | None:
    """Return namespace and name of the Secret a config needs."""
    if config.spec is None or config.spec.backend.credentials_secret_ref is None:
        return None
    return (config.namespace, config.spec.backend.credentials_secret_ref.name)


def _decode(body: JSONObject) -> _Known:
    metadata = body["metadata"]
    version = f"{metadata['uid']}/{metadata['resourceVersion']}"
    labels = metadata.get("labels") or {}
    kind = str(body.get("type") or "Opaque")
    if labels.get(rules.LABEL) != "true" or kind == rules.SERVICE_ACCOUNT_TOKEN_TYPE:
        # Not opened to us: its values shall not even stay in memory.
        return _Known(version=version, type=kind, labels=labels)
    try:
        data = {
            key: base64.b64decode(value, validate=True)
            for key, value in (body.get("data") or {}).items()
        }
    except (binascii.Error, TypeError):
        return _Known(failure=Failure("SecretMalformed", "The Secret's data is not base64."))
    return _Known(version=version, type=kind, labels=labels, data=data)


def _not_found(namespace: str, name: str) -> Failure:
    return Failure(
        "SecretNotFound",
        f"Secret '{namespace}/{name}' does not exist. Create it, for S3 by: kubectl -n {namespace} "
        f"create secret generic {name} --from-literal=accessKeyID=... "
        f"--from-literal=secretAccessKey=..., then: kubectl -n {namespace} label secret {name} "
        f"{rules.LABEL}=true",
    )


def _forbidden(namespace: str, name: str, operator_namespace: str) -> Failure:
    return Failure(
        "SecretForbidden",
        f"The operator may not read Secret '{namespace}/{name}'. The administrator adds "
        f"'{namespace}' to the chart's `secretNamespaces`, or: kubectl -n {namespace} create "
        "rolebinding blobcache-operator-secrets --clusterrole=blobcache-operator-secrets "
        f"--serviceaccount={operator_namespace}:blobcache-operator",
    )
