"""One set of configurations follows another, and no bad one stands in the way of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from blobcache_agent.configs import Configs
from blobcache_agent.data.catalog import NotReady, UnknownConfig
from blobcache_agent.settings import Permissions
from blobcache_agent.translate import Resource, Wanted
from blobcache_api.v1alpha1.config import BlobCacheConfigSpec
from blobcache_storage.config import ConfigV2
from blobcache_storage.credentials import Anonymous
from blobcache_storage.device import BlobInfo
from blobcache_storage.errors import ConfigError


class FakeFactory:
    """Keeps a manager (a name) per id and endpoint, and fails where it is told to."""

    def __init__(self) -> None:
        self.managers: dict[tuple[str, str], str] = {}
        self.released: list[tuple[str, str]] = []
        self.failures: dict[str, Exception] = {}
        self.opened: list[tuple[str, str]] = []
        self.checked = 0

    @staticmethod
    def key(config: ConfigV2) -> tuple[str, str]:
        """Return id and endpoint."""
        backend = config.get_backend_config().http_proxy
        assert backend is not None
        return config.id, backend.address

    async def ensure_manager(self, config: ConfigV2) -> str:
        """Return the configuration's manager."""
        if config.id in self.failures:
            raise self.failures[config.id]
        return self.managers.setdefault(self.key(config), f"manager {len(self.managers)}")

    async def release_manager(self, config: ConfigV2) -> None:
        """Forget it."""
        self.released.append(self.key(config))
        self.managers.pop(self.key(config), None)

    def new_blob_cache(self, config: ConfigV2, info: BlobInfo) -> str:
        """Return a handle."""
        self.opened.append((config.id, info.id))
        return "handle"

    def new_backend(self, _config: object, _blob_id: str) -> FakeFactory:
        """Return something that can be shut down."""
        return self

    async def shutdown(self) -> None:
        """Count."""
        self.checked += 1


@pytest.fixture
def factory() -> FakeFactory:
    """A factory without managers."""
    return FakeFactory()


@pytest.fixture
def configs(factory: FakeFactory) -> Configs:
    """Nothing in force."""
    made: Any = factory
    return Configs(made, Permissions(), "/cache")


def wanted(
    name: str,
    address: str = "http://o.example",
    uid: str = "",
    backend: dict[str, Any] | None = None,
) -> Wanted:
    """Return a configuration of namespace demo; `backend` adds to its section."""
    section = {"type": "HTTPProxy", "httpProxy": {"address": address}, **(backend or {})}
    spec = BlobCacheConfigSpec.model_validate({"backend": section})
    return Wanted(Resource("demo", name, uid or f"uid-{name}", spec), Anonymous(), digest=name)


INSECURE = {"tls": {"insecureSkipVerify": True}}


async def test_nothing_is_unknown_before_the_first_set(configs: Configs) -> None:
    """503 first, 404 once it is known what there is."""
    with pytest.raises(NotReady) as caught:
        configs.resolve("demo", "a")
    assert caught.value.reason == "NoStateApplied"
    await configs.replace([])
    with pytest.raises(UnknownConfig):
        configs.resolve("demo", "a")


async def test_a_config_opens_blobs_of_its_own(configs: Configs, factory: FakeFactory) -> None:
    """The entry says who may read and hands out handles."""
    await configs.replace([wanted("a")])
    entry = configs.resolve("demo", "a")
    assert (entry.namespace, entry.name, entry.readers) == ("demo", "a", "Namespace")
    assert entry.open("x/y") == "handle"  # type: ignore[comparison-overlap]
    assert factory.opened == [("demo/a", "x/y")]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ConfigError("no such thing"), "InvalidConfig"),
        (RuntimeError("a bug"), "InternalError"),
        (None, "InsecureTLSRefused"),
    ],
)
async def test_a_bad_one_blocks_no_other(
    configs: Configs, factory: FakeFactory, failure: Exception | None, reason: str
) -> None:
    """Its result has a reason; the others are applied, whatever the order."""
    if failure is not None:
        factory.failures["demo/bad"] = failure
    bad = wanted("bad", backend={} if failure else INSECURE)
    with structlog.testing.capture_logs():  # a traceback is read from disk to be shown
        running = await configs.replace([bad, wanted("good"), wanted("fine")])
    refusals = [item.refusal.reason if item.refusal else None for item in running]
    assert refusals == [reason, None, None]
    with pytest.raises(NotReady) as caught:
        configs.resolve("demo", "bad")
    assert caught.value.reason == reason
    assert configs.resolve("demo", "good").manager is not None


async def test_it_recovers_when_the_reason_is_gone(configs: Configs) -> None:
    """A refusal is not remembered beyond the set that met it."""
    await configs.replace([wanted("a", backend=INSECURE)])
    await configs.replace([wanted("a")])
    assert configs.resolve("demo", "a").refusal is None


async def test_a_refused_update_ends_what_ran(configs: Configs, factory: FakeFactory) -> None:
    """What a configuration no longer says is not served in its name."""
    await configs.replace([wanted("a")])
    await configs.replace([wanted("a", backend=INSECURE)])
    assert factory.released == [("demo/a", "http://o.example")]
    with pytest.raises(NotReady):
        configs.resolve("demo", "a")


async def test_the_same_again_changes_nothing(configs: Configs, factory: FakeFactory) -> None:
    """A resync keeps the manager and the entry readers hold."""
    await configs.replace([wanted("a")])
    entry = configs.resolve("demo", "a")
    manager = entry.manager
    await configs.replace([wanted("a")])
    assert configs.resolve("demo", "a") is entry
    assert entry.manager is manager
    assert factory.released == []


async def test_another_endpoint_is_another_manager(configs: Configs, factory: FakeFactory) -> None:
    """The former one is let go once the new one serves."""
    await configs.replace([wanted("a")])
    await configs.replace([wanted("a", "http://p.example")])
    assert factory.released == [("demo/a", "http://o.example")]
    assert list(factory.managers) == [("demo/a", "http://p.example")]


async def test_gone_and_made_anew(configs: Configs, factory: FakeFactory) -> None:
    """A resource of the same name with another uid is another one."""
    await configs.replace([wanted("a"), wanted("b")])
    first = configs.resolve("demo", "a")
    await configs.replace([wanted("a", uid="another")])
    assert configs.resolve("demo", "a") is not first
    with pytest.raises(UnknownConfig):
        configs.resolve("demo", "b")
    assert ("demo/b", "http://o.example") in factory.released


async def test_a_check_changes_nothing(configs: Configs, factory: FakeFactory) -> None:
    """Problems name their place; nothing is in force and nothing stays open."""
    problems = await configs.check([wanted("a"), wanted("b", backend=INSECURE)])
    assert len(problems) == 1
    assert problems[0].startswith("demo/b: ")
    assert factory.checked == 1
    assert not configs.is_applied
    assert factory.managers == {}
