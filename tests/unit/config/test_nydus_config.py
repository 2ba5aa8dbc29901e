"""Real-world Nydus configurations are read, and what cannot be honoured is refused by name."""

from __future__ import annotations

import base64
import copy
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blobcache_storage.config import (
    CacheConfig,
    HTTPProxyConfig,
    LocalFSConfig,
    OSSConfig,
    PrefetchConfig,
    RegistryConfig,
    S3Config,
)
from blobcache_storage.credentials import AccessKey, Anonymous, BasicAuth, BearerToken
from blobcache_storage.errors import ConfigError
from blobcache_storage.nydus_config import (
    FILE_SIZE_BYTES_MAX,
    TIMEOUT_SECONDS_MAX,
    load_config,
)

AUTH = base64.b64encode(b"robot:pass:word").decode()

SNAPSHOTTER = {
    "device": {
        "backend": {
            "type": "registry",
            "config": {
                "scheme": "https",
                "host": "registry.example.com",
                "repo": "library/app",
                "auth": AUTH,
                "timeout": 5,
                "connect_timeout": 5,
                "retry_limit": 2,
                "skip_verify": False,
                "mirrors": [{"host": "http://127.0.0.1:65001", "ping_url": ""}],
            },
        },
        "cache": {"type": "blobcache", "config": {"work_dir": "/var/lib/nydus/cache"}},
    },
    "mode": "direct",
    "digest_validate": False,
    "iostats_files": False,
    "enable_xattr": True,
    "fs_prefetch": {
        "enable": True,
        "threads_count": 6,
        "merging_size": 131072,
        "bandwidth_rate": 1048576,
        "prefetch_all": True,
    },
}

V2_TOML = """
version = 2
id = "factory1"

[backend]
type = "oss"
[backend.oss]
endpoint = "oss-cn-hangzhou.aliyuncs.com"
bucket_name = "layers"
object_prefix = "blobs/"
access_key_id = "AK"
access_key_secret = "SK"
timeout = 10
retry_limit = 5
skip_verify = true

[cache]
type = "filecache"
validate = true
[cache.filecache]
work_dir = "/var/cache/nydus"
[cache.prefetch]
enable = true
threads = 4
bandwidth_limit = 0

[rafs]
mode = "direct"
enable_xattr = true
"""

SECTIONS: dict[str, dict[str, Any]] = {
    "s3": {"endpoint": "", "region": "eu-west-1", "bucket_name": "b"},
    "oss": {"endpoint": "10.0.0.7:8080", "bucket_name": "b", "scheme": "http"},
    "registry": {"host": "r.example.com:5000", "repo": "a/b"},
    "http-proxy": {"addr": "http://127.0.0.1:7080/", "path": "/v1/blobs/ns/name"},
    "localfs": {"dir": "/srv/blobs"},
}


def v2(kind: str, **fields: Any) -> dict[str, Any]:
    """A version 2 document with one backend, its section's fields changed."""
    backend = {"type": kind, kind: {**SECTIONS[kind], **fields}}
    cache = {"type": "filecache", "filecache": {"work_dir": "/c"}}
    return {"version": 2, "id": "x", "backend": backend, "cache": cache}


def load(document: Any) -> Any:
    """Load a document as JSON."""
    return load_config(json.dumps(document).encode())


def refusal(document: Any) -> str:
    """Return the message with which a document is refused."""
    with pytest.raises(ConfigError) as caught:
        load(document)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    return str(caught.value)


def test_the_snapshotters_legacy_json() -> None:
    """What containerd's nydus snapshotter writes is understood; its mirrors are ignored."""
    config = load(SNAPSHOTTER)
    backend = config.get_backend_config()
    assert backend.registry == RegistryConfig("registry.example.com", "library/app", "https")
    assert backend.credentials == BasicAuth("robot", SecretStr("pass:word"))
    assert (backend.timeout_seconds, backend.retry_limit) == (5.0, 2)
    assert config.get_cache_config() == CacheConfig(
        type="blobcache",
        work_dir="/var/lib/nydus/cache",
        validate=False,
        prefetch=PrefetchConfig(enable=True, concurrency=6, bytes_per_second_limit=1048576),
    )


