"""Reading Nydus's own configuration files: JSON and TOML version 2, and the legacy JSON.

The order is Nydus's: JSON version 2, then TOML version 2, then legacy JSON. What fits a form but
breaks one of its rules is refused at once and not tried as the next form. Unknown keys are ignored.

Where Blobcache differs, it refuses what it would otherwise have to ignore silently: encryption, raw
(compressed) caches, forward proxies, external backends, local disks and unix sockets. No message
repeats a value that may be secret.

Nydus: `api/src/config.rs`.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Sequence
from typing import Any, Final

from pydantic import SecretStr, ValidationError

from blobcache_storage.config import (
    BackendConfig,
    CacheConfig,
    ConfigV2,
    HTTPProxyConfig,
    LocalFSConfig,
    OSSConfig,
    PrefetchConfig,
    RegistryConfig,
    S3Config,
)
from blobcache_storage.credentials import (
    AccessKey,
    Anonymous,
    BasicAuth,
    BearerToken,
    Credentials,
)
from blobcache_storage.errors import ConfigError
from blobcache_storage.nydus_schema import (
    BackendSection,
    CacheSection,
    FileCacheSection,
    HTTPProxySection,
    LegacyDocument,
    LocalFSSection,
    OSSSection,
    PrefetchSection,
    RafsSection,
    RegistrySection,
    RemoteSection,
    S3Section,
    V2Document,
)

FILE_SIZE_BYTES_MAX: Final = 1 << 20
"""Longest file read, of configurations and of CA certificates (Nydus: the former)."""

BATCH_SIZE_BYTES_MAX: Final = 256 << 20
PREFETCH_THREADS_MAX: Final = 1024

TIMEOUT_SECONDS_MAX: Final = 3600
"""The longest a backend waits; also what Nydus's 0 ("no time-out") becomes."""
RETRY_LIMIT_MAX: Final = 100

_S3_ENDPOINT_DEFAULT: Final = "s3.amazonaws.com"
_AUTHORITY: Final = re.compile(
    r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*))(?::([0-9]{1,5}))?"
)
_HTTP_ADDRESS: Final = re.compile(r"(?:http|https)://([^/?#@\\]+)(/[^?#@\\]*)?")
_REGIONAL_OSS: Final = re.compile(r"oss-[a-z0-9-]+\.aliyuncs\.com(?::[0-9]+)?")


class _Refused(Exception):
    """A field of the version 2 form that cannot be accepted, and why."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


def load_config(source: str | os.PathLike[str] | bytes) -> ConfigV2:
    """Return the configuration in a file (a path), or in its content (bytes).

    Blocks: it reads the file and the CA certificate files that it names.

    Raises:
        ConfigError: It cannot be read, parsed or used; the message names the field.
    """
    content = source if isinstance(source, bytes) else _read_file(source, "the configuration")
    if len(content) > FILE_SIZE_BYTES_MAX:
        raise ConfigError(f"a configuration must have at most {FILE_SIZE_BYTES_MAX} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError("a configuration must be valid UTF-8") from None
    document = _parse(text)
    try:
        # A parse error here falls through to the legacy form, a broken rule does not.
        config = V2Document.model_validate(document)
    except ValidationError as error:
        if not isinstance(document, dict) or "version" in document or "device" not in document:
            raise ConfigError(_first_problem(error)) from None
        return _load_legacy(document)
    try:
        return _convert(config)
    except _Refused as refused:
        raise ConfigError(f"`{refused.field}` {refused.problem}") from None


def _load_legacy(document: dict[str, Any]) -> ConfigV2:
    """Convert the form nydus-snapshotter writes; messages name the legacy fields."""
    try:
        legacy = LegacyDocument.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from None
    try:
        return _convert(V2Document.model_validate(_as_v2(legacy)))
    except ValidationError as error:
        raise ConfigError(_first_problem(error, _legacy_name)) from None
    except _Refused as refused:
        raise ConfigError(f"`{_legacy_name(refused.field)}` {refused.problem}") from None


def _as_v2(legacy: LegacyDocument) -> dict[str, Any]:
    """Return the legacy form's content in the version 2 form."""
    device, prefetch = legacy.device, legacy.fs_prefetch
    if device.backend.type == "http-proxy":
        raise _Refused("backend.type", "must not be 'http-proxy' here: use the version 2 form")
    cache: dict[str, Any] = {
        "type": device.cache.type,
        "compressed": device.cache.compressed,
        "validate": device.cache.validate_,
        "prefetch": {
            "enable": prefetch.enable,
            "threads": prefetch.threads_count,
            "batch_size": prefetch.merging_size,
            "bandwidth_limit": prefetch.bandwidth_rate,
        },
    }
    if device.cache.config is not None:
        section = "fscache" if device.cache.type == "fscache" else "filecache"
        cache[section] = device.cache.config
    return {
        "version": 2,
        "id": device.id,
        "backend": {"type": device.backend.type, device.backend.type: device.backend.config},
        "external_backends": device.external_backends,
        "cache": cache,
        "rafs": {"mode": legacy.mode, "batch_size": legacy.amplify_io},
    }


