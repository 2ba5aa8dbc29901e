"""A CRD's revision rises with its schema, or nobody could tell an older one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from blobcache_api import REVISION_ANNOTATION, SCHEMA_REVISION, crdgen

NAME = "blobcachenodes.blobcache.dev.yaml"


@pytest.mark.parametrize(
    ("change", "stale"),
    [("none", False), ("description", False), ("schema", True), ("both", False)],
)
def test_another_schema_needs_another_revision(change: str, stale: bool) -> None:
    """Words may change freely; what the API server enforces may not."""
    text = crdgen.generate()[NAME]
    crd = yaml.safe_load(text)
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    if change == "description":
        schema["description"] = "Other words."
    if change in ("schema", "both"):
        schema["properties"]["status"]["properties"].popitem()
    if change == "both":
        crd["metadata"]["annotations"][REVISION_ANNOTATION] = str(SCHEMA_REVISION - 1)
    assert crdgen.is_revision_stale(yaml.safe_dump(crd), text) is stale


def test_a_property_named_description_is_part_of_the_schema() -> None:
    """Only text counts as words."""
    text = crdgen.generate()[NAME]
    crd = yaml.safe_load(text)
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["description"] = {"type": "string"}
    assert crdgen.is_revision_stale(yaml.safe_dump(crd), text)


def test_generating_refuses_what_it_could_not_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file stays as it was, and the constant to raise is named."""
    monkeypatch.setattr(crdgen, "ROOT", tmp_path)
    monkeypatch.setattr(crdgen, "FOLDERS", (tmp_path / "crds",))
    assert crdgen.main([]) == 0
    path = tmp_path / "crds" / NAME
    crd = yaml.safe_load(path.read_text())
    crd["spec"]["scope"] = "Namespaced"
    path.write_text(yaml.safe_dump(crd))
    assert crdgen.main([]) == 1
    assert "raise SCHEMA_REVISION" in capsys.readouterr().out
    assert yaml.safe_load(path.read_text())["spec"]["scope"] == "Namespaced"