def test_a_version_2_toml_file(tmp_path: Path) -> None:
    """A path works as well as content."""
    path = tmp_path / "nydus.toml"
    path.write_text(V2_TOML)
    config = load_config(path)
    assert config.id == "factory1"
    backend = config.get_backend_config()
    assert backend.oss == OSSConfig(
        "https://oss-cn-hangzhou.aliyuncs.com", "layers", "blobs/", signature="V4"
    )
    assert backend.credentials == AccessKey("AK", SecretStr("SK"))
    assert backend.insecure_skip_verify
    assert (backend.timeout_seconds, backend.connect_timeout_seconds) == (10.0, 5.0)
    assert backend.retry_limit == 5
    cache = config.get_cache_config()
    assert cache.validate
    assert cache.prefetch == PrefetchConfig(enable=True, concurrency=4)


def test_defaults_are_nyduss() -> None:
    """Where a field is absent Nydus's default counts, not ours."""
    config = load(v2("s3"))
    backend = config.get_backend_config()
    assert backend.s3 == S3Config("https://s3.amazonaws.com", "eu-west-1", "b")
    assert backend.credentials == Anonymous()
    assert (backend.timeout_seconds, backend.connect_timeout_seconds) == (5.0, 5.0)
    assert backend.retry_limit == 0
    assert not backend.insecure_skip_verify
    assert not config.get_cache_config().validate
    assert config.get_cache_config().prefetch == PrefetchConfig()


def test_an_oss_at_an_ip_address_is_addressed_by_path() -> None:
    """And signed V1, for no region can be known."""
    oss = load(v2("oss")).backend.oss
    assert oss == OSSConfig("http://10.0.0.7:8080", "b", virtual_host=False, signature="V1")


def test_http_proxy_and_localfs() -> None:
    """Trailing slashes of an address go, for the id is joined by one."""
    proxy = load(v2("http-proxy")).backend.http_proxy
    assert proxy == HTTPProxyConfig("http://127.0.0.1:7080", "/v1/blobs/ns/name")
    files = load(v2("localfs", dir="", blob_file="/b", alt_dirs=["/a"])).backend.localfs
    assert files == LocalFSConfig("", "/b", ("/a",))


def test_zero_means_no_timeout() -> None:
    """For both of them."""
    backend = load(v2("registry", timeout=0, connect_timeout=0)).backend
    assert backend.timeout_seconds == backend.connect_timeout_seconds == TIMEOUT_SECONDS_MAX


def test_a_registry_token_is_a_bearer_and_user_and_password_outlive_it() -> None:
    """With both, the one that can get new tokens is taken."""
    token = load(v2("registry", registry_token="t0ken"))
    assert token.backend.credentials == BearerToken(SecretStr("t0ken"))
    both = load(v2("registry", registry_token="t0ken", auth=AUTH))
    assert both.backend.credentials == BasicAuth("robot", SecretStr("pass:word"))


def test_certificate_files_are_read_and_joined(tmp_path: Path) -> None:
    """In order, each on lines of its own."""
    pem = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----"
    for name in ("a", "b"):
        (tmp_path / name).write_text(pem.format(name))
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    bundle = load(v2("registry", ca_cert_files=files)).backend.ca_bundle_pem
    assert bundle == pem.format("a") + "\n" + pem.format("b") + "\n"


def test_certificate_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """Missing, a folder, or something else: each named."""
    (tmp_path / "junk").write_text("junk")
    for name, problem in (("gone", "cannot be read"), (".", "regular file"), ("junk", "PEM")):
        message = refusal(v2("s3", ca_cert_files=[str(tmp_path / name)]))
        assert "`backend.s3.ca_cert_files`" in message
        assert problem in message


def test_unknown_keys_are_ignored() -> None:
    """As Nydus does, everywhere."""
    document = v2("s3", readahead=True)
    document["warmup"] = {"x": 1}
    document["cache"]["id_mapping"] = None
    assert load(document) == load(v2("s3"))


def test_rafs_prefetch_alone_starts_nothing_in_version_2() -> None:
    """Only the legacy form copies it."""
    document = {**v2("s3"), "rafs": {"prefetch": {"enable": True}}}
    assert not load(document).cache.prefetch.enable


def test_other_cache_types() -> None:
    """A dummy passes through; fscache is read, and refused by the factory."""
    assert load({**v2("s3"), "cache": {"type": ""}}).cache.type == ""
    assert load({**v2("s3"), "cache": {}}).cache.type == ""
    fscache = {"type": "fscache", "fscache": {"work_dir": "/f"}}
    assert load({**v2("s3"), "cache": fscache}).cache.work_dir == "/f"


