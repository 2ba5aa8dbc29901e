"""The operator's settings: defaults, then `BLOBCACHE_OPERATOR_*`, then flags."""

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from blobcache_api.quantity import Quantity

ENV_PREFIX = "BLOBCACHE_OPERATOR_"


def _split_agents(value: object) -> object:
    """Read `NODE=URL` pairs, from flags (a list) or the environment (separated by spaces)."""
    if isinstance(value, dict):
        return value
    pairs = value.split() if isinstance(value, str) else list(value)  # type: ignore[call-overload]
    agents = {}
    for pair in pairs:
        node, separator, url = pair.partition("=")
        if not separator or not node:
            raise ValueError(f"'{pair}' must be NODE=URL, such as node-1=https://127.0.0.1:7443")
        agents[node] = url.rstrip("/")
    return agents


class OperatorSettings(BaseSettings):
    """Everything an administrator can choose; the field texts are the flags' help."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        use_attribute_docstrings=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    namespace: str | None = None
    """Namespace of the operator's Lease, certificates and agents' Service."""
    kubeconfig: str | None = None
    """Kubeconfig to use instead of the pod's service account."""
    agent: Annotated[dict[str, str], NoDecode, BeforeValidator(_split_agents)] = Field(
        default_factory=dict
    )
    """NODE=URL of an agent outside the cluster; repeatable."""
    agent_service: str = "blobcache-agents"
    """Headless Service whose endpoints are the agents."""
    lease_name: str = "blobcache-operator"
    """Lease that says which replica leads."""
    lease_seconds: Annotated[float, Field(ge=3, le=300)] = 15.0
    """Time after which a Lease that is not renewed may be taken; renewing is given two thirds."""
    deployment: str | None = "blobcache-operator"
    """Deployment that owns the certificate Secrets."""
    write_agent_certs: Path | None = None
    """Directory to write ca.crt, tls.crt and tls.key for agents outside the cluster."""
    health_listen: str = "127.0.0.1:7081"
    """HOST:PORT of /healthz, /readyz and /metrics; an empty HOST is every address."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    configs_per_node_max: Annotated[int, Field(ge=1, le=256)] = 256
    """Configurations one node gets; the oldest first."""
    configs_per_namespace_max: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Configurations one namespace may have; the oldest first."""
    capacity_max: Quantity | None = None
    """Most capacity one configuration may ask for on a node, such as 500Gi."""
    namespace_capacity_max: Quantity | None = None
    """Most capacity all configurations of a namespace may ask for on a node."""
    protected_percent_max: Annotated[int, Field(ge=0, le=100)] = 50
    """Most of its capacity that a configuration's prefetch list may hold on to."""
    origin_rate_max: Quantity | None = None
    """Most bytes per second a configuration may take from its origin, on a node."""
    namespace_origin_rate_max: Quantity | None = None
    """Most bytes per second all configurations of a namespace may take, on a node."""
    resync_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """Time between two looks at an agent when nothing changed."""
    secret_seconds: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """Time between two reads of a credentials Secret."""
    drop_confirm_seconds: Annotated[float, Field(ge=0, le=3600)] = 60.0
    """Time a loss of more than half of a node's configurations must last to be believed."""

    @field_validator("agent")
    @classmethod
    def _check_agents(cls, agents: dict[str, str]) -> dict[str, str]:
        for node, url in agents.items():
            parts = urlsplit(url)
            if parts.scheme != "https" or not parts.hostname or parts.path:
                raise ValueError(f"the agent of node '{node}' must be an https://HOST:PORT URL")
        return agents

    @field_validator("health_listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]*):[0-9]{1,5}", value):
            raise ValueError("must be HOST:PORT, such as 127.0.0.1:7081 or :7081")
        return value

    @field_validator("log_level")
    @classmethod
    def _check_level(cls, value: str) -> str:
        if value.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return value.upper()

    @property
    def health_address(self) -> tuple[str, int]:
        """The parts of `health_listen`."""
        host, _, port = self.health_listen.rpartition(":")
        return host.strip("[]"), int(port)
