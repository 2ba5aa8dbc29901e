"""Messages of operator and agent: bounds, secrets, digests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blobcache_api import agent
from blobcache_api.agent import (
    CredentialsState,
    DesiredState,
    PushedConfig,
    PushedCredentials,
    dump_for_disk,
    dump_for_push,
    parse_message,
    parse_report,
    parse_state,
    seal_config,
    seal_state,
)
from blobcache_api.v1alpha1.common import MalformedError

SECRET = "s3cr3t-value"


def _config(**changes: Any) -> dict[str, Any]:
    spec = {"backend": {"type": "S3", "s3": {"endpoint": "https://s3.test", "bucket": "models"}}}
    body = {"namespace": "a", "name": "models", "uid": "u-1", "generation": 1, "spec": spec}
    credentials = {"accessKeyID": "AK", "secretAccessKey": SECRET, "sessionToken": SECRET}
    return body | {"credentials": credentials, "credentialsState": "Present"} | changes


def _state(*configs: dict[str, Any], **changes: Any) -> DesiredState:
    body = {"epoch": 1, "revision": 2, "node": "n", "configs": configs or (_config(),)} | changes
    return DesiredState.model_validate(body)


def test_secrets_cross_the_wire_only() -> None:
    """The wire form holds the values; disk, repr and the plain dump do not."""
    state = seal_state(_state())
    assert SECRET.encode() in dump_for_push(state)
    for shown in (
        dump_for_disk(state).decode(),
        repr(state),
        str(state),
        agent.dump_message(state),
    ):
        assert SECRET not in str(shown)
    assert SECRET not in repr(state.model_dump())


def test_wire_form_reads_back() -> None:
    """What is pushed is what is read, secrets included."""
    state = seal_state(_state(tombstones=["u-2"], deniedAddresses=["10.0.0.1", "fd00::/8"]))
    read = parse_state(dump_for_push(state))
    assert read == state
    credentials = read.configs[0].credentials
    assert credentials is not None
    assert credentials.secret_values() == (SECRET, SECRET, "", "")


def test_disk_form_waits_for_credentials() -> None:
    """A restarted agent knows that credentials are missing, and still what was applied."""
    state = seal_state(_state(_config(), _config(**_anonymous(name="open", uid="u-2"))))
    read = parse_state(dump_for_disk(state))
    private, anonymous = read.configs
    assert private.credentials is None
    assert private.credentials_state is CredentialsState.PENDING
    assert anonymous.credentials_state is CredentialsState.NOT_REQUIRED
    assert (read.digest, private.digest) == (state.digest, state.configs[0].digest)


def _anonymous(**changes: Any) -> dict[str, Any]:
    return {"credentials": None, "credentialsState": "NotRequired"} | changes


@pytest.mark.parametrize(
    ("credentials", "is_one_set"),
    [
        ({"accessKeyID": "a", "secretAccessKey": "b"}, True),
        ({"accessKeyID": "a", "secretAccessKey": "b", "sessionToken": "c"}, True),
        ({"username": "a", "password": "b"}, True),
        ({"token": "a"}, True),
        ({}, False),
        ({"accessKeyID": "a"}, False),
        ({"sessionToken": "a"}, False),
        ({"sessionToken": "a", "token": "b"}, False),
        ({"username": "a", "password": "b", "token": "c"}, False),
        ({"username": "a", "password": "b", "sessionToken": "c"}, False),
        ({"password": "b"}, False),
    ],
)
def test_exactly_one_set_of_credentials(credentials: dict[str, str], is_one_set: bool) -> None:
    """A half set, or two, is no credentials."""
    if is_one_set:
        assert PushedCredentials.model_validate(credentials).has_one_set()
        return
    with pytest.raises(ValueError, match="exactly one set"):
        PushedCredentials.model_validate(credentials)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'{"epoch": NaN}',
        b"\xff",
        b"[" * 100_000,
        b'{"jwks":' * 33 + b"{}" + b"}" * 33,
        json.dumps({"epoch": 1, "revision": 1, "node": "n", "extra": 1}).encode(),
        json.dumps({"epoch": "1", "revision": 1, "node": "n"}).encode(),
        json.dumps({"epoch": -1, "revision": 1, "node": "n"}).encode(),
        json.dumps({"epoch": 1, "revision": 1, "node": "n", "deniedAddresses": ["x"]}).encode(),
        json.dumps({"epoch": 1, "revision": 1, "node": "n", "jwks": {"keys": 1}}).encode(),
        json.dumps(
            {"epoch": 1, "revision": 1, "node": "n", "configs": [_config(), _config()]}
        ).encode(),
        json.dumps(
            {"epoch": 1, "revision": 1, "node": "n", "configs": [_config(credentials=None)]}
        ).encode(),
        json.dumps(
            {"epoch": 1, "revision": 1, "node": "n", "configs": [_config(token=SECRET)]}
        ).encode(),
    ],
)
def test_unreadable_states_are_refused_without_quoting(raw: bytes) -> None:
    """Whatever is wrong with a state, the message quotes nothing of it."""
    with pytest.raises(MalformedError) as caught:
        parse_state(raw)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_size_is_limited() -> None:
    """A state of 16 MiB is read, one byte more is not looked at."""
    raw = dump_for_push(_state())
    padded = raw + b" " * (agent.STATE_SIZE_BYTES_MAX - len(raw))
    assert parse_state(padded).epoch == 1
    with pytest.raises(MalformedError, match="at most 16777216 bytes"):
        parse_state(padded + b" ")


def test_depth_is_limited_on_the_way_to_models() -> None:
    """Nesting below the parser's limit and above ours is refused."""
    deep: Any = 1
    for _ in range(agent.DEPTH_MAX + 1):
        deep = [deep]
    with pytest.raises(MalformedError, match="levels deep"):
        parse_message(DesiredState, json.dumps(deep).encode(), size_bytes_max=1000)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    """No bytes do anything but fail as malformed."""
    for parse in (parse_state, parse_report):
        with pytest.raises(MalformedError):
            parse(raw)