def test_absent_sections_are_asked_for_when_needed() -> None:
    """A file without them parses, as in Nydus."""
    config = load({"version": 2})
    with pytest.raises(ConfigError, match="`backend` section"):
        config.get_backend_config()
    with pytest.raises(ConfigError, match="`cache` section"):
        config.get_cache_config()


@pytest.mark.parametrize(
    ("kind", "fields", "field"),
    [
        ("s3", {"region": ""}, "backend.s3.region"),
        ("s3", {"bucket_name": ""}, "backend.s3.bucket_name"),
        ("s3", {"endpoint": "https://s3.example.com"}, "backend.s3.endpoint"),
        ("s3", {"endpoint": "h:70000"}, "backend.s3.endpoint"),
        ("s3", {"endpoint": "u@h"}, "backend.s3.endpoint"),
        ("s3", {"scheme": "ftp"}, "backend.s3.scheme"),
        ("s3", {"access_key_id": "AK"}, "backend.s3.access_key_id"),
        ("s3", {"access_key_id": "AK", "access_key_secret": "s\n"}, "backend.s3.access_key_secret"),
        ("s3", {"retry_limit": 256}, "backend.s3.retry_limit"),
        ("s3", {"retry_limit": 101}, "backend.s3.retry_limit"),
        ("s3", {"timeout": 3601}, "backend.s3.timeout"),
        ("s3", {"timeout": -1}, "backend.s3.timeout"),
        ("s3", {"timeout": 1.5}, "backend.s3.timeout"),
        ("s3", {"skip_verify": "yes"}, "backend.s3.skip_verify"),
        ("s3", {"object_prefix": "a\u0000"}, "backend.s3.object_prefix"),
        ("s3", {"proxy": {"url": "http://p:1"}}, "backend.s3.proxy.url"),
        ("oss", {"endpoint": ""}, "backend.oss.endpoint"),
        ("registry", {"host": ""}, "backend.registry.host"),
        ("registry", {"repo": ""}, "backend.registry.repo"),
        ("registry", {"auth": "%%"}, "backend.registry.auth"),
        ("registry", {"auth": base64.b64encode(b"nocolon").decode()}, "backend.registry.auth"),
        ("registry", {"registry_token": "t\r\nX: y"}, "backend.registry.registry_token"),
        ("registry", {"blob_redirected_host": "h"}, "backend.registry.blob_redirected_host"),
        ("http-proxy", {"addr": "/run/p.sock"}, "backend.http-proxy.addr"),
        ("http-proxy", {"addr": "ftp://h"}, "backend.http-proxy.addr"),
        ("http-proxy", {"addr": "http://u:p@h"}, "backend.http-proxy.addr"),
        ("http-proxy", {"addr": "http://h/?q"}, "backend.http-proxy.addr"),
        ("http-proxy", {"path": "x"}, "backend.http-proxy.path"),
        ("localfs", {"dir": "", "alt_dirs": ["/a"]}, "backend.localfs.dir"),
    ],
)
def test_a_wrong_field_is_named(kind: str, fields: dict[str, Any], field: str) -> None:
    """In backticks, first thing."""
    assert refusal(v2(kind, **fields)).startswith(f"`{field}` ")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 1}, "version"),
        ({"version": "2"}, "version"),
        ({"backend": {"type": "localdisk"}}, "backend.type"),
        ({"backend": {"type": "s3", "oss": SECTIONS["oss"]}}, "backend.s3"),
        ({"external_backends": [{"type": "x"}]}, "external_backends"),
        ({"cache": {"type": "magic"}}, "cache.type"),
        ({"cache": {"type": "filecache"}}, "cache.filecache.work_dir"),
        (
            {"cache": {"type": "blobcache", "filecache": {"work_dir": ""}}},
            "cache.filecache.work_dir",
        ),
        ({"cache": {"type": "fscache"}}, "cache.fscache.work_dir"),
        ({"cache": {"compressed": True}}, "cache.compressed"),
        (
            {"cache": {"type": "filecache", "filecache": {"enable_encryption": True}}},
            "cache.filecache.enable_encryption",
        ),
        ({"cache": {"prefetch": {}}}, "cache.prefetch.enable"),
        ({"cache": {"prefetch": {"enable": True, "threads": 0}}}, "cache.prefetch.threads"),
        (
            {"cache": {"prefetch": {"enable": True, "batch_size": 2**28 + 1}}},
            "cache.prefetch.batch_size",
        ),
        ({"rafs": {"mode": "fast"}}, "rafs.mode"),
        ({"rafs": {"batch_size": 2**28 + 1}}, "rafs.batch_size"),
    ],
)
def test_a_broken_rule_is_named(changes: dict[str, Any], field: str) -> None:
    """Whatever the table."""
    assert refusal({**v2("s3"), **changes}).startswith(f"`{field}` ")


