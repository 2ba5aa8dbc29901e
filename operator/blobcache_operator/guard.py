"""
A second look before a node loses most of its configs.

A LIST that is wrong once (a stale cache, a restored etcd) must not empty nodes. Losses that are
explained do not count: a watch told of the deletion, or the config is listed and simply no longer
selects the node.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loss:
    """What a plan would take from a node."""

    known: int
    unexplained: int

    @property
    def is_suspicious(self) -> bool:
        """Whether more than half would go without an explanation."""
        return self.unexplained * 2 > self.known


class DropGuard:
    """
    Remembers since when nodes would lose most of their configs.

    Args:
        confirm_seconds: Time between the two LISTs that must agree.
    """

    def __init__(self, confirm_seconds: float) -> None:
        self._confirm_seconds = confirm_seconds
        self._since: dict[str, float] = {}

    def permits(self, node: str, loss: Loss, list_time: float) -> bool:
        """
        Say whether a plan may be pushed.

        Args:
            node: The node's name.
            loss: What it would lose.
            list_time: When the LIST behind the plan was complete.
        """
        if not loss.is_suspicious:
            self._since.pop(node, None)
            return True
        since = self._since.setdefault(node, list_time)
        return list_time - since >= self._confirm_seconds

    @property
    def held(self) -> int:
        """How many nodes are held back."""
        return len(self._since)