def _sealed(digest_key: bytes = b"k", version: str = "1", **changes: Any) -> str:
    config = PushedConfig.model_validate(_config(**changes))
    return seal_config(config, secret_version=version, digest_key=digest_key).digest


def test_digest_of_a_config_covers_everything() -> None:
    """A change of spec, generation, identity, Secret or secret value changes the digest."""
    other = {"accessKeyID": "AK", "secretAccessKey": "another"}
    digests = [
        _sealed(),
        _sealed(generation=2),
        _sealed(name="b"),
        _sealed(uid="u-9"),
        _sealed(version="2"),
        _sealed(credentials=other),
        _sealed(**_anonymous()),
        _sealed(**_anonymous(credentialsState="Pending")),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)
    assert _sealed() == _sealed()
    assert _sealed(digest="0a" * 32) == _sealed(), "a digest does not cover itself"


def test_digest_does_not_tell_a_weak_secret() -> None:
    """Digests stand in status: without the caller's key no guess can be checked against one."""
    other = {"accessKeyID": "AK", "secretAccessKey": "another", "sessionToken": SECRET}
    assert _sealed(b"") == _sealed(b"", credentials=other)
    assert _sealed(b"k") != _sealed(b"another key")


def test_digest_of_a_state_ignores_when_and_order() -> None:
    """The same wishes have the same digest, whoever leads and in whatever order they come."""
    one, two = (
        seal_config(PushedConfig.model_validate(_config(name=name, uid=name))) for name in "ab"
    )
    first = DesiredState(epoch=1, revision=1, node="n", configs=(one, two), tombstones=("x", "y"))
    again = DesiredState(epoch=9, revision=7, node="n", configs=(two, one), tombstones=("y", "x"))
    assert seal_state(first).digest == seal_state(again).digest
    for change in (
        {"node": "m"},
        {"configs": (one,)},
        {"tombstones": ("x",)},
        {"denied_addresses": ("10.0.0.1",)},
        {"issuer": "i"},
        {"jwks": {"keys": []}},
        {"protocol_version": 2},
    ):
        changed = first.model_copy(update=change)
        assert seal_state(changed).digest != seal_state(first).digest, change
