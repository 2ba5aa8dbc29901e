"""What breaks around the operator costs what broke, and nothing else; then it heals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.integration.operator_stage import (  # noqa: F401 - fixtures
    Stage,
    plane_fixture,
    stage_fixture,
    until,
    until_true,
)
from tests.integration.operator_twin import GIB

from blobcache_api.v1alpha1.config import BlobCacheConfigStatus
from blobcache_operator import errors, facts, loop
from blobcache_operator.kube import Kube
from blobcache_operator.reconcile import Plan, reconcile
from blobcache_operator.snapshot import ConfigFacts

pytestmark = [pytest.mark.control_plane, pytest.mark.timeout(180)]

IDLE_SECONDS = 20.0
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("mad", "AgentNonsense"),
        ("thief", "AgentNonsense"),
        ("refusing", "StateRefused"),
        ("dead", "AgentUnreachable"),
    ],
)
async def test_a_broken_agent_is_named_and_delays_nobody(
    stage: Stage,
    mood: str,
    reason: str,
) -> None:
    """The others run the config; the broken one is counted with its reason, and later heals."""
    good, bad = await stage.add_node("good"), await stage.add_node("bad")
    bad.mood = mood
    async with stage.operator(), contextlib.AsyncExitStack() as stack:
        await until_true(lambda: (stage.tls / "tls.key").exists())
        await stack.enter_async_context(good.serving(stage.tls))
        if mood != "dead":
            await stack.enter_async_context(bad.serving(stage.tls))
        await stage.apply("models")
        degraded = await stage.condition("models", "Degraded", "True", reason)
        assert "'bad'" in degraded["message"]
        await until_true(lambda: good.names == {"models"})
        await until(lambda: _summary_is(stage, "1/2"))
        status = await stage.status("models")
        assert status["nodes"]["failed"] == 1
        assert status["nodes"]["failures"][0]["node"] == "bad"
        if mood == "dead":
            await stack.enter_async_context(bad.serving(stage.tls))
        bad.mood = "well"
        await stage.condition("models", "Degraded", "False")
        await stage.condition("models", "Ready", "True")
        await until(lambda: _summary_is(stage, "2/2"))


async def _summary_is(stage: Stage, summary: str) -> bool:
    return bool((await stage.status("models"))["nodes"]["summary"] == summary)


async def test_one_configs_poison_costs_the_others_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its status, nor a whole pass that breaks, ends the operator."""
    real, broken_passes = loop.roll_up, [2]

    def roll_up(config: ConfigFacts, *arguments: Any, **named: Any) -> BlobCacheConfigStatus:
        if config.name == "poison":
            raise ValueError("nobody foresaw this")
        return real(config, *arguments, **named)

    def reconcile_or_break(*arguments: Any, **named: Any) -> Plan:
        if broken_passes[0] > 0:
            broken_passes[0] -= 1
            raise KeyError("nor this")
        return reconcile(*arguments, **named)

    monkeypatch.setattr(loop, "roll_up", roll_up)
    monkeypatch.setattr(loop, "reconcile", reconcile_or_break)
    await stage.add_node("one")
    async with stage.running():
        await stage.apply("poison")
        await stage.apply("fine")
        await stage.condition("fine", "Ready", "True")
        assert broken_passes == [0]
        assert await stage.status("poison") == {}


async def test_a_hanging_agent_delays_nobody(stage: Stage) -> None:
    """While one agent swallows every request, the other gets each change within seconds."""
    good, bad = await stage.add_node("good"), await stage.add_node("bad")
    bad.mood = "slow"
    async with stage.running():
        for number in range(3):
            start = time.monotonic()
            await stage.apply(f"models-{number}")
            await until_true(lambda name=f"models-{number}": name in good.names)  # type: ignore[misc]
            assert time.monotonic() - start < 5
        await stage.condition("models-2", "Degraded", "True", "AgentTimeout")


async def test_a_restarted_operator_has_a_higher_epoch(stage: Stage) -> None:
    """Killed without a word, its successor outbids the epoch and changes nothing else."""
    twin = await stage.add_node("one")
    async with contextlib.AsyncExitStack() as stack:
        killed = await _start_process(stage)
        await stage.serve_twins(stack)
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        first = twin.state
        assert first is not None
        os.kill(killed.pid, signal.SIGKILL)
        await killed.wait()
        before = await stage.status("models")
        async with stage.operator():
            await until_true(lambda: twin.epoch > first.epoch)
            await stage.apply("more")
            await stage.condition("more", "Ready", "True")
            assert twin.state is not None
            assert twin.config("models").digest == first.configs[0].digest
            assert (await stage.status("models")) == before


async def _start_process(stage: Stage) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "blobcache_operator",
        f"--namespace={stage.system}", f"--kubeconfig={stage.plane.admin_kubeconfig}",
        f"--write-agent-certs={stage.tls}", "--health-listen=127.0.0.1:0", "--lease-seconds=3",
        *[f"--agent={twin.node}={twin.url}" for twin in stage.twins.values()],
        cwd=ROOT, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip


async def test_of_two_operators_one_leads_and_the_other_follows(stage: Stage) -> None:
    """A standby writes nothing; when the leader goes in order it takes over at once."""
    twin = await stage.add_node("one")
    async with contextlib.AsyncExitStack() as stack:
        first = await _start_process(stage)
        await stage.serve_twins(stack)
        await until_true(lambda: twin.states)
        holder = (await stage.lease())["spec"]["holderIdentity"]
        async with stage.operator():
            await asyncio.sleep(4)
            assert (await stage.lease())["spec"]["holderIdentity"] == holder
            epoch = twin.epoch
            first.terminate()
            assert await first.wait() == 0
            await until_true(lambda: twin.epoch > epoch, seconds=10)
            await stage.apply("models")
            await stage.condition("models", "Ready", "True")


