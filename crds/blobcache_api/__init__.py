"""The API of Blobcache: resources (`v1alpha1`) and the messages of operator and agent (`agent`).

What belongs here: pydantic models, what can be decided from their values alone (quantities,
digests, which credentials a Secret holds) and the generator of the CRDs. What does not: clients,
reconciling, files, the engine. Imports pydantic and PyYAML, nothing of Blobcache.
"""

GROUP = "blobcache.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

SCHEMA_REVISION = 1
"""Rises by one with each change of a CRD's schema, so that an operator knows an older one."""
REVISION_ANNOTATION = f"{GROUP}/schema-revision"
"""Where a CRD says its revision."""
