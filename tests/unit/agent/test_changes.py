"""The change number: it moves when it matters, and wakes who waits."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from blobcache_agent.changes import Changes, Observation


class Node:
    """What is observed, to be changed by a test."""

    def __init__(self) -> None:
        self.extra = "digest-1"
        self.configs = {"u": Observation("Applied", 1_000_000, 50)}

    def observe(self) -> tuple[str, dict[str, Observation]]:
        """Return the observations."""
        return self.extra, dict(self.configs)

    def change(self, **values: object) -> None:
        """Change the one configuration."""
        self.configs["u"] = dataclasses.replace(self.configs["u"], **values)  # type: ignore[arg-type]


@pytest.fixture
def node() -> Node:
    """A node with one configuration."""
    return Node()


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({}, False),
        ({"facts": "Failed"}, True),
        ({"bytes": 1_049_000}, False),
        ({"bytes": 1_050_000}, True),
        ({"bytes": 950_000}, True),
        ({"bytes": 0}, True),
        ({"warm_percent": 59}, False),
        ({"warm_percent": 60}, True),
        ({"warm_percent": 100}, True),
    ],
)
def test_what_moves_it(node: Node, change: dict[str, object], moves: bool) -> None:
    """States always, bytes by 5 %, warm-up by steps of 10 %."""
    changes = Changes(node.observe)
    changes.look()
    before = changes.number
    node.change(**change)
    changes.look()
    assert (changes.number != before) is moves
    again = changes.number
    changes.look()
    assert changes.number == again


def test_small_drifts_add_up(node: Node) -> None:
    """The baseline is what was last counted, not what was last seen."""
    changes = Changes(node.observe)
    changes.look()
    before = changes.number
    for size in range(1_000_000, 1_050_000, 10_000):
        node.change(bytes=size)
        changes.look()
    assert changes.number == before
    node.change(bytes=1_050_000)
    changes.look()
    assert changes.number == before + 1


def test_the_first_byte_counts(node: Node) -> None:
    """From nothing to something is a change, however small."""
    node.change(bytes=0)
    changes = Changes(node.observe)
    changes.look()
    before = changes.number
    node.change(bytes=1)
    changes.look()
    assert changes.number == before + 1


def test_configs_that_come_and_go_move_it(node: Node) -> None:
    """So does what concerns the whole node."""
    changes = Changes(node.observe)
    changes.look()
    before = changes.number
    node.configs["v"] = node.configs["u"]
    changes.look()
    del node.configs["u"]
    changes.look()
    node.extra = "digest-2"
    changes.look()
    assert changes.number == before + 3


async def test_waiting(node: Node) -> None:
    """Any number but the present one is answered at once; a change wakes all who wait."""
    changes = Changes(node.observe)
    changes.look()
    async with asyncio.timeout(5):
        await changes.wait(None, 60)
        await changes.wait(0, 60)
        await changes.wait(changes.number + 1, 60)
        waiting = [asyncio.create_task(changes.wait(changes.number, 60)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        node.extra = "digest-2"
        changes.look()
        await asyncio.gather(*waiting)
        await changes.wait(changes.number, 0.01)


async def test_closing_lets_everybody_go(node: Node) -> None:
    """A stop does not wait for long polls."""
    changes = Changes(node.observe)
    changes.look()
    async with asyncio.timeout(5):
        waiting = asyncio.create_task(changes.wait(changes.number, 60))
        await asyncio.sleep(0.01)
        changes.close()
        await waiting
        await changes.wait(changes.number, 60)
