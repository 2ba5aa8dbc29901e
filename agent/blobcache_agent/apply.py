"""Acting on what the operator says: apply a state, report, evict.

The order of an apply: fence and persist, permitted addresses and readers' keys, configurations,
tombstones. Addresses come before configurations, so that nothing is dialled that was denied in the
same breath; deletion comes last, when nobody is served from those bytes any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from blobcache_agent.changes import Changes
from blobcache_agent.configs import Configs, Running
from blobcache_agent.errors import Refusal
from blobcache_agent.evictions import evict
from blobcache_agent.logs import get_logger
from blobcache_agent.node_state import NodeState
from blobcache_agent.report import Figures, Identity, build_report, observe
from blobcache_agent.translate import Resource, Wanted, to_engine
from blobcache_api.agent import (
    ApplyResult,
    ConfigResult,
    DesiredState,
    EvictionRequest,
    EvictionResponse,
    PushedConfig,
    Report,
)
from blobcache_api.pushed_credentials import CredentialsState
from blobcache_storage.backend.connector import AddressPolicy
from blobcache_storage.cache.root import CacheRoot
from blobcache_storage.credentials import Anonymous, Credentials, Pending

MESSAGE_CHARS_MAX = 1024

log = get_logger(__name__)


class ReaderKeys(Protocol):
    """Verifies readers' tokens by the cluster's keys."""

    def set_keys(self, jwks: Mapping[str, object], issuer: str) -> None:
        """Take these keys, and no others, from now on.

        Raises:
            ValueError: They cannot be used; the old ones stay.
        """


class ClusterNode:
    """One node as the operator sees it.

    Args:
        identity: Who reports.
        state: The newest state.
        configs: The configurations in force.
        figures: What reports show.
        root: The cache root.
        policy: Which addresses origins may have.
        keys: Verifies readers.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        state: NodeState,
        configs: Configs,
        figures: Figures,
        root: CacheRoot,
        policy: AddressPolicy,
        keys: ReaderKeys,
    ) -> None:
        self._identity = identity
        self._state = state
        self._configs = configs
        self._figures = figures
        self._root = root
        self._policy = policy
        self._keys = keys
        self._is_restored = False
        self._applying = asyncio.Lock()
        self.changes = Changes(
            lambda: observe(self._figures, self._state, restored=self._is_restored)
        )

    async def restore(self) -> None:
        """Act on the state an earlier process took, if it left one."""
        state = await asyncio.to_thread(self._state.load)
        if state is None:
            log.info("Found no state of an earlier run; the operator will push one")
            return
        self._is_restored = True
        async with self._applying:
            await self._act(state)
        log.info(
            "Restored the state of an earlier run",
            epoch=state.epoch,
            revision=state.revision,
            configs=len(state.configs),
        )

    async def apply(self, state: DesiredState) -> ApplyResult:
        """Take a state and act on it.

        An apply that began goes on when its client has left, lest half a state be in force.

        Raises:
            StalePush: It is older than what was taken.
            ControlRefused: It cannot be taken.
        """
        return await asyncio.shield(asyncio.create_task(self._apply(state), name="apply-state"))

    async def _apply(self, pushed: DesiredState) -> ApplyResult:
        async with self._applying:
            state = await self._state.take(pushed)
            self._is_restored = False
            running = await self._act(state)
        self.changes.look()
        results = tuple(_result(item) for item in running)
        log.info(
            "Applied a state",
            epoch=state.epoch,
            revision=state.revision,
            digest=state.digest,
            configs=len(results),
            refused=sum(not result.applied for result in results),
            tombstones=len(state.tombstones),
        )
        return ApplyResult(
            epoch=state.epoch, revision=state.revision, digest=state.digest, configs=results
        )

    async def _act(self, state: DesiredState) -> Sequence[Running]:
        self._policy.replace_denied(state.denied_addresses)
        self._take_keys(state)
        running = await self._configs.replace([_wanted(config) for config in state.configs])
        wanted = {config.uid for config in state.configs}
        for uid in state.tombstones:
            if uid not in wanted:
                await self._root.delete_config(uid)
        return running

    def _take_keys(self, state: DesiredState) -> None:
        if not state.jwks and not state.issuer:
            return  # the operator does not know them yet; readers wait or use the known ones
        try:
            self._keys.set_keys(state.jwks, state.issuer)
        except ValueError as error:
            # Configurations must not wait for the cluster's keys to be mended.
            log.warning("Kept the former keys of readers' tokens", why=str(error))

    async def report(self, after: int | None, wait_seconds: float) -> Report:
        """Return a report, when its change number is no longer `after` or the time is up."""
        await self.changes.wait(after, wait_seconds)
        await self._figures.refresh()
        return build_report(
            self._identity,
            self._state,
            self._figures,
            change=self.changes.number,
            restored=self._is_restored,
        )

    async def evict(self, request: EvictionRequest) -> EvictionResponse:
        """Evict what is still as it was when it was decided."""
        response = await evict(request, self._configs, self._root)
        self.changes.look()
        return response


def _wanted(config: PushedConfig) -> Wanted:
    resource = Resource(
        namespace=config.namespace, name=config.name, uid=config.uid, spec=config.spec
    )
    return Wanted(resource, _credentials(config), config.digest)


def _credentials(config: PushedConfig) -> Credentials:
    if config.credentials is not None:
        return to_engine(config.credentials)
    if config.credentials_state is CredentialsState.NOT_REQUIRED:
        return Anonymous()
    return Pending()


def _result(running: Running) -> ConfigResult:
    refusal: Refusal | None = running.refusal
    return ConfigResult(
        namespace=running.namespace,
        name=running.name,
        uid=running.uid,
        applied=refusal is None,
        reason=refusal.reason if refusal else None,
        message=refusal.message[:MESSAGE_CHARS_MAX] if refusal else "",
        digest="" if refusal else running.wanted.digest,
    )