_LEGACY_NAMES: Final = {
    "cache.prefetch.threads": "fs_prefetch.threads_count",
    "cache.prefetch.batch_size": "fs_prefetch.merging_size",
    "rafs.batch_size": "amplify_io",
    "rafs.mode": "mode",
}


def _legacy_name(field: str) -> str:
    """Return a version 2 field's name in the legacy form."""
    if field in _LEGACY_NAMES:
        return _LEGACY_NAMES[field]
    if match := re.fullmatch(r"backend\.(?!type(?:\.|$))[^.]+(.*)", field):
        return f"device.backend.config{match[1]}"
    if match := re.fullmatch(r"cache\.(?:filecache|fscache)(.*)", field):
        return f"device.cache.config{match[1]}"
    return f"device.{field}"


def _parse(text: str) -> Any:
    """Return the document, as JSON if it is JSON, else as TOML."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        json_problem = getattr(error, "msg", "") or "nested too deeply, or a number too long"
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # The parser's own words may quote the text; only the place is safe to repeat.
        place = re.search(r"\(at [a-z0-9 ,]+\)", str(error))
    if text.lstrip().startswith("{"):
        raise ConfigError(f"the configuration must be valid JSON: {json_problem}")
    where = f" {place[0]}" if place else ""
    raise ConfigError(f"the configuration must be valid JSON or TOML{where}")


def _first_problem(error: ValidationError, name: Callable[[str], str] = lambda field: field) -> str:
    """Return the first field that does not fit, and why, without its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    problem = "is missing" if first["type"] == "missing" else f"is wrong: {first['msg']}"
    if first["type"] == "string_pattern_mismatch":
        problem = "must not have control characters"
    return f"`{name(field)}` {problem}" if field else "a configuration must be a table"


def _convert(config: V2Document) -> ConfigV2:
    """Check the rules that types cannot say, in Nydus's order, and translate."""
    if config.version != 2:
        raise _Refused("version", f"must be 2, not {config.version}")
    if config.external_backends:
        raise _Refused("external_backends", "must be empty: they are not supported")
    _check_rafs(config.rafs)
    return ConfigV2(
        id=config.id,
        backend=_convert_backend(config.backend) if config.backend is not None else None,
        cache=_convert_cache(config.cache) if config.cache is not None else None,
    )


def _check_rafs(rafs: RafsSection | None) -> None:
    if rafs is None:
        return
    if rafs.mode not in ("direct", "cached"):
        raise _Refused("rafs.mode", "must be 'direct' or 'cached'")
    if rafs.batch_size > BATCH_SIZE_BYTES_MAX:
        raise _Refused("rafs.batch_size", f"must be at most {BATCH_SIZE_BYTES_MAX}")
    _convert_prefetch(rafs.prefetch, "rafs.prefetch")


def _convert_cache(cache: CacheSection) -> CacheConfig:
    work_dir = "."
    if cache.type in ("blobcache", "filecache"):
        work_dir = _file_cache_folder(cache.filecache)
    elif cache.type == "fscache":
        if cache.fscache is None or not cache.fscache.work_dir:
            raise _Refused("cache.fscache.work_dir", "must not be empty")
        work_dir = cache.fscache.work_dir
    elif cache.type not in ("", "dummycache"):
        known = "blobcache, filecache, fscache or dummycache"
        raise _Refused("cache.type", f"must be {known}, not '{cache.type[:64]}'")
    if cache.compressed:
        raise _Refused("cache.compressed", "must be false: raw caches are not supported")
    return CacheConfig(
        type=cache.type,
        work_dir=work_dir,
        validate=cache.validate_,
        prefetch=_convert_prefetch(cache.prefetch, "cache.prefetch"),
    )


def _file_cache_folder(section: FileCacheSection | None) -> str:
    if section is None or not section.work_dir:
        raise _Refused("cache.filecache.work_dir", "must not be empty")
    for field in ("enable_encryption", "enable_convergent_encryption"):
        if getattr(section, field):
            raise _Refused(f"cache.filecache.{field}", "must be false: it is not supported")
    return section.work_dir


