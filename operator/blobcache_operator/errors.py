"""
What can go wrong at the operator's edges.

OperatorError
├── KubeError                 the API server said no, or nothing
│   ├── KubeUnavailable       no answer, 5xx, 401, or 429 after the retries; try again later
│   ├── NotFound              404
│   ├── Conflict              409: somebody else was faster
│   ├── Gone                  410: a page token or a watch is too old; list again
│   └── Forbidden             403: the operator lacks a right
├── AgentError                one agent did not do what was asked; `reason` is CamelCase
│   └── StateOutdated         it has a newer state of this leader
├── NewerLeader               an agent knows a higher epoch than ours
├── SecretUnusable            a certificate's Secret is not ours to use; somebody must delete it
├── LeadershipLost            the Lease is somebody else's, or could not be renewed in time
└── SettingsError             the command line or the environment asks for something impossible
"""


class OperatorError(Exception):
    """The root of the tree above."""


class KubeError(OperatorError):
    """
    The API server refused a request.

    Args:
        status: HTTP status; 0 when there was no answer.
        reason: Kubernetes' machine-readable reason, or a CamelCase word of ours.
        message: For people.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class KubeUnavailable(KubeError):
    """There was no usable answer; the same request may work later."""


class NotFound(KubeError):
    """The object, its namespace or its kind does not exist."""


class Conflict(KubeError):
    """The object exists already, or changed since it was read."""


class Gone(KubeError):
    """A continue token or resource version is too old."""


class Forbidden(KubeError):
    """The operator's account may not do this."""


class AgentError(OperatorError):
    """
    One agent could not be asked, or answered nonsense.

    Args:
        reason: CamelCase, from a closed set; used in status and as a metric label.
        message: For people; never holds what an agent sent beyond 200 characters.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class StateOutdated(AgentError):
    """
    An agent has accepted a later revision of this very epoch.

    An answer was lost, or the conversation is new and the agent has a past: its pod was replaced
    and found the state on the node's disk.

    Args:
        revision: The agent's revision.
    """

    def __init__(self, revision: int) -> None:
        super().__init__("StateOutdated", "The agent has a newer state of this leader.")
        self.revision = revision


class NewerLeader(OperatorError):
    """
    An agent has accepted a state of a higher epoch.

    Args:
        epoch: The agent's epoch.
    """

    def __init__(self, epoch: int) -> None:
        super().__init__(f"an agent follows epoch {epoch}")
        self.epoch = epoch


class SecretUnusable(OperatorError):
    """A Secret of a certificate's name holds something else; the message says what to do."""


class LeadershipLost(OperatorError):
    """This process may not act any more."""


class SettingsError(OperatorError):
    """A setting cannot be used; the message says what to write instead."""
