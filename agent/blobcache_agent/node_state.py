"""The desired state this node has taken, and the fence that keeps older ones out.

What is taken is durable before anything acts on it: after a crash between the two the restarted
agent acts on it, and a leader that was deposed meanwhile is refused. Secrets are not part of what
is written: after a restart they are pending until the operator pushes again.
"""

from __future__ import annotations

import asyncio

from blobcache_agent.errors import ControlRefused, StalePush
from blobcache_agent.logs import get_logger
from blobcache_agent.state_file import StateFile, StateFileCorrupt
from blobcache_api.agent import (
    PROTOCOL_VERSION,
    DesiredState,
    dump_for_disk,
    parse_state,
    state_digest,
)
from blobcache_api.v1alpha1.common import MalformedError

log = get_logger(__name__)


class NodeState:
    """The newest state taken, in memory and on disk.

    Args:
        file: Where it is kept.
        node: Name of this node; a state of another is refused, and discarded if found on disk.
    """

    def __init__(self, file: StateFile, node: str) -> None:
        self._file = file
        self._node = node
        self.current: DesiredState | None = None

    @property
    def epoch(self) -> int:
        """Of the newest state; 0 before the first."""
        return self.current.epoch if self.current else 0

    @property
    def revision(self) -> int:
        """Of the newest state; 0 before the first."""
        return self.current.revision if self.current else 0

    @property
    def digest(self) -> str:
        """Of the newest state; "" before the first."""
        return self.current.digest if self.current else ""

    def load(self) -> DesiredState | None:
        """Take what an earlier process left, and return it. Blocking; before anything else.

        Damage, another node's name and another version's words are logged and discarded: the
        operator pushes anew, and guessing might give a tenant's bytes to another.
        """
        try:
            self.current = self._read()
        except (StateFileCorrupt, MalformedError, OSError) as error:
            log.warning("Discarded the state of an earlier run", why=str(error))
            self._file.discard()
        return self.current

    def _read(self) -> DesiredState | None:
        raw = self._file.read()
        if raw is None:
            return None
        state = parse_state(raw)
        if state.node != self._node:
            raise StateFileCorrupt(f"it is of node '{state.node}'")
        return state

    async def take(self, state: DesiredState) -> DesiredState:
        """Make a pushed state the newest, durably, and return it with its digest set.

        The same state again is taken too: the credentials in it may be what was missing. Calls
        must not overlap; the caller holds a lock over this and what follows from it.

        Raises:
            StalePush: It is older, or another one of the same revision.
            ControlRefused: It is not for this agent, or could not be made durable.
        """
        if state.protocol_version > PROTOCOL_VERSION:
            raise ControlRefused(
                400,
                "ProtocolTooNew",
                f"this agent speaks protocol version {PROTOCOL_VERSION}; upgrade the agents",
            )
        if state.node != self._node:
            raise ControlRefused(
                400, "WrongNode", f"this is node '{self._node}', the state is for '{state.node}'"
            )
        if not state.digest:
            state = state.model_copy(update={"digest": state_digest(state)})
        fence = (self.epoch, self.revision)
        pushed = (state.epoch, state.revision)
        is_known = self.current is not None and pushed == fence
        if pushed < fence or (is_known and state.digest != self.digest):
            raise StalePush(self.epoch, self.revision)
        if not is_known:
            content = dump_for_disk(state)
            try:
                await asyncio.to_thread(self._file.write, content)
            except OSError as error:
                raise ControlRefused(
                    503,
                    "StateNotDurable",
                    f"the state could not be written to the cache's disk: {error.strerror}",
                ) from error
        self.current = state
        return state