def _convert_prefetch(prefetch: PrefetchSection | None, at: str) -> PrefetchConfig:
    """Check and translate; as in Nydus a table that is switched off may say anything."""
    if prefetch is None or not prefetch.enable:
        return PrefetchConfig()
    if prefetch.batch_size > BATCH_SIZE_BYTES_MAX:
        raise _Refused(f"{at}.batch_size", f"must be at most {BATCH_SIZE_BYTES_MAX}")
    if not 1 <= prefetch.threads <= PREFETCH_THREADS_MAX:
        raise _Refused(f"{at}.threads", f"must be 1 to {PREFETCH_THREADS_MAX}")
    return PrefetchConfig(
        enable=True,
        bytes_per_second_limit=prefetch.bandwidth_limit or None,
        concurrency=prefetch.threads,
    )


def _convert_backend(backend: BackendSection) -> BackendConfig:
    """Translate the section that `type` names; the others are ignored, as Nydus does."""
    converters: dict[str, Callable[[Any, str], BackendConfig]] = {
        "oss": _convert_oss,
        "s3": _convert_s3,
        "registry": _convert_registry,
        "http-proxy": _convert_http_proxy,
        "localfs": _convert_localfs,
    }
    if backend.type not in converters:
        raise _Refused("backend.type", f"is an unsupported backend type '{backend.type[:64]}'")
    section = getattr(backend, backend.type.replace("-", "_"))
    if section is None:
        raise _Refused(f"backend.{backend.type}", f"must be set, for the type is '{backend.type}'")
    return converters[backend.type](section, f"backend.{backend.type}")


def _convert_oss(section: OSSSection, at: str) -> BackendConfig:
    authority = _authority(section.endpoint, f"{at}.endpoint")
    return BackendConfig(
        type="oss",
        oss=OSSConfig(
            endpoint=f"{_scheme(section.scheme, at)}://{authority}",
            bucket=_not_empty(section.bucket_name, f"{at}.bucket_name"),
            prefix=section.object_prefix,
            virtual_host=not _is_address(authority),
            # Nydus signs V1. V4 is better, and needs a region, which only these names tell.
            signature="V4" if _REGIONAL_OSS.fullmatch(authority) else "V1",
        ),
        credentials=_access_key(section, at),
        **_remote(section, at),
    )


def _convert_s3(section: S3Section, at: str) -> BackendConfig:
    authority = _authority(section.endpoint or _S3_ENDPOINT_DEFAULT, f"{at}.endpoint")
    return BackendConfig(
        type="s3",
        s3=S3Config(
            endpoint=f"{_scheme(section.scheme, at)}://{authority}",
            region=_not_empty(section.region, f"{at}.region"),
            bucket=_not_empty(section.bucket_name, f"{at}.bucket_name"),
            prefix=section.object_prefix,
        ),
        credentials=_access_key(section, at),
        **_remote(section, at),
    )


def _convert_registry(section: RegistrySection, at: str) -> BackendConfig:
    for field in ("blob_url_scheme", "blob_redirected_host"):
        if getattr(section, field):
            raise _Refused(f"{at}.{field}", "must be empty: rewriting redirects is not supported")
    return BackendConfig(
        type="registry",
        registry=RegistryConfig(
            host=_authority(section.host, f"{at}.host"),
            repository=_not_empty(section.repo, f"{at}.repo"),
            scheme=_scheme(section.scheme, at),
        ),
        credentials=_registry_credentials(section, at),
        **_remote(section, at),
    )


def _convert_http_proxy(section: HTTPProxySection, at: str) -> BackendConfig:
    if section.addr.startswith("/"):
        raise _Refused(f"{at}.addr", "must be a URL: unix sockets are not supported")
    match = _HTTP_ADDRESS.fullmatch(section.addr)
    if match is None or any(character.isspace() for character in section.addr):
        problem = "must be an http:// or https:// URL without user, query and fragment"
        raise _Refused(f"{at}.addr", problem)
    _authority(match[1], f"{at}.addr")
    if section.path and not section.path.startswith("/"):
        raise _Refused(f"{at}.path", "must begin with '/'")
    proxy = HTTPProxyConfig(address=section.addr.rstrip("/"), path=section.path.rstrip("/"))
    return BackendConfig(type="http-proxy", http_proxy=proxy, **_remote(section, at))


def _convert_localfs(section: LocalFSSection, at: str) -> BackendConfig:
    if not section.blob_file and not section.dir:
        raise _Refused(f"{at}.dir", "must not be empty, unless `blob_file` is set")
    files = LocalFSConfig(
        directory=section.dir,
        blob_file=section.blob_file,
        alt_directories=tuple(section.alt_dirs),
    )
    return BackendConfig(type="localfs", localfs=files)


