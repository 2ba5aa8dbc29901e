"""Generate the CRDs from the models.

`python -m blobcache_api.crdgen` writes `crds/*.yaml` and the chart's copies; `--check` writes
nothing and fails when one of them differs from what it would write. Each CRD says the revision of
its schema, by which the operator refuses an older one: a schema that differs from the file's at the
same revision is not written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from blobcache_api import GROUP, REVISION_ANNOTATION, SCHEMA_REVISION, VERSION
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec, BlobCacheConfigStatus
from blobcache_api.v1alpha1.node import BlobCacheNodeStatus

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "crds", ROOT / "charts" / "blobcache" / "crds")
HEADER = "# Generated from the models by `python -m blobcache_api.crdgen`; do not edit.\n"

_DOUBLE_EXACT_MAX = 2**53
"""Numbers in a CRD's limits are doubles; larger limits are left to `format`."""
_KEPT = frozenset(
    {
        "default",
        "description",
        "enum",
        "format",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        "pattern",
        "required",
        "type",
    }
)
_NAME_RULE = {
    "rule": "size(self.metadata.name) <= 63",
    "message": "`metadata.name` must be at most 63 characters",
}


def generate() -> dict[str, str]:
    """Return the text of each CRD by its file's name."""
    return {f"{crd['metadata']['name']}.yaml": _dump(crd) for crd in (_config_crd(), _node_crd())}


def structural_schema(model: type[BaseModel]) -> dict[str, Any]:
    """
    Return a model's schema in the form the API server takes.

    References are inlined, `null` alternatives dropped, and what a structural schema refuses
    (titles, closed objects, constants) is left out or rewritten.
    """
    schema = model.model_json_schema(by_alias=True)
    return _transform(schema, schema.get("$defs", {}))


