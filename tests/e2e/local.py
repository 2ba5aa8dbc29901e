"""
A real cluster of two nodes on this machine: kubelets, containerds, kube-proxies, a control plane.

Each node is a `NodeSpace` with processes, network and files of its own, so two of them do not share
`/var/lib/blobcache`, and what they write can be compared. One runs Debian's containerd 1.6, the
other 2.2. The control plane and CoreDNS run on this machine itself, at an address of the bridge.
Needs root. Nothing outlives the process that made it, however that ends, but the folder with the
logs and, after a kill, empty cgroups.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from tests.harness import containerd, nodespace
from tests.harness.binaries import locate
from tests.harness.containerd import Containerd, Version
from tests.harness.controlplane import ControlPlane
from tests.harness.nodespace import NodeNetwork
from tests.harness.process import Child, poll_until

NODES: tuple[Version, ...] = ("1.6", "2.2")
"""The containerd of each node."""
READY_TIMEOUT_SECONDS = 120.0
HELM_TIMEOUT_SECONDS = 300.0
TOOLS = {
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ebtables": "ebtables",
    "socat": "socat",
}
"""Programs a node calls, and the Debian packages that have them."""
PROGRAMS = (
    *("etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler"),
    *("kube-proxy", "kubelet", "containerd", "containerd-shim-runc-v2", "ctr", "coredns", "helm"),
)
COMPARED_FOLDERS = {"etc": "changes/etc", "opt": "changes/opt", "var/lib": "var-lib"}
"""What an installation could leave on a node, as the node calls it, and where that lies."""

_KERNEL_SETTINGS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic")
_KERNEL_SETTINGS_MORE = ("kernel/panic_on_oops", "kernel/keys/root_maxkeys")
_NOT_OURS = ("var/lib/containerd", "var/lib/kubelet", "var/lib/cni", "etc/cni")


def missing_packages() -> list[str]:
    """Return the Debian packages that nodes need and that are absent."""
    tools = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    return sorted(tools | set(containerd.missing_packages()))


class LocalNode:
    """A kubelet, a containerd and a kube-proxy in a space of their own."""

    def __init__(
        self, name: str, version: Version, index: int, cluster: "LocalCluster", sandbox_image: str
    ) -> None:
        self.name = name
        self._cluster = cluster
        self._index = index
        self._folder = cluster.folder / name
        plane = cluster.control_plane
        self._kubeconfig = plane.kubeconfig_for(f"system:node:{name}", ["system:nodes"])
        self._proxy_kubeconfig = plane.kubeconfig_for("system:kube-proxy", [])
        self.containerd = Containerd(
            self._folder,
            version,
            cluster.network,
            index=index,
            name=f"{cluster.network.name}-{name}",
            sandbox_image=sandbox_image,
            shared=[plane.folder],
        )
        self.space = self.containerd.space
        self._kubelet: Child | None = None
        self._proxy: Child | None = None

    @property
    def address(self) -> str:
        """The node's address."""
        return self.containerd.address

    def start(self) -> None:
        """Start everything; the node gets ready by itself."""
        self.containerd.start()
        self.containerd.write("/etc/cni/net.d/10-bridge.conflist", self._cni())
        self.containerd.write(
            "/var/lib/kubelet/config.yaml", yaml.safe_dump(self._kubelet_config())
        )
        for other in range(1, len(NODES) + 1):
            if other != self._index:
                pods, by = self._cluster.network.pods_of(other), self._cluster.network.address_of
                self.space.run("ip", "route", "add", pods, "via", by(other))
        self.space.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.start_kubelet()
        self._proxy = self.space.spawn(
            locate("kube-proxy"),
            f"--kubeconfig={self._proxy_kubeconfig}",
            f"--hostname-override={self.name}",
            "--proxy-mode=iptables",
            "--conntrack-max-per-core=0",
            f"--cluster-cidr={self._cluster.network.range}",
            log=self._folder / "kube-proxy.log",
        )

    def start_kubelet(self) -> None:
        """Start the kubelet, which registers the node."""
        self._kubelet = self.space.spawn(
            locate("kubelet"),
            "--config=/var/lib/kubelet/config.yaml",
            f"--kubeconfig={self._kubeconfig}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
            log=self._folder / "kubelet.log",
        )

    def stop_kubelet(self) -> None:
        """Stop the kubelet; pods go on running."""
        if self._kubelet is not None:
            self._kubelet.stop()
            self._kubelet = None

    def stop(self) -> None:
        """End everything on the node."""
        self.stop_kubelet()
        if self._proxy is not None:
            self._proxy.stop()
        self.containerd.stop()

    def files(self) -> dict[str, str]:
        """Return what was written on the node, by path: a file's hash, or what else it is."""
        found = {}
        for inside, outside in COMPARED_FOLDERS.items():
            top = self._folder / outside
            for folder, folders, names in os.walk(top):
                relative = inside / Path(folder).relative_to(top)
                if str(relative) in _NOT_OURS:
                    folders.clear()
                    continue
                for name in names:
                    found[str(relative / name)] = _describe(Path(folder, name))
                found[f"{relative}/"] = "folder"
        return found

    def _cni(self) -> str:
        bridge = {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": self._cluster.network.pods_of(self._index)}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        plugins = [bridge, portmap]
        return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": plugins})

    def _kubelet_config(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            # Whom else: only this machine reaches its port.
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.space.cgroup,
            "clusterDNS": [self._cluster.network.host_address],
            "clusterDomain": "cluster.local",
            "containerRuntimeEndpoint": f"unix://{containerd.SOCKET}",
            "enforceNodeAllocatable": [],
            "evictionHard": {},
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "localStorageCapacityIsolation": False,
            "resolvConf": "",
            "nodeStatusUpdateFrequency": "5s",
        }


class LocalCluster:
    """
    A control plane and two nodes. A context manager.

    Args:
        sandbox_image: Image of pods' first container; the caller loads it.
        folder: Empty or absent: where everything is; by default a temporary one. `stop()` keeps it
            when `keeps_logs` was set.
    """

    def __init__(self, sandbox_image: str, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="blobcache-e2e-", dir="/var/tmp"))
        self._sandbox_image = sandbox_image
        self.network = NodeNetwork()
        self.nodes: dict[str, LocalNode] = {}
        self._children: list[Child] = []
        self._settings: dict[Path, str] = {}
        self.keeps_logs = False

    @property
    def kubeconfig(self) -> Path:
        """An administrator's."""
        return self.control_plane.admin_kubeconfig

    @property
    def origin_address(self) -> str:
        """Where origins of the test's process have to listen for pods to reach them."""
        return self.network.origin_address

    def start(self) -> None:
        """Start everything and wait until both nodes are ready."""
        try:
            self._settings = _kernel_settings()
            self.network.start()
            self._start_control_plane()
            for index, version in enumerate(NODES, 1):
                name = f"node-{index}"
                self.nodes[name] = LocalNode(name, version, index, self, self._sandbox_image)
                self.nodes[name].start()
            self.wait_for_nodes()
        except BaseException:
            self.keeps_logs = True
            self.stop()
            raise

    def stop(self) -> None:
        """End everything; the folder goes unless `keeps_logs`."""
        for node in self.nodes.values():
            node.stop()
        for child in reversed(self._children):
            child.stop()
        self._children.clear()
        if hasattr(self, "control_plane"):
            self.control_plane.stop()
        self.network.stop()
        for path, value in self._settings.items():
            path.write_text(value)
        if not self.keeps_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for_nodes(self) -> None:
        """Wait until the kubelets say that their nodes are ready."""
        wanted = set(self.nodes)

        def are_there() -> bool:
            return set(self.kubectl("get", "nodes", "-o", "name").split()) >= {
                f"node/{name}" for name in wanted
            }

        if not poll_until(are_there, timeout=READY_TIMEOUT_SECONDS):
            raise TimeoutError(f"not every node registered; logs are in {self.folder}")
        limit = f"--timeout={READY_TIMEOUT_SECONDS:.0f}s"
        self.kubectl("wait", "--for=condition=Ready", "node", "--all", limit, timeout=180)

    def load_image(self, archive: Path) -> None:
        """Give an image to every node."""
        for node in self.nodes.values():
            node.containerd.load_image(archive)

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        """Run kubectl as administrator and return what it wrote."""
        return self.control_plane.kubectl(*arguments, input=stdin, timeout=timeout).stdout

    def helm(self, *arguments: str) -> str:
        """Run helm as administrator and return what it wrote."""
        done = subprocess.run(
            [locate("helm"), f"--kubeconfig={self.kubeconfig}", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=HELM_TIMEOUT_SECONDS,
            env={"PATH": os.defpath, "HOME": str(self.folder)},
        )
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def write_logs(self) -> Path:
        """Write what the API server knows beside the components' logs; return their folder."""
        kinds = "nodes,pods,events,daemonsets,deployments,blobcacheconfigs,blobcachenodes"
        for file, arguments in {
            "objects.yaml": ["get", kinds, "-A", "-o", "yaml"],
            "objects.txt": ["get", kinds, "-A", "-o", "wide"],
        }.items():
            done = self.control_plane.kubectl(*arguments, check=False)
            (self.folder / file).write_text(done.stdout + done.stderr)
        self.keeps_logs = True
        return self.folder

    def _start_control_plane(self) -> None:
        folder = self.folder / "control-plane"
        folder.mkdir(parents=True, exist_ok=True)
        self.control_plane = ControlPlane(
            folder,
            address=self.network.host_address,
            service_range=self.network.services,
            apiserver_flags=[
                "--endpoint-reconciler-type=lease",
                f"--advertise-address={self.network.host_address}",
                "--kubelet-preferred-address-types=InternalIP",
            ],
        )
        plane = self.control_plane
        plane.start()
        self._run(
            "kube-controller-manager",
            f"--kubeconfig={plane.admin_kubeconfig}",
            "--leader-elect=false",
            "--secure-port=0",
            f"--root-ca-file={plane.ca_file}",
            f"--service-account-private-key-file={folder / 'service-accounts.key'}",
            "--node-monitor-grace-period=20s",
        )
        self._run(
            "kube-scheduler",
            f"--kubeconfig={plane.admin_kubeconfig}",
            "--leader-elect=false",
            "--secure-port=0",
        )
        self._start_dns(folder)
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "kube-proxy"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "system:node-proxier",
            },
            "subjects": [{"kind": "User", "name": "system:kube-proxy"}],
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(binding))

    def _start_dns(self, folder: Path) -> None:
        """Serve the cluster's names at port 53 of this machine's address on the bridge."""
        lines = [
            f"bind {self.network.host_address}",
            "errors",
            f"kubernetes cluster.local {{\n    kubeconfig {self.kubeconfig}\n  }}",
        ]
        corefile = folder / "Corefile"
        corefile.write_text(".:53 {\n  " + "\n  ".join(lines) + "\n}\n")
        self._run("coredns", "-conf", str(corefile))

    def _run(self, program: str, *flags: str) -> None:
        log = self.folder / "control-plane" / f"{program}.log"
        self._children.append(Child([locate(program), *flags], log=log))

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


def why_not_here(names: Sequence[str] = ()) -> str:
    """Return why this machine cannot have such a cluster; empty when it can."""
    if why := nodespace.why_not_here():
        return why
    if packages := [*missing_packages(), *names]:
        return f"please run: apt-get install {' '.join(packages)}"
    return ""


def _kernel_settings() -> dict[Path, str]:
    """Return what a kubelet sets for the whole machine."""
    paths = [Path("/proc/sys", name) for name in _KERNEL_SETTINGS + _KERNEL_SETTINGS_MORE]
    return {path: path.read_text() for path in paths if path.exists()}


def _describe(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if not path.is_file():
        return "removed or special"
    return hashlib.sha256(path.read_bytes()).hexdigest()