async def test_a_deleted_lease_is_made_again(stage: Stage) -> None:
    """Deleting the Lease disturbs nothing: the leader goes on, or leads anew."""
    twin = await stage.add_node("one")
    async with stage.running():
        await until_true(lambda: twin.states)
        await stage.kube.delete(stage.lease_path)
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        await until(lambda: _lease_is_held(stage))


async def _lease_is_held(stage: Stage) -> bool:
    try:
        return bool((await stage.lease())["spec"]["holderIdentity"])
    except errors.NotFound:
        return False


async def test_a_stolen_lease_stops_the_leader_until_it_expires(stage: Stage) -> None:
    """Another holder's Lease is respected; once it is not renewed the operator leads anew."""
    twin = await stage.add_node("one")
    async with stage.running():
        await until_true(lambda: twin.states)
        epoch = twin.epoch
        theft = {"spec": {"holderIdentity": "thief", "renewTime": "2026-01-01T00:00:00.000000Z"}}
        await stage.kube.merge_patch(stage.lease_path, theft)
        await until_true(lambda: twin.epoch > epoch)
        assert "operator" in (await stage.lease())["spec"]["holderIdentity"]


async def test_an_agent_with_a_higher_epoch_is_outbid(stage: Stage) -> None:
    """The operator steps aside and comes back above it."""
    twin = await stage.add_node("one")
    ahead = int(time.time() * 1_000_000) + 3600 * 1_000_000
    twin.epoch = ahead
    async with stage.running():
        await until_true(lambda: twin.states)
        assert twin.epoch > ahead


async def test_an_absurd_epoch_locks_nobody_out(stage: Stage) -> None:
    """An agent that claims an epoch of the far future is its own problem."""
    good, bad = await stage.add_node("good"), await stage.add_node("bad")
    bad.epoch = 2**62
    async with stage.running():
        await stage.apply("models")
        await stage.condition("models", "Degraded", "True", "AgentNonsense")
        assert good.names == {"models"}
        assert good.epoch < 2**60


async def test_a_restarted_api_server_is_come_back_to(stage: Stage) -> None:
    """After an outage longer than the Lease, changes reach agents again."""
    twin = await stage.add_node("one")
    async with stage.running():
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        await asyncio.to_thread(stage.plane.stop_apiserver)
        await asyncio.sleep(4)
        assert twin.names == {"models"}
        await asyncio.to_thread(stage.plane.start_apiserver)
        await until(lambda: _applies(stage, "more"))
        await stage.condition("more", "Ready", "True")
        assert twin.names == {"models", "more"}


async def _applies(stage: Stage, name: str) -> bool:
    try:
        await stage.apply(name)
    except errors.KubeError as error:
        return error.status == 409
    return True


async def test_a_wrong_empty_list_empties_no_node(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One LIST without the configs changes nothing; nor do several within the time to confirm."""
    twin = await stage.add_node("one")
    list_all = Kube.list_all
    is_blind = False

    async def list_nothing(self: Kube, path: str, **arguments: Any) -> Any:
        if is_blind and path == facts.CONFIGS_PATH:
            return []
        return await list_all(self, path, **arguments)

    async with stage.running(drop_confirm_seconds=3.0):
        await stage.apply("models")
        await stage.condition("models", "Ready", "True")
        monkeypatch.setattr(Kube, "list_all", list_nothing)
        is_blind = True
        await asyncio.sleep(2)
        assert twin.names == {"models"}
        is_blind = False
        await asyncio.sleep(2)
        is_blind = True
        await asyncio.sleep(2)
        assert twin.names == {"models"}
        # What stays so for long enough is believed, and the bytes are let go.
        await until_true(lambda: twin.names == set())
        is_blind = False
        await until_true(lambda: twin.names == {"models"})


async def test_an_idle_system_writes_nothing_but_the_lease(stage: Stage) -> None:
    """With traffic but no change worth telling, the API server is left alone."""
    twins = [await stage.add_node(name) for name in ("one", "two")]
    async with stage.running():
        for name in ("a", "b"):
            await stage.apply(name, {"cache": {"capacity": "10Gi"}})
        for twin in twins:
            twin.figures["a"] = {"bytes": 5 * GIB, "blobs": 3}
            twin.touch()
        await stage.condition("b", "Ready", "True")
        await asyncio.sleep(4)
        before = await stage.count_writes()
        for second in range(int(IDLE_SECONDS)):
            for twin in twins:
                twin.figures["a"] = {
                    "bytes": 5 * GIB + second * 1024, "blobs": 3, "requests": second * 100,
                }  # fmt: skip
                twin.touch()
            await asyncio.sleep(1)
        after = await stage.count_writes()
        changed = {
            name: after[name] - before.get(name, 0.0)
            for name in after
            if after[name] != before.get(name, 0.0)
        }
        # The API server renews a Lease of its own identity as well.
        assert set(changed) == {"leases"}, changed
        assert changed["leases"] > IDLE_SECONDS / 2


async def test_health_and_readiness_of_a_standby(stage: Stage) -> None:
    """A replica that does not lead is alive and ready."""
    import socket

    import aiohttp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with stage.operator():
        await until(lambda: _lease_is_held(stage))
        async with (
            stage.operator(health_listen=f"127.0.0.1:{port}"),
            aiohttp.ClientSession() as session,
        ):

            async def is_ready() -> bool:
                try:
                    async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
                        return answer.status == 200
                except aiohttp.ClientError:
                    return False

            await until(is_ready)
            async with session.get(f"http://127.0.0.1:{port}/healthz") as answer:
                assert answer.status == 200
            async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
                assert "blobcache_operator_leading" in await answer.text()
