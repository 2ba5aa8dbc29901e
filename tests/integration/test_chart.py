"""The Helm chart: what it renders, what an API server makes of it, and what its schema refuses."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.harness.binaries import locate
from tests.harness.controlplane import ControlPlane

from blobcache_agent.cli import serve
from blobcache_operator.settings import ENV_PREFIX, OperatorSettings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "blobcache"
KUBERNETES = "1.34.3"

FULL: dict[str, Any] = {
    "imagePullSecrets": ["pull"],
    "commonLabels": {"team": "storage"},
    "secretNamespaces": ["team-a", "team-b"],
    "operator": {
        "image": {"digest": "sha256:" + "0a" * 32},
        "replicas": 2,
        "serviceAccount": {"annotations": {"a": "b"}},
        "limits": {"capacityMax": "500Gi", "protectedPercentMax": 0, "originRateMax": 104857600},
        "podAnnotations": {"a": "b"},
        "podLabels": {"a": "b"},
        "tolerations": [{"operator": "Exists"}],
        "extraEnv": {"BLOBCACHE_OPERATOR_RESYNC_SECONDS": 30},
    },
    "agent": {
        "cache": {"hostPath": "/data/blobcache", "capacity": "200Gi", "minFree": "25%"},
        "allowOriginCIDRs": ["10.20.0.0/16", "fd00::/8"],
        "localFSRoots": {"team-a": ["/srv/a", "/srv/shared"], "*": ["/srv/shared"]},
        "ambientCredentialsNamespaces": ["team-a"],
        "insecureTLSNamespaces": ["*"],
        "podAnnotations": {"a": "b"},
        "podLabels": {"a": "b"},
        "nodeSelector": {"disk": "nvme"},
        "affinity": {"nodeAffinity": {}},
        "maxUnavailable": 1,
        "extraEnv": {"BLOBCACHE_AGENT_LOG_FORMAT": "json"},
    },
}
EVERYWHERE: dict[str, Any] = {"secretNamespaces": ["*"], "agent": {"hostPort": {"enabled": False}}}
BARE: dict[str, Any] = {
    "rbac": {"create": False},
    "operator": {"serviceAccount": {"create": False, "name": "mine"}},
    "agent": {"serviceAccount": {"create": False}, "tolerations": [], "resources": {}},
}
MIRROR: dict[str, Any] = {
    "containerdMirror": {
        "enabled": True,
        "configs": [
            {"host": "ghcr.io", "namespace": "mirror", "name": "ghcr"},
            {
                "host": "docker.io",
                "registry": "registry-1.docker.io",
                "server": "https://registry-1.docker.io",
                "namespace": "mirror",
                "name": "hub",
            },
        ],
    },
    "cleanup": {"cache": True, "timeoutSeconds": 30},
}
PEER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "team-a"}}}
GUARDED: dict[str, Any] = {
    "selfTest": {"enabled": False},
    "networkPolicy": {"enabled": True, "readers": [PEER], "monitoring": [PEER]},
    "operator": {"replicas": 3, "priorityClassName": ""},
    "monitoring": {"dashboard": {"enabled": True, "annotations": {"folder": "storage"}}},
}
WATCHED: dict[str, Any] = {
    "networkPolicy": {"enabled": True},
    "monitoring": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "serviceMonitor": {"enabled": True, "metricRelabelings": [{"action": "labeldrop"}]},
        "prometheusRule": {
            "enabled": True,
            "ruleLabels": {"severity": "page"},
            "runbookURL": "https://runbooks.example.com/blobcache",
        },
        "dashboard": {"enabled": True},
    },
}
VALUE_SETS = {
    "default": {},
    "full": FULL,
    "everywhere": EVERYWHERE,
    "bare": BARE,
    "mirror": MIRROR,
    "guarded": GUARDED,
    "watched": WATCHED,
}

pytestmark = [pytest.mark.helm, pytest.mark.xdist_group("chart")]


def _helm(
    *arguments: str,
    values: dict[str, Any] | None = None,
    check: bool = True,
    home: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run helm with nothing of the user's; values go in by standard input."""
    command = [str(locate("helm")), *arguments, *(["--values", "-"] if values else [])]
    done = subprocess.run(
        command,
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": os.defpath, "HOME": str(home or "/nonexistent")},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def _render(
    values: dict[str, Any] | None = None,
    *,
    namespace: str = "blobcache-system",
    version: str = KUBERNETES,
    hooks: bool = True,
) -> str:
    flags = ["-n", namespace, "--kube-version", version, *([] if hooks else ["--no-hooks"])]
    return _helm("template", "blobcache", str(CHART), *flags, values=values).stdout


