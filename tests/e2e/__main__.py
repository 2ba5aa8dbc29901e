"""
`python -m tests.e2e`: a cluster with the project's images, for hands-on use, until Ctrl-C.

It says how to reach it and how to install the chart; logs are in the folder it names.
"""

import signal
import sys

from tests.e2e import images
from tests.e2e.local import LocalCluster, why_not_here
from tests.harness.binaries import locate


def main() -> int:
    """Run a cluster until told to stop."""
    if why := why_not_here(images.missing_packages()):
        print(f"cannot run here: {why}", file=sys.stderr)  # noqa: T201
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    built = images.build()
    cluster = LocalCluster(built.base.reference)
    try:
        with cluster:
            for image in (built.base, built.agent, built.operator):
                cluster.load_image(image.archive)
            print(_manual(cluster, built), flush=True)  # noqa: T201
            signal.pause()
    except KeyboardInterrupt:
        print("stopped; nothing is left", file=sys.stderr)  # noqa: T201
    return 0


def _manual(cluster: LocalCluster, built: images.Images) -> str:
    sets = " ".join(
        f"--set {part}.image.repository={image.name} --set {part}.image.tag={image.tag}"
        for part, image in (("agent", built.agent), ("operator", built.operator))
    )
    enter = "\n".join(
        f"  {' '.join(node.space.command('bash'))}   # {node.name}"
        for node in cluster.nodes.values()
    )
    return f"""\
export KUBECONFIG={cluster.kubeconfig}
{locate("kubectl")} create namespace blobcache-system
{locate("kubectl")} label namespace blobcache-system pod-security.kubernetes.io/enforce=privileged
{locate("helm")} install blobcache charts/blobcache -n blobcache-system {sets}
# A shell on a node; ctr -n k8s.io images list, ps ax, iptables -t nat -L:
{enter}
# Origins of yours that listen at {cluster.origin_address} are reached by pods, once the chart has
#   --set 'agent.allowOriginCIDRs={{{cluster.origin_address}/32}}'
# Logs: {cluster.folder}; Ctrl-C ends everything."""


if __name__ == "__main__":
    sys.exit(main())
