"""The generated CRDs: up to date, and everything in them is bounded and explained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel

from blobcache_api import crdgen
from blobcache_api.agent import DesiredState, Report


def _walk(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, part in schema.get("properties", {}).items():
        yield from _walk(part, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _walk(schema[key], f"{path}[]")


def _schemas() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name, text in crdgen.generate().items():
        root = yaml.safe_load(text)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for section in ("spec", "status"):
            if section in root["properties"]:
                found += _walk(root["properties"][section], f"{name.split('.')[0]}.{section}")
    return found


def test_committed_files_are_generated(capsys: pytest.CaptureFixture[str]) -> None:
    """The files in the tree, and the chart's copies, are what the models say."""
    assert crdgen.main(["--check"]) == 0, capsys.readouterr().out


def test_check_names_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed or missing file fails the check by name, and generating mends it."""
    monkeypatch.setattr(crdgen, "ROOT", tmp_path)
    monkeypatch.setattr(crdgen, "FOLDERS", (tmp_path / "crds",))
    assert crdgen.main([]) == 0
    assert crdgen.main(["--check"]) == 0
    (tmp_path / "crds" / "blobcachenodes.blobcache.dev.yaml").write_text("")
    assert crdgen.main(["--check"]) == 1
    assert "crds/blobcachenodes.blobcache.dev.yaml differs" in capsys.readouterr().out
    assert crdgen.main([]) == 0
    assert crdgen.main(["--check"]) == 0


def test_everything_is_bounded() -> None:
    """No string, list, map or number in a CRD is without a limit."""
    for path, schema in _schemas():
        kind = schema.get("type")
        if kind == "string" and "enum" not in schema and schema.get("format") != "date-time":
            assert "maxLength" in schema, path
        if kind == "array":
            assert "maxItems" in schema, path
            assert "x-kubernetes-list-type" in schema, path
        if "additionalProperties" in schema:
            assert "maxProperties" in schema, path
        if kind == "integer":
            assert "minimum" in schema, path
            assert schema["format"] == "int64", path
        assert kind or schema.get("x-kubernetes-int-or-string"), path


def test_everything_is_explained() -> None:
    """Each field has a sentence for `kubectl explain`."""
    for path, schema in _schemas():
        assert path.endswith("[]") or schema.get("description"), path


def test_structural_schemas_only() -> None:
    """Nothing is left that an API server refuses."""
    refused = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "title", "const", "discriminator"}
    for path, schema in _schemas():
        assert not refused & set(schema), path
        assert "properties" not in schema or "additionalProperties" not in schema, path


def test_constants_become_enumerations() -> None:
    """A constant is an enumeration of one value; several types are an error, not a guess."""

    class Constant(BaseModel):
        """One."""

        kind: Literal["a"]

    class Ambiguous(BaseModel):
        """Two."""

        value: int | str

    properties = crdgen.structural_schema(Constant)["properties"]
    assert properties["kind"]["enum"] == ["a"]
    with pytest.raises(ValueError, match="several types"):
        crdgen.structural_schema(Ambiguous)


@pytest.mark.parametrize("model", [DesiredState, Report])
def test_messages_are_bounded(model: type[BaseModel]) -> None:
    """No string or list of a message is without a limit, save the key set, limited as a whole."""
    schema = model.model_json_schema()
    defined = [schema, *schema["$defs"].values()]
    for part in defined:
        for name, field in part.get("properties", {}).items():
            for option in field.get("anyOf", [field]):
                _assert_bounded(f"{part['title']}.{name}", option)


def _assert_bounded(path: str, schema: dict[str, Any]) -> None:
    kind = schema.get("type")
    if kind == "string" and "enum" not in schema and "const" not in schema:
        assert "maxLength" in schema or schema.get("format") == "date-time", path
    if kind == "array":
        assert "maxItems" in schema, path
        _assert_bounded(f"{path}[]", schema["items"])
    if kind in ("integer", "number"):
        assert "maximum" in schema, path
    if kind == "object" and path != "DesiredState.jwks":
        assert "maxProperties" in schema, path
