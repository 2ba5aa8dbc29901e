"""No secret reaches an error, a traceback or a log, whatever goes wrong."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable

import pytest
from pydantic import SecretStr
from tests.unit.backend.conftest import OpenBackend

from blobcache_storage.config import (
    BackendConfig,
    HTTPProxyConfig,
    OSSConfig,
    RegistryConfig,
    S3Config,
)
from blobcache_storage.credentials import AccessKey, BasicAuth, BearerToken, Credentials
from blobcache_storage.device import RangeRequest
from blobcache_storage.errors import StorageError
from blobcache_storage.testing.fault_origin import Answer, FaultOrigin, Misbehaviour
from blobcache_storage.testing.origin_guards import HeaderGuard, basic

CANARY = "CANARY7b1f"
ID = "sha256:" + "a" * 64
SIGNED = f"?X-Amz-Signature={CANARY}"

ACCESS = AccessKey("AKID", SecretStr(CANARY + "key"), SecretStr(CANARY + "session"))
LOGIN = BasicAuth("reader", SecretStr(CANARY + "password"))
TOKEN = BearerToken(SecretStr(CANARY + "token"))

CONFIGS: dict[str, Callable[[FaultOrigin], BackendConfig]] = {
    "s3": lambda o: BackendConfig(
        type="s3", s3=S3Config(o.url, "us-east-1", "bucket"), credentials=ACCESS
    ),
    "oss V4": lambda o: BackendConfig(
        type="oss",
        oss=OSSConfig(o.url, "bucket", region="cn-hangzhou", virtual_host=False),
        credentials=ACCESS,
    ),
    "oss V1": lambda o: BackendConfig(
        type="oss",
        oss=OSSConfig(o.url, "bucket", virtual_host=False, signature="V1"),
        credentials=ACCESS,
    ),
    "http-proxy": lambda o: BackendConfig(
        type="http-proxy", http_proxy=HTTPProxyConfig(o.url), credentials=LOGIN
    ),
    "bearer": lambda o: BackendConfig(
        type="http-proxy", http_proxy=HTTPProxyConfig(o.url), credentials=TOKEN
    ),
    "registry": lambda o: BackendConfig(
        type="registry", registry=RegistryConfig(o.host, "team/app", "http"), credentials=LOGIN
    ),
}

FAULTS: dict[str, Callable[[FaultOrigin], Misbehaviour]] = {
    "500": lambda o: Misbehaviour(answer=Answer(500, {}, CANARY.encode())),
    "403": lambda o: Misbehaviour(answer=Answer(403, {}, f"<Code>{CANARY}$</Code>".encode())),
    "400": lambda o: Misbehaviour(answer=Answer(400, {}, CANARY.encode())),
    "hang": lambda o: Misbehaviour(hold_head=asyncio.Event()),
    "closed": lambda o: Misbehaviour(close_before_head=True),
    "garbage": lambda o: Misbehaviour(raw=f"{CANARY}\r\n\r\n".encode()),
    "bad header": lambda o: Misbehaviour(headers={"X-Y": CANARY + "\x00"}),
    "truncated": lambda o: Misbehaviour(
        answer=Answer(200, {"ETag": '"x"'}, b"x" * 1000), truncate_after=10
    ),
    "redirect loop": lambda o: Misbehaviour(answer=Answer(307, {"Location": o.url + SIGNED})),
    "redirect to nobody": lambda o: Misbehaviour(
        answer=Answer(307, {"Location": f"http://127.0.0.1:1/x{SIGNED}"})
    ),
    "redirect to no name": lambda o: Misbehaviour(
        answer=Answer(307, {"Location": f"http://no-such-name.invalid/x{SIGNED}"})
    ),
    "redirect to metadata": lambda o: Misbehaviour(
        answer=Answer(307, {"Location": f"http://169.254.169.254/x{SIGNED}"})
    ),
    "redirect with password": lambda o: Misbehaviour(
        answer=Answer(307, {"Location": f"http://u:{CANARY}@127.0.0.1/"})
    ),
    "redirect to rubbish": lambda o: Misbehaviour(
        answer=Answer(307, {"Location": f"http://[{CANARY}"})
    ),
    "challenge": lambda o: Misbehaviour(
        answer=Answer(401, {"WWW-Authenticate": f'Bearer realm="{o.url}/t{SIGNED}"'})
    ),
    "broken challenge": lambda o: Misbehaviour(
        answer=Answer(401, {"WWW-Authenticate": f'Bearer realm="{CANARY}'})
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", CONFIGS)
async def test_no_failure_tells_a_secret(
    origin: FaultOrigin,
    open_any: OpenBackend,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    fault: str,
) -> None:
    """Messages, tracebacks and logs at the finest level are free of secrets."""
    caplog.set_level(logging.DEBUG)
    base = CONFIGS[kind](origin)
    config = BackendConfig(
        type=base.type,
        s3=base.s3,
        oss=base.oss,
        registry=base.registry,
        http_proxy=base.http_proxy,
        credentials=base.credentials,
        timeout_seconds=0.1 if fault == "hang" else 5.0,
        retry_limit=0,
    )
    backend = open_any(config)
    origin.always = FAULTS[fault](origin)
    told = []
    for ask in ("fetch", "stat"):
        try:
            if ask == "stat":
                await backend.stat(ID)
                continue
            async with await backend.fetch(ID, RangeRequest()) as stream:
                async for _ in stream:
                    pass
        except StorageError as error:
            told.append(f"{error!r} {error} {''.join(traceback.format_exception(error))}")
    assert told
    assert CANARY not in "".join(told)
    assert CANARY not in caplog.text
    assert CANARY not in f"{config} {backend!r} {vars(backend)}"


@pytest.mark.parametrize("credentials", [ACCESS, LOGIN, TOKEN], ids=["key", "login", "token"])
def test_wrong_kinds_of_credentials_are_named_not_shown(
    open_any: OpenBackend, credentials: Credentials
) -> None:
    """A configuration with credentials its backend cannot use says which kind they are."""
    config = BackendConfig(type="localfs", credentials=credentials)
    with pytest.raises(StorageError) as caught:
        open_any(config)
    assert CANARY not in str(caught.value)


async def test_a_redirect_elsewhere_carries_no_credential(
    origin: FaultOrigin, open_any: OpenBackend
) -> None:
    """Not even back at the first origin, once the way led past another."""
    origin.guard = HeaderGuard(basic("reader", CANARY + "password"))
    async with FaultOrigin() as other:
        origin.redirects = lambda request: f"{other.url}{request.raw_path}"
        other.redirects = lambda request: f"{origin.url}/again"
        with pytest.raises(StorageError):
            await open_any(CONFIGS["http-proxy"](origin)).fetch("blob", RangeRequest())
        assert [("authorization" in request.headers) for request in other.requests] == [False]
        assert [("authorization" in request.headers) for request in origin.requests] == [
            True,
            False,
        ]
