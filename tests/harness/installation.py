"""The operator and agents as processes over a real API server, each agent standing for a node."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness.controlplane import ControlPlane
from tests.harness.process import Child, environment, free_port, is_listening, poll_until

NAMESPACE = "blobcache-system"
AUDIENCE = "blobcache.dev"
START_TIMEOUT_SECONDS = 30.0
READ_TIMEOUT_SECONDS = 120.0
REPOSITORY_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Answer:
    """An agent's whole answer; `headers` have lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def cache_status(self) -> str:
        """What follows `blobcache; ` in Cache-Status: hit, fwd=miss; stored, …."""
        return self.headers.get("cache-status", "").removeprefix("blobcache; ")

    @property
    def code(self) -> str:
        """The reason in an error's JSON body."""
        return str(json.loads(self.body)["code"])


def ask(url: str, *, token: str | None = None, headers: dict[str, str] | None = None) -> Answer:
    """GET a URL on loopback, errors included in what is returned."""
    request = urllib.request.Request(url, headers=headers or {})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=READ_TIMEOUT_SECONDS) as answer:
            return Answer(answer.status, _lower(answer.headers.items()), answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, _lower(error.headers.items()), error.read())


@dataclass
class AgentProcess:
    """A `blobcache-agent serve` that stands for one node; its ports and cache outlive restarts."""

    node: str
    folder: Path
    tls_dir: Path
    extra: Sequence[str] = ()
    data_port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)
    control_port: int = field(default_factory=free_port)
    child: Child | None = None

    @property
    def control_url(self) -> str:
        """Where the operator reaches it."""
        return f"https://127.0.0.1:{self.control_port}"

    @property
    def log(self) -> Path:
        """Both output streams of all its lives."""
        return self.folder / "agent.log"

    @property
    def cache_root(self) -> Path:
        """What a hostPath volume is in a cluster."""
        return self.folder / "cache"

    def start(self) -> None:
        """Start it and wait until it listens (it is ready once a state was applied)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        loopback = [
            f"--listen=127.0.0.1:{self.data_port}",
            f"--health-listen=127.0.0.1:{self.health_port}",
            f"--control-listen=127.0.0.1:{self.control_port}",
        ]
        command = [
            sys.executable, "-m", "blobcache_agent", "serve", *loopback,
            f"--node-name={self.node}", f"--cache-root={self.cache_root}",
            f"--tls-dir={self.tls_dir}", *self.extra,
        ]  # fmt: skip
        self.child = Child(command, log=self.log, env=environment(), cwd=REPOSITORY_ROOT)
        self.child.wait_until(
            lambda: is_listening(self.control_port) and is_listening(self.data_port),
            timeout=START_TIMEOUT_SECONDS,
        )

    def stop(self) -> None:
        """End it with SIGTERM."""
        if self.child is not None:
            self.child.stop(timeout=30)
            self.child = None

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self.child is not None:
            self.child.kill()
            self.child = None

    def read(
        self, path: str, *, token: str | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """GET `/v1/blobs/{path}`."""
        url = f"http://127.0.0.1:{self.data_port}/v1/blobs/{path}"
        return ask(url, token=token, headers=headers)

    def metrics(self) -> dict[str, float]:
        """Return all samples by `name{labels}` as they stand in the exposition."""
        text = ask(f"http://127.0.0.1:{self.health_port}/metrics").body.decode()
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        return {name: float(value) for name, value in pairs}

    def is_ready(self) -> bool:
        """Ask /readyz."""
        try:
            return ask(f"http://127.0.0.1:{self.health_port}/readyz").status == 200
        except OSError:
            return False


class Installation:
    """
    What `helm install` makes, as processes: operators and one agent for each named node.

    Args:
        control_plane: A running one; CRDs, Nodes and namespaces are made in it.
        nodes: Names of Node objects to make (without kubelets) and start agents for.
        agent_arguments: More flags for every agent.
    """

    def __init__(
        self,
        control_plane: ControlPlane,
        nodes: Sequence[str],
        *,
        agent_arguments: Sequence[str] = (),
        namespace: str = NAMESPACE,
        folder: Path | None = None,
    ) -> None:
        self.control_plane = control_plane
        self.namespace = namespace
        self._owns_folder = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="blobcache-installation-"))
        self._tls_dir = self.folder / "agent-tls"
        self.agents = {
            node: AgentProcess(node, self.folder / node, self._tls_dir, agent_arguments)
            for node in nodes
        }
        self.operators: dict[str, Child] = {}

    def start(self) -> None:
        """Make the objects, start one operator, then the agents; return when all are ready."""
        try:
            self.apply_prerequisites()
            self.start_operator("operator-0")
            self.wait_for_certificates()
            for agent in self.agents.values():
                agent.start()
            self.wait_until_agents_are_ready()
        except BaseException:
            self.stop()
            raise

    def apply_prerequisites(self) -> None:
        """Make the CRDs, the operator's namespace and the Node objects."""
        kubectl = self.control_plane.kubectl
        kubectl("apply", "--server-side", "-f", str(REPOSITORY_ROOT / "crds"))
        kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd",
                "blobcacheconfigs.blobcache.dev", "blobcachenodes.blobcache.dev")  # fmt: skip
        names = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}]
        nodes = [node_object(node) for node in self.agents]
        kubectl("apply", "-f", "-", input=json.dumps(as_list([*names, *nodes])))

    def start_operator(self, name: str) -> Child:
        """Start an operator process and return it."""
        port = free_port()
        command = [
            sys.executable, "-m", "blobcache_operator", f"--namespace={self.namespace}",
            f"--kubeconfig={self.control_plane.admin_kubeconfig}",
            f"--write-agent-certs={self._tls_dir}", f"--health-listen=127.0.0.1:{port}",
            *[f"--agent={agent.node}={agent.control_url}" for agent in self.agents.values()],
        ]  # fmt: skip
        log = self.folder / f"{name}.log"
        child = Child(command, log=log, env=environment(POD_NAME=name), cwd=REPOSITORY_ROOT)
        self.operators[name] = child
        child.wait_until(lambda: is_listening(port), timeout=START_TIMEOUT_SECONDS)
        return child

    def wait_for_certificates(self) -> None:
        """Wait until the operator has written the agents' certificates."""
        files = [self._tls_dir / name for name in ("ca.crt", "tls.crt", "tls.key")]
        self._wait("the agents' certificates", lambda: all(file.exists() for file in files))

    def wait_until_agents_are_ready(self) -> None:
        """Wait until every agent has applied a state."""
        self._wait("ready agents", lambda: all(a.is_ready() for a in self.agents.values()))

    def stop(self) -> None:
        """Stop all processes; a temporary folder is removed."""
        for operator in self.operators.values():
            operator.stop()
        self.operators.clear()
        for agent in self.agents.values():
            agent.stop()
        if self._owns_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self) -> Iterable[Path]:
        """Return the log files of everything that ran."""
        return sorted(self.folder.rglob("*.log"))

    def get(self, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
        """Return one object of the API server."""
        where = ["-n", namespace] if namespace else []
        shown = self.control_plane.kubectl("get", kind, name, *where, "-o", "json").stdout
        found: dict[str, Any] = json.loads(shown)
        return found

    def condition(self, namespace: str, name: str, kind: str) -> dict[str, Any]:
        """Return one condition of a BlobCacheConfig, or {} before there is one."""
        status = self.get("bcc", name, namespace).get("status", {})
        return next((c for c in status.get("conditions", []) if c["type"] == kind), {})

    def wait_for_condition(
        self, namespace: str, name: str, kind: str, status: str = "True", reason: str | None = None
    ) -> dict[str, Any]:
        """Wait for a condition of the object's current generation and return it."""

        def is_met() -> bool:
            body = self.get("bcc", name, namespace)
            found = self.condition(namespace, name, kind)
            return (
                found.get("status") == status
                and found.get("observedGeneration") == body["metadata"]["generation"]
                and reason in (None, found.get("reason"))
            )

        self._wait(f"{kind}={status} of {namespace}/{name}", is_met, timeout=60)
        return self.condition(namespace, name, kind)

    def _wait(self, what: str, is_done: Any, *, timeout: float = START_TIMEOUT_SECONDS) -> None:
        if poll_until(is_done, timeout=timeout):
            return
        tails = "\n".join(f"--- {log}\n{_tail(log)}" for log in self.logs())
        raise TimeoutError(f"No {what} within {timeout:.0f} s\n{tails}")

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


def node_object(name: str) -> dict[str, Any]:
    """Return a Node without a kubelet."""
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def as_list(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return objects as one List, for `kubectl apply -f -`."""
    return {"apiVersion": "v1", "kind": "List", "items": list(items)}


def _lower(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers}


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