def test_prefetch_that_is_off_may_say_anything() -> None:
    """Nydus checks its bounds only when it is on."""
    off = {"cache": {"prefetch": {"enable": False, "threads": 0}}}
    assert load({**v2("s3"), **off}).cache.prefetch == PrefetchConfig()


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("device", "backend", "config", "repo"), "", "device.backend.config.repo"),
        (("device", "backend", "config", "timeout"), "5", "device.backend.config.timeout"),
        (("device", "backend", "type"), "http-proxy", "device.backend.type"),
        (("device", "backend", "type"), "nfs", "device.backend.type"),
        (("device", "backend", "config"), None, "device.backend.config"),
        (("device", "cache", "config"), None, "device.cache.config.work_dir"),
        (("device", "cache", "compressed"), True, "device.cache.compressed"),
        (("fs_prefetch", "threads_count"), 2000, "fs_prefetch.threads_count"),
        (("amplify_io",), 2**30, "amplify_io"),
        (("mode",), "odd", "mode"),
    ],
)
def test_refusals_of_the_legacy_form_use_its_names(
    path: tuple[str, ...], value: Any, field: str
) -> None:
    """Who wrote `device.backend.config` does not know `backend.registry`."""
    document = copy.deepcopy(SNAPSHOTTER)
    table: Any = document
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    assert refusal(document).startswith(f"`{field}` ")


def test_a_broken_rule_of_version_2_does_not_fall_through() -> None:
    """Even if a whole legacy document is there as well."""
    assert refusal({**SNAPSHOTTER, "version": 3}) == "`version` must be 2, not 3"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "`version` is missing"),
        (b"[]", "must be a table"),
        (b"{", "valid JSON: "),
        (b"version = ", "valid JSON or TOML (at "),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "JSON or TOML"),
        (b" " * (FILE_SIZE_BYTES_MAX + 1), "at most 1048576 bytes"),
        (b'{"version": ' + b"9" * 5000 + b"}", "valid JSON"),
    ],
)
def test_what_is_no_configuration(content: bytes, problem: str) -> None:
    """Each kind of rubbish has its sentence."""
    with pytest.raises(ConfigError) as caught:
        load_config(content)
    assert problem in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Absent, a folder, a FIFO nobody writes to, too large."""
    fifo, large = tmp_path / "fifo", tmp_path / "large"
    os.mkfifo(fifo)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    outcomes: list[str] = []

    def load_all() -> None:
        for path in (tmp_path / "absent", tmp_path, fifo, large, Path("nul\0")):
            with pytest.raises(ConfigError) as caught:
                load_config(path)
            outcomes.append(str(caught.value))

    thread = threading.Thread(target=load_all, daemon=True)
    thread.start()
    thread.join(30)
    assert len(outcomes) == 5
    assert "No such file" in outcomes[0]
    assert "regular file" in outcomes[1]
    assert "regular file" in outcomes[2]
    assert "at most" in outcomes[3]


def test_no_message_and_no_repr_shows_a_secret() -> None:
    """Wrong type, wrong form, wrong place."""
    secret = "hunter2-hunter2"
    for document in (
        v2("registry", auth=secret),
        v2("registry", registry_token=[secret]),
        v2("s3", access_key_secret={"a": secret}),
        v2("s3", access_key_secret=secret),
        v2("registry", registry_token=secret + "\n"),
    ):
        assert secret not in refusal(document)
    assert secret not in repr(load(v2("registry", registry_token=secret)))
    with pytest.raises(ConfigError) as caught:
        load_config(f"version = 2\n[backend]\nx = {secret}".encode())
    assert secret not in str(caught.value)