def _remote(section: RemoteSection, at: str) -> dict[str, Any]:
    """Return the arguments of BackendConfig that all HTTP backends share."""
    if section.proxy.url:
        raise _Refused(f"{at}.proxy.url", "must be empty: forward proxies are not supported")
    for name, limit in (
        ("timeout", TIMEOUT_SECONDS_MAX),
        ("connect_timeout", TIMEOUT_SECONDS_MAX),
        ("retry_limit", RETRY_LIMIT_MAX),
    ):
        if getattr(section, name) > limit:
            raise _Refused(f"{at}.{name}", f"must be at most {limit}")
    return {
        "ca_bundle_pem": _read_certificates(section.ca_cert_files, f"{at}.ca_cert_files"),
        "insecure_skip_verify": section.skip_verify,
        "timeout_seconds": float(section.timeout or TIMEOUT_SECONDS_MAX),
        "connect_timeout_seconds": float(section.connect_timeout or TIMEOUT_SECONDS_MAX),
        "retry_limit": section.retry_limit,
    }


def _access_key(section: OSSSection, at: str) -> Credentials:
    secret = section.access_key_secret
    if not section.access_key_id and not secret.get_secret_value():
        return Anonymous()
    if not section.access_key_id or not secret.get_secret_value():
        raise _Refused(f"{at}.access_key_id", "and `access_key_secret` must be set together")
    return AccessKey(section.access_key_id, _one_line(secret, f"{at}.access_key_secret"))


def _registry_credentials(section: RegistrySection, at: str) -> Credentials:
    """Prefer user and password where both are given: they outlive any token."""
    if section.auth is not None and section.auth.get_secret_value():
        try:
            decoded = base64.b64decode(section.auth.get_secret_value(), validate=True).decode()
        except (binascii.Error, ValueError):
            decoded = ""
        username, colon, password = decoded.partition(":")
        if not colon or not username:
            raise _Refused(f"{at}.auth", "must be the base64 form of 'user:password'")
        return BasicAuth(username, SecretStr(password))
    if section.registry_token is not None and section.registry_token.get_secret_value():
        return BearerToken(_one_line(section.registry_token, f"{at}.registry_token"))
    return Anonymous()


def _one_line(secret: SecretStr, field: str) -> SecretStr:
    """Refuse what could not be sent in a header, such as the newline of a careless `echo`."""
    if not secret.get_secret_value().isprintable():
        raise _Refused(field, "must not have line breaks or control characters")
    return secret


def _authority(value: str, field: str) -> str:
    match = _AUTHORITY.fullmatch(_not_empty(value, field))
    if match is None or (match[2] is not None and not 1 <= int(match[2]) <= 65535):
        raise _Refused(field, "must be a host name or address, with ':port' where needed")
    return value


def _is_address(authority: str) -> bool:
    """Whether the host is an IP address, which no bucket can be put before."""
    host = authority.rpartition(":")[0] if re.search(r":[0-9]+$", authority) else authority
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _scheme(scheme: str, at: str) -> str:
    if scheme not in ("http", "https"):
        raise _Refused(f"{at}.scheme", "must be 'http' or 'https'")
    return scheme


def _not_empty(value: str, field: str) -> str:
    if not value:
        raise _Refused(field, "must not be empty")
    return value


def _read_certificates(paths: Sequence[str], field: str) -> str:
    bundle = []
    for path in paths:
        try:
            pem = _read_file(path, f"the file '{path}'").decode()
        except UnicodeDecodeError:
            pem = ""
        except ConfigError as error:
            raise _Refused(field, f"cannot be used: {error}") from None
        if len(pem) > FILE_SIZE_BYTES_MAX or "-----BEGIN CERTIFICATE-----" not in pem:
            raise _Refused(field, f"must name PEM certificates, which '{path}' is not")
        bundle.append(pem.rstrip("\n") + "\n")
    return "".join(bundle)


def _read_file(path: str | os.PathLike[str], what: str) -> bytes:
    """Return a regular file's first bytes, one more than allowed so that callers can tell."""
    try:
        # Without O_NONBLOCK a FIFO would keep us waiting for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{what} must be a regular file")
            return _read_up_to(descriptor, FILE_SIZE_BYTES_MAX + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "its path is not one"
        raise ConfigError(f"{what} cannot be read: {problem}") from None


def _read_up_to(descriptor: int, length: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < length and (piece := os.read(descriptor, length - len(pieces))):
        pieces += piece
    return bytes(pieces)
