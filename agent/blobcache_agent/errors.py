"""The errors of the agent.

The tree::

    AgentError
    ├── StartError          the process cannot start or go on: printed, exit 1
    ├── UsageError          a flag, variable or file must be changed: printed, exit 2
    ├── StalePush           a push older than what was taken: 409
    ├── Refusal             one configuration cannot be used; the others are not affected
    └── ControlRefused      a control request that is not answered: an HTTP status and a reason
"""

from __future__ import annotations

from collections.abc import Sequence


class AgentError(Exception):
    """Base of the agent's own errors; the message never holds a secret."""


class StartError(AgentError):
    """The agent cannot run; the message says what must change on this machine."""

    exit_code = 1


class UsageError(AgentError):
    """What the user wrote cannot be used; one line for each thing that must change."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class StalePush(AgentError):
    """A pushed state is older than the newest one taken, which `epoch` and `revision` name."""

    def __init__(self, epoch: int, revision: int) -> None:
        super().__init__(f"a state of epoch {epoch}, revision {revision} has been taken already")
        self.epoch = epoch
        self.revision = revision


class Refusal(AgentError):
    """One configuration cannot be used, and why: `reason` is a condition's CamelCase word."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class ControlRefused(AgentError):
    """A control request is refused with an HTTP status, a CamelCase code and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
