"""
Whether the cluster's CRDs are as new as this operator: Helm installs them once and upgrades none.

An older CRD would prune what a newer operator writes, and accept what it does not understand. A
newer one is no obstacle: CRDs are upgraded before the operator.
"""

import structlog

from blobcache_api import GROUP, REVISION_ANNOTATION, SCHEMA_REVISION
from blobcache_operator import errors
from blobcache_operator.kube import JSONObject, Kube

COLLECTION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
NAMES = (f"blobcacheconfigs.{GROUP}", f"blobcachenodes.{GROUP}")
# Helm owns the fields of what it installed, and yields them only by force.
UPGRADE_COMMAND = "kubectl apply --server-side -f crds/ --force-conflicts"
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

log = structlog.get_logger(__name__)


async def find_schema_problem(kube: Kube, *, wanted: int = SCHEMA_REVISION) -> str | None:
    """
    Return what is wrong with the installed CRDs and the command that mends it, None if nothing.

    Without the right to look, the CRDs are taken for good: an operator with roles made by hand
    must run, too.

    Args:
        kube: The API server.
        wanted: Least revision that will do.

    Raises:
        KubeError: The server did not answer.
    """
    for name in NAMES:
        try:
            found = await kube.get(f"{COLLECTION}/{name}", accept=_METADATA)
        except errors.NotFound:
            return f"The CRD '{name}' is not installed. Run: {UPGRADE_COMMAND}"
        except errors.Forbidden as error:
            log.warning("The CRDs' revision is not checked", error=str(error))
            return None
        revision = _revision_of(found)
        if revision < wanted:
            return (
                f"The CRD '{name}' is older than this operator (schema revision {revision}, "
                f"{wanted} is needed). Run, with the files of this version: {UPGRADE_COMMAND}"
            )
    return None


def _revision_of(crd: JSONObject) -> int:
    """Return a CRD's revision; one that says none is older than all that do."""
    annotations = crd["metadata"].get("annotations") or {}
    text = str(annotations.get(REVISION_ANNOTATION) or "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0
