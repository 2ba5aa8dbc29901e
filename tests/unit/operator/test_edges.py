"""The edges without a cluster: discovery, settings, patches, keys, listed objects."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from blobcache_api.v1alpha1.config import BlobCacheConfigStatus, NodesStatus, UsageStatus
from blobcache_operator import errors
from blobcache_operator.__main__ import main
from blobcache_operator.discovery import AgentAddress, find_agents
from blobcache_operator.facts import read_config
from blobcache_operator.jwks import parse_token_issuer
from blobcache_operator.settings import OperatorSettings
from blobcache_operator.status_writer import status_patch


def _slice(*endpoints: dict[str, Any], port: int = 7443) -> dict[str, Any]:
    return {"ports": [{"name": "control", "port": port}], "endpoints": list(endpoints)}


def _endpoint(node: str | None, address: str, uid: str, **conditions: bool) -> dict[str, Any]:
    return {
        "nodeName": node,
        "addresses": [address],
        "conditions": conditions,
        "targetRef": {"kind": "Pod", "uid": uid},
    }


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ([_endpoint("n", "10.0.0.1", "u", ready=True)], {"n": "https://10.0.0.1:7443"}),
        ([_endpoint("n", "10.0.0.1", "u", ready=False)], {"n": "https://10.0.0.1:7443"}),
        ([_endpoint("n", "10.0.0.1", "u", terminating=True)], {}),
        ([_endpoint(None, "10.0.0.1", "u")], {}),
        ([_endpoint("n", "fd00::1", "u")], {"n": "https://[fd00::1]:7443"}),
        (
            [
                _endpoint("n", "10.0.0.1", "a", ready=False),
                _endpoint("n", "10.0.0.2", "b", ready=True),
            ],
            {"n": "https://10.0.0.2:7443"},
        ),
        (
            [_endpoint("n", "10.0.0.2", "b", ready=True), _endpoint("n", "10.0.0.1", "a")],
            {"n": "https://10.0.0.1:7443"},
        ),
    ],
)
def test_agents_are_found_from_endpoints(
    endpoints: list[dict[str, Any]], expected: dict[str, str]
) -> None:
    """Ready or not, never terminating, one per node."""
    found = find_agents([_slice(*endpoints)], {})
    assert {node: address.url for node, address in found.items()} == expected


def test_one_pod_in_two_slices_is_one_agent() -> None:
    """Slices may overlap while they are rewritten; names given by hand win."""
    piece = _slice(_endpoint("n", "10.0.0.1", "u"))
    found = find_agents([piece, piece], {"n": "https://127.0.0.1:1", "m": "https://127.0.0.1:2"})
    assert found == {
        "n": AgentAddress("n", "https://127.0.0.1:1"),
        "m": AgentAddress("m", "https://127.0.0.1:2"),
    }


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"agent": ["node"]}, "NODE=URL"),
        ({"agent": ["node=http://127.0.0.1:1"]}, "https://HOST:PORT"),
        ({"agent": ["node=https://127.0.0.1:1/path"]}, "https://HOST:PORT"),
        ({"health_listen": "7081"}, "HOST:PORT"),
        ({"log_level": "loud"}, "DEBUG"),
        ({"capacity_max": "50 GB"}, "quantity"),
        ({"configs_per_node_max": 257}, "256"),
    ],
)
def test_impossible_settings_say_what_to_write(changed: dict[str, Any], fragment: str) -> None:
    """Each refusal names a form that works."""
    with pytest.raises(ValidationError) as caught:
        OperatorSettings(**changed)
    assert fragment in str(caught.value)


def test_settings_come_from_the_environment_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several agents stand in one variable, separated by spaces."""
    monkeypatch.setenv("BLOBCACHE_OPERATOR_AGENT", "a=https://h:1 b=https://h:2/")
    monkeypatch.setenv("BLOBCACHE_OPERATOR_CAPACITY_MAX", "1Gi")
    settings = OperatorSettings(capacity_max="2Gi")  # type: ignore[arg-type]
    assert settings.agent == {"a": "https://h:1", "b": "https://h:2"}
    assert settings.capacity_max == 2 * 1024**3
    assert OperatorSettings(health_listen="[::1]:8").health_address == ("::1", 8)


def test_help_teaches_every_flag() -> None:
    """Each setting has a flag with a text, and there is an example to copy."""
    shown = CliRunner().invoke(main, ["--help"]).output
    for name in OperatorSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
    assert "kubectl apply -f crds/" in shown


def test_a_wrong_flag_is_a_usage_error() -> None:
    """Exit code 2 and the flag's name, no traceback."""
    result = CliRunner().invoke(main, ["--agent", "nonsense"])
    assert result.exit_code == 2
    assert "--agent" in result.output
    assert "NODE=URL" in result.output


def test_a_patch_removes_what_is_absent() -> None:
    """Nulls remove fields, at every level of objects; lists are whole."""
    status = BlobCacheConfigStatus(
        observed_generation=1,
        nodes=NodesStatus(selected=0, available=0, ready=0, failed=0, summary="0/0"),
        usage=UsageStatus(bytes=0, blobs=0, cached="0"),
    )
    patch = status_patch(status)
    assert patch["prefetch"] is None
    assert patch["usage"] == {"bytes": 0, "blobs": 0, "capacityBytes": None, "cached": "0"}
    assert patch["nodes"]["failures"] == []
    assert patch["conditions"] == []


def test_only_public_parts_of_keys_are_pushed() -> None:
    """A private part that somebody published by mistake goes no further; order is ours."""
    keys = [{"kid": "b", "kty": "RSA", "n": "x", "d": "private"}, {"kid": "a", "kty": "EC"}]
    found = parse_token_issuer({"issuer": "https://issuer"}, {"keys": keys})
    assert found.keys == ({"kty": "EC", "kid": "a"}, {"kty": "RSA", "kid": "b", "n": "x"})
    with pytest.raises(errors.KubeError):
        parse_token_issuer({}, {"keys": []})


def _body(spec: object, status: object = None) -> dict[str, Any]:
    metadata = {
        "namespace": "demo", "name": "a", "uid": "u", "generation": 3,
        "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": [{"manager": "kubectl"}],
    }  # fmt: skip
    body = {"apiVersion": "blobcache.dev/v1alpha1", "kind": "BlobCacheConfig"}
    return {**body, "metadata": metadata, "spec": spec, "status": status}


def test_a_listed_object_that_does_not_fit_is_still_a_fact() -> None:
    """One bad object must not hide the others, nor crash the loop."""
    good = read_config(
        _body({"backend": {"type": "HTTPProxy", "httpProxy": {"address": "http://o.example.com"}}})
    )
    assert good.spec is not None
    assert (good.key, good.generation) == ("demo/a", 3)
    bad = read_config(_body({"backend": {"type": "Tape"}}, {"conditions": "lots"}))
    assert bad.spec is None
    assert "backend" in bad.problem
    assert bad.status is None
