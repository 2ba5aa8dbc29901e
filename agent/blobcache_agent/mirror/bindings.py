"""Which configuration answers for which registry host: only what the administrator bound."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BINDINGS_MAX = 64
HOST_CHARACTERS_MAX = 255

_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?")
_NAME = re.compile(r"[a-z0-9](?:[-.a-z0-9]{0,61}[a-z0-9])?")
_FORM = "HOST[@REGISTRY]=NAMESPACE/NAME"


@dataclass(frozen=True, slots=True)
class Binding:
    """One host and who answers for it."""

    host: str
    """As image references name it: `name[:port]`, lower case."""
    registry: str
    """Where that host's registry answers; the configuration must name the same."""
    namespace: str
    name: str

    @property
    def config_id(self) -> str:
        """`namespace/name` of the configuration."""
        return f"{self.namespace}/{self.name}"

    def fits(self, registry_host: str, scheme: str) -> bool:
        """Whether a configuration of that registry may answer for this host."""
        default = ":443" if scheme == "https" else ":80"
        return registry_host.lower().removesuffix(default) == self.registry.removesuffix(default)


def parse_host(text: str) -> str:
    """Return a registry's host in lower case.

    Raises:
        ValueError: It is no `name[:port]`; the message is the rest of a sentence.
    """
    host = text.lower()
    if len(host) > HOST_CHARACTERS_MAX or not _HOST.fullmatch(host):
        raise ValueError("must be a registry's host as in image references: name[:port]")
    return host


def parse_binding(text: str) -> Binding:
    """Read `HOST[@REGISTRY]=NAMESPACE/NAME`.

    Raises:
        ValueError: It has another form; the message is the rest of a sentence.
    """
    hosts, equals, config = text.partition("=")
    namespace, slash, name = config.partition("/")
    if not equals or not slash or not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name)):
        raise ValueError(f"must be {_FORM}, such as registry.example:5000=blobcache/images")
    host, at, registry = hosts.partition("@")
    host = parse_host(host)
    return Binding(host, parse_host(registry) if at else host, namespace, name)


class Bindings:
    """All of them.

    Raises:
        ValueError: A host is bound twice, or there are too many.
    """

    def __init__(self, bindings: Iterable[Binding]) -> None:
        self._by_host: dict[str, Binding] = {}
        for binding in bindings:
            if binding.host in self._by_host:
                raise ValueError(f"must name '{binding.host}' once: one configuration per host")
            self._by_host[binding.host] = binding
        if len(self._by_host) > BINDINGS_MAX:
            raise ValueError(f"must name at most {BINDINGS_MAX} hosts")

    def __iter__(self) -> Iterator[Binding]:
        """Iterate over all of them."""
        return iter(self._by_host.values())

    def __len__(self) -> int:
        """Count."""
        return len(self._by_host)

    def __eq__(self, other: object) -> bool:
        """Compare by what is bound."""
        return isinstance(other, Bindings) and self._by_host == other._by_host

    def __hash__(self) -> int:
        """Hash what is bound."""
        return hash(tuple(sorted(self._by_host)))

    def find(self, host: str | None) -> Binding | None:
        """Return the binding of a host as a client names it.

        None means the only one there is, if there is just one.
        """
        if host is None:
            return next(iter(self._by_host.values())) if len(self._by_host) == 1 else None
        return self._by_host.get(host.lower())