def _transform(schema: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    merged = _resolve(schema, known)
    result = {
        key: value
        for key, value in merged.items()
        if key in _KEPT or key.startswith("x-kubernetes-")
    }
    if result.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    if "const" in merged:
        result["enum"] = [merged["const"]]
    if "description" in result:
        result["description"] = " ".join(result["description"].split())
    if result.get("type") == "integer":
        _bound_integer(result)
    if result.get("default", ...) in (None, []) or (
        result.get("default") == {} and "properties" not in merged
    ):
        del result["default"]
    if "items" in merged:
        result["items"] = _transform(merged["items"], known)
        result.setdefault("x-kubernetes-list-type", "atomic")
    if "properties" in merged:
        result["properties"] = {
            name: _transform(part, known) for name, part in merged["properties"].items()
        }
    elif isinstance(merged.get("additionalProperties"), dict):
        result["additionalProperties"] = _transform(merged["additionalProperties"], known)
    return result


def _resolve(schema: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with its reference and its one real alternative merged in."""
    merged = dict(schema)
    alternatives = [part for part in merged.pop("anyOf", []) if part.get("type") != "null"]
    if len(alternatives) > 1:
        raise ValueError(f"a field has several types, which a CRD cannot say: {alternatives}")
    reference = merged.pop("$ref", None)
    parts = [*alternatives, *([known[reference.rpartition("/")[2]]] if reference else [])]
    for part in parts:
        inner = _resolve(part, known)
        rules = "x-kubernetes-validations"
        joined = [*inner.get(rules, []), *merged.get(rules, [])]
        merged = {**inner, **merged, **({rules: joined} if joined else {})}
    return merged


def _bound_integer(schema: dict[str, Any]) -> None:
    schema["format"] = "int64"
    if schema.get("maximum", 0) > _DOUBLE_EXACT_MAX:
        del schema["maximum"]


def _root(
    description: str, sections: Mapping[str, type[BaseModel]], required: Sequence[str]
) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "apiVersion": {"type": "string", "description": "Version of this object's form."},
        "kind": {"type": "string", "description": "Kind of this object."},
        "metadata": {"type": "object"},
    }
    properties |= {name: structural_schema(model) for name, model in sections.items()}
    schema: dict[str, Any] = {
        "type": "object",
        "description": description,
        "properties": properties,
    }
    return {**schema, "required": list(required)} if required else schema


def _config_crd() -> dict[str, Any]:
    root = _root(
        "A set of blobs at one origin, and how the nodes of the cluster cache them.",
        {"spec": BlobCacheConfigSpec, "status": BlobCacheConfigStatus},
        ["spec"],
    )
    root["x-kubernetes-validations"] = [_NAME_RULE]
    ready = ".status.conditions[?(@.type=='Ready')]"
    columns = [
        _column("Backend", "string", ".spec.backend.type", "Kind of origin."),
        _column("Nodes", "string", ".status.nodes.summary", "Nodes ready and selected."),
        _column("Cached", "string", ".status.usage.cached", "Bytes on all nodes' disks."),
        _column("Hit %", "integer", ".status.traffic.hitRatioPercent", "Bytes not fetched."),
        _column("Warm %", "integer", ".status.prefetch.percent", "Prefetch list that is there."),
        _column("Ready", "string", f"{ready}.status", "Applied on every available node."),
        _column("Reason", "string", f"{ready}.reason", "Why it is ready or not.", priority=1),
        _column("Message", "string", f"{ready}.message", "The same, and the remedy.", priority=1),
        _column("Age", "date", ".metadata.creationTimestamp", "Time since it was created."),
    ]
    selectable = [{"jsonPath": ".spec.backend.type"}]
    return _crd("BlobCacheConfig", "bcc", "Namespaced", root, columns, selectable)


def _node_crd() -> dict[str, Any]:
    root = _root(
        "What one node's agent caches; named after its Node and written by the operator.",
        {"status": BlobCacheNodeStatus},
        [],
    )
    conditions = ".status.conditions[?(@.type=='{}')]"
    ready, pressure = conditions.format("Ready"), conditions.format("DiskPressure")
    columns = [
        _column("Agent", "string", ".status.agentVersion", "Version of the agent."),
        _column("Cached", "string", ".status.disk.cached", "Bytes on this node's disk."),
        _column("Pressure", "string", f"{pressure}.status", "Whether free space is short."),
        _column("Ready", "string", f"{ready}.status", "Whether the agent answers and serves."),
        _column("Reason", "string", f"{ready}.reason", "Why it is ready or not.", priority=1),
        _column("Message", "string", f"{ready}.message", "The same, and the remedy.", priority=1),
        _column("Age", "date", ".metadata.creationTimestamp", "Time since it was created."),
    ]
    return _crd("BlobCacheNode", "bcn", "Cluster", root, columns, [])


def _column(name: str, kind: str, path: str, description: str, priority: int = 0) -> dict[str, Any]:
    column: dict[str, Any] = {
        "name": name,
        "type": kind,
        "jsonPath": path,
        "description": description,
    }
    return {**column, "priority": priority} if priority else column


def _crd(
    kind: str,
    short_name: str,
    scope: str,
    root: dict[str, Any],
    columns: list[dict[str, Any]],
    selectable: list[dict[str, str]],
) -> dict[str, Any]:
    singular = kind.lower()
    plural = f"{singular}s"
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        **({"selectableFields": selectable} if selectable else {}),
        "schema": {"openAPIV3Schema": root},
    }
    names = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": singular,
        "shortNames": [short_name],
        "categories": ["blobcache"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{GROUP}",
            "labels": {"app.kubernetes.io/name": "blobcache", "app.kubernetes.io/part-of": GROUP},
            "annotations": {REVISION_ANNOTATION: str(SCHEMA_REVISION)},
        },
        "spec": {"group": GROUP, "scope": scope, "names": names, "versions": [version]},
    }


def is_revision_stale(known: str, text: str) -> bool:
    """
    Say whether a new CRD has another schema than the one before at the same revision.

    What is only for people (descriptions, columns) may change without a new revision: the operator
    does not depend on it. A file without a revision is older than all.
    """
    before, after = yaml.safe_load(known) or {}, yaml.safe_load(text)
    revision = ((before.get("metadata") or {}).get("annotations") or {}).get(REVISION_ANNOTATION)
    if revision != after["metadata"]["annotations"][REVISION_ANNOTATION]:
        return False
    return bool(_substance(before["spec"]) != _substance(after["spec"]))


def _substance(value: Any) -> Any:
    """Return a CRD's spec without what is only for people."""
    if isinstance(value, dict):
        for_people = value.get("description")
        return {
            key: _substance(part)
            for key, part in value.items()
            if not (key == "description" and isinstance(for_people, str))
            and key != "additionalPrinterColumns"
        }
    return [_substance(part) for part in value] if isinstance(value, list) else value


class _Dumper(yaml.SafeDumper):
    """Writes equal parts again instead of pointing at them: kubectl refuses no alias, people do."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a value is written out each time: always."""
        return True


def _dump(crd: Mapping[str, Any]) -> str:
    return HEADER + yaml.dump(crd, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or with `--check` name those that differ; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m blobcache_api.crdgen", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    is_check = parser.parse_args(arguments).check
    differing = []
    for name, text in generate().items():
        for folder in FOLDERS:
            path = folder / name
            known = path.read_text() if path.exists() else ""
            if known == text:
                continue
            differing.append(path)
            if not is_check:
                if is_revision_stale(known, text):
                    sys.stdout.write(
                        f"{path.relative_to(ROOT)} would have another schema of the same revision: "
                        "raise SCHEMA_REVISION in blobcache_api/__init__.py\n"
                    )
                    return 1
                folder.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    for path in differing:
        told = "differs from the models; run python -m blobcache_api.crdgen" if is_check else ""
        sys.stdout.write(f"{path.relative_to(ROOT)} {told}\n")
    return 1 if is_check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