def _objects(rendered: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = [body for body in yaml.safe_load_all(rendered) if body]
    return {(body["kind"], body["metadata"]["name"]): body for body in found}


def _pod(kind: str, name: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    pod: dict[str, Any] = _objects(_render(values))[kind, name]["spec"]["template"]
    return pod


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_lint_is_clean(values: dict[str, Any]) -> None:
    """`helm lint --strict` finds nothing to warn of, whatever the values."""
    told = _helm("lint", "--strict", str(CHART), values=values).stdout
    assert "0 chart(s) failed" in told
    assert "[WARNING]" not in told
    assert "[ERROR]" not in told


def test_every_template_renders() -> None:
    """No template is dead: each makes an object with some of the values."""
    rendered = "".join(_render(values) for values in VALUE_SETS.values())
    for template in (CHART / "templates").rglob("*.yaml"):
        name = template.relative_to(CHART / "templates")
        assert f"# Source: blobcache/templates/{name}\n" in rendered


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"agent": {"cache": {"capcity": "1Gi"}}}, "capcity"),
        ({"operators": {}}, "operators"),
        ({"operator": {"replicas": "2"}}, "replicas"),
        ({"agent": {"cache": {"capacity": "50 GB"}}}, "capacity"),
        ({"agent": {"cache": {"minFree": "200%"}}}, "minFree"),
        ({"agent": {"allowOriginCIDRs": ["10.0.0.1"]}}, "allowOriginCIDRs"),
        ({"agent": {"localFSRoots": {"team-a": ["srv"]}}}, "localFSRoots"),
        ({"secretNamespaces": ["Team"]}, "secretNamespaces"),
        ({"agent": {"image": {"digest": "latest"}}}, "digest"),
        ({"agent": {"cache": {"hostPath": "/"}}}, "hostPath"),
        ({"agent": {"resources": {"limit": {}}}}, "limit"),
        ({"agent": {"tolerations": [{"operater": "Exists"}]}}, "operater"),
        ({"operator": {"affinity": {"nodeAfinity": {}}}}, "nodeAfinity"),
        ({"containerdMirror": {"configs": [{"host": "a.io", "namespace": "b"}]}}, "name"),
        ({"containerdMirror": {"dialTimeout": "30s"}}, "dialTimeout"),
        ({"monitoring": {"podMonitor": {"enable": True}}}, "enable"),
        ({"networkPolicy": {"readers": [{"podselector": {}}]}}, "podselector"),
        ({"cleanup": {"cashe": True}}, "cashe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schema_refuses(values: dict[str, Any], field: str) -> None:
    """A misspelt or malformed value is an error that names it, not a silent default."""
    refused = _helm("template", "b", str(CHART), values=values, check=False)
    assert refused.returncode != 0
    assert field in refused.stderr


def test_every_value_is_explained() -> None:
    """Each value stands in the schema, so none can be set without being checked."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(known: dict[str, Any], given: dict[str, Any], path: str) -> None:
        assert known["additionalProperties"] is False, path
        assert set(given) == set(known["properties"]) - {"global"}, path
        for name, part in known["properties"].items():
            if "properties" in part and name not in ("resources", "affinity"):
                compare(part, given[name], f"{path}.{name}")

    compare(schema, values, "")


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_agent_flags_are_the_agents(values: dict[str, Any]) -> None:
    """What the chart passes is what `blobcache-agent serve` takes."""
    container = _pod("DaemonSet", "blobcache-agent", values)["spec"]["containers"][0]
    assert container["command"] == ["blobcache-agent"]
    command, *flags = container["args"]
    assert command == "serve"
    from_field = ["--node-name=node-1", "--pod-uid=u"]
    context = serve.make_context("serve", [*flags, *from_field])
    assert context.params["cache_root"] == Path("/var/lib/blobcache")
    own = ("blobcache-system", "/usr/share/blobcache/selftest")
    assert (own in context.params["allow_localfs"]) == (values is not GUARDED)
    assert (context.params["min_free"] is None) == (values is not FULL)
    variables = {entry["name"] for entry in container["env"]}
    known = {parameter.envvar for parameter in serve.params if hasattr(parameter, "envvar")}
    assert variables <= known


def test_operator_variables_are_the_operators() -> None:
    """Each variable of the operator's pod is a setting of the operator."""
    container = _pod("Deployment", "blobcache-operator", FULL)["spec"]["containers"][0]
    fields = {
        entry["name"].removeprefix(ENV_PREFIX).lower(): entry["value"] for entry in container["env"]
    }
    assert set(fields) <= set(OperatorSettings.model_fields)
    settings = OperatorSettings.model_validate(fields)
    assert settings.capacity_max == 500 * 2**30
    assert settings.origin_rate_max == 104857600
    assert settings.protected_percent_max == 0
    assert settings.resync_seconds == 30
    assert container["args"] == ["--namespace=blobcache-system"]


def test_agent_pod_is_confined() -> None:
    """Root without capabilities, without a token, on a read-only root."""
    pod = _pod("DaemonSet", "blobcache-agent")["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert not any("projected" in volume for volume in pod["volumes"])
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["volumes"][0]["hostPath"]["type"] == "DirectoryOrCreate"
    assert pod["priorityClassName"] == "system-node-critical"
    assert {"operator": "Exists"} in pod["tolerations"]
    ports = {port["name"]: port for port in container["ports"]}
    assert ports["data"]["hostPort"] == 7080
    assert ports["data"]["hostIP"] == "127.0.0.1"
    assert "hostPort" not in ports["control"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "health"


def test_local_directories_are_mounted_once_and_read_only() -> None:
    """A directory that two namespaces may read is one read-only volume."""
    container = _pod("DaemonSet", "blobcache-agent", FULL)["spec"]["containers"][0]
    mounts = {m["mountPath"]: m for m in container["volumeMounts"] if "localfs-" in m["name"]}
    assert set(mounts) == {"/srv/a", "/srv/shared"}
    assert all(mount["readOnly"] for mount in mounts.values())
    assert "--allow-localfs=*=/srv/shared" in container["args"]


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("1.30.0", None),
        ("1.31.5", "PreferClose"),
        ("1.33.9", "PreferClose"),
        ("1.34.3", "PreferSameNode"),
        ("1.36.0", "PreferSameNode"),
    ],
)
def test_traffic_stays_near(version: str, wanted: str | None) -> None:
    """Readers go to their own node's agent in the words their cluster knows."""
    service = _objects(_render(version=version))["Service", "blobcache-agent"]["spec"]
    assert service.get("trafficDistribution") == wanted
    assert "internalTrafficPolicy" not in service


def test_old_clusters_are_refused() -> None:
    """A cluster that cannot check the CRDs' rules is told so."""
    flags = ["--kube-version", "1.29.0"]
    refused = _helm("template", "b", str(CHART), *flags, check=False)
    assert "Blobcache needs Kubernetes 1.30 or later" in refused.stderr


def test_selectors_find_their_pods_only() -> None:
    """Each selector matches the pods of its own component and no others."""
    objects = _objects(_render(FULL))
    pods = {
        "agent": objects["DaemonSet", "blobcache-agent"]["spec"]["template"]["metadata"]["labels"],
        "operator": objects["Deployment", "blobcache-operator"]["spec"]["template"]["metadata"][
            "labels"
        ],
    }
    for kind, name in (("Service", "blobcache-agent"), ("Service", "blobcache-agents")):
        selector = objects[kind, name]["spec"]["selector"]
        assert selector.items() <= pods["agent"].items()
        assert not selector.items() <= pods["operator"].items()
    assert objects["Service", "blobcache-agents"]["spec"]["publishNotReadyAddresses"] is True
    assert objects["Service", "blobcache-agents"]["spec"]["clusterIP"] == "None"
    for body in objects.values():
        assert body["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        assert body["metadata"]["labels"]["team"] == "storage"


def test_chart_brings_the_crds() -> None:
    """The chart's copies are the generated files."""
    for path in (ROOT / "crds").glob("*.yaml"):
        assert (CHART / "crds" / path.name).read_bytes() == path.read_bytes()


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    """A namespace of the test's own."""
    name = f"chart-{secrets.token_hex(4)}"
    control_plane.kubectl("create", "namespace", name)
    return name


@pytest.mark.parametrize("values", VALUE_SETS.values(), ids=VALUE_SETS.keys())
def test_api_server_takes_it(
    control_plane: ControlPlane, namespace: str, values: dict[str, Any]
) -> None:
    """Every object passes a real API server's validation, without a warning."""
    for name in values.get("secretNamespaces", []):
        if name != "*":
            control_plane.kubectl("create", "namespace", name, check=False)
    control_plane.kubectl("apply", "--server-side", "-f", str(CHART / "crds"))
    # Made by a controller that does not run here.
    control_plane.kubectl("-n", namespace, "create", "serviceaccount", "default")
    bodies = [body for body in yaml.safe_load_all(_render(values, namespace=namespace)) if body]
    known = [body for body in bodies if "coreos.com" not in body["apiVersion"]]
    for body in known:
        if body["kind"] == "Pod":  # system-* priority classes come from such a controller, too
            body["spec"].pop("priorityClassName", None)
    rendered = json.dumps({"apiVersion": "v1", "kind": "List", "items": known})
    flags = ["--dry-run=server", "--validate=strict", "-f", "-"]
    done = control_plane.kubectl("apply", *flags, input=rendered)
    assert "Warning" not in done.stderr


def test_install_and_uninstall(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> None:
    """`helm install` works on an empty cluster, tells what to do next, and leaves only CRDs."""
    access = ["-n", namespace, "--kubeconfig", str(control_plane.admin_kubeconfig)]
    told = _helm("install", "blobcache", str(CHART), *access, home=tmp_path).stdout
    label = f"kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=privileged"
    assert label in told
    assert "kubectl explain blobcacheconfig.spec" in told
    try:
        _assert_rights(control_plane, namespace)
        _assert_pod_security(control_plane, namespace)
    finally:
        # The hook's Job has no kubelet here; what it does has tests of its own.
        _helm("uninstall", "blobcache", "--no-hooks", *access, home=tmp_path)
    assert control_plane.kubectl("get", "crd", "blobcacheconfigs.blobcache.dev").returncode == 0
    left = control_plane.kubectl("get", "clusterrole", "-o", "name").stdout
    assert "blobcache" not in left


def _can(plane: ControlPlane, namespace: str, account: str, *what: str) -> bool:
    user = f"system:serviceaccount:{namespace}:{account}"
    group = "--as-group=system:serviceaccounts"
    answer = plane.kubectl("auth", "can-i", f"--as={user}", group, *what, check=False)
    return answer.stdout.strip() == "yes"


def _assert_rights(plane: ControlPlane, namespace: str) -> None:
    """The operator may do what it does and nothing more; the agent nothing."""
    own = ["-n", namespace]
    status = ["--subresource=status", "-A"]
    for allowed in (
        ["list", "blobcacheconfigs", "-A"],
        ["patch", "blobcacheconfigs", *status],
        ["create", "blobcachenodes", "-A"],
        ["patch", "blobcachenodes", *status],
        ["watch", "nodes", "-A"],
        ["create", "events.events.k8s.io", "-n", "default"],
        ["update", "secrets/blobcache-ca", *own],
        ["update", "leases/blobcache-operator", *own],
        ["list", "endpointslices", *own],
        ["list", "endpointslices", "-n", "default"],
        ["get", "deployments/blobcache-operator", *own],
        ["get", "/openid/v1/jwks"],
    ):
        assert _can(plane, namespace, "blobcache-operator", *allowed), allowed
    for denied in (
        ["update", "blobcacheconfigs", "-A"],
        ["patch", "blobcacheconfigs", "-A"],
        ["delete", "blobcacheconfigs", "-A"],
        ["get", "secrets", "-n", "default"],
        ["get", "secrets", *own],
        ["list", "secrets", *own],
        ["delete", "secrets/blobcache-ca", *own],
        ["update", "leases/another", *own],
        ["patch", "nodes", "-A"],
        ["patch", "events.events.k8s.io", "-n", "default"],
        ["list", "pods", *own],
    ):
        assert not _can(plane, namespace, "blobcache-operator", *denied), denied
    assert not _can(plane, namespace, "blobcache-agent", "get", "blobcacheconfigs", "-A")


def _assert_pod_security(plane: ControlPlane, namespace: str) -> None:
    """The operator's pod passes Restricted; the agent's passes Privileged only."""
    operator = _pod("Deployment", "blobcache-operator")
    agent = _pod("DaemonSet", "blobcache-agent")
    # system-* priority classes come from a controller that does not run here.
    for pod in (operator, agent):
        del pod["spec"]["priorityClassName"]
    assert _admit(plane, namespace, "restricted", operator) == ""
    assert "hostPath" in _admit(plane, namespace, "baseline", agent)
    assert _admit(plane, namespace, "privileged", agent) == ""


def _admit(plane: ControlPlane, namespace: str, level: str, template: dict[str, Any]) -> str:
    label = f"pod-security.kubernetes.io/enforce={level}"
    plane.kubectl("label", "namespace", namespace, label, "--overwrite")
    metadata = {**template["metadata"], "name": "pod", "namespace": namespace}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    flags = ["--dry-run=server", "-f", "-"]
    return plane.kubectl("create", *flags, input=json.dumps(pod), check=False).stderr


@pytest.mark.parametrize("everywhere", [False, True])
def test_secret_rights(control_plane: ControlPlane, namespace: str, everywhere: bool) -> None:
    """Secrets can be read by name in the named namespaces only, or everywhere."""
    named = f"{namespace}-secrets"
    control_plane.kubectl("create", "namespace", named)
    values = {"secretNamespaces": ["*" if everywhere else named]}
    rendered = _render(values, namespace=namespace, hooks=False)
    control_plane.kubectl("apply", "-f", "-", input=rendered)
    try:
        account = "blobcache-operator"
        assert _can(control_plane, namespace, account, "get", "secrets/any", "-n", named)
        assert not _can(control_plane, namespace, account, "list", "secrets", "-n", named)
        other = _can(control_plane, namespace, account, "get", "secrets/any", "-n", "default")
        assert other == everywhere
    finally:
        control_plane.kubectl("delete", "-f", "-", input=rendered)
