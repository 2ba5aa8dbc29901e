"""
Which configs are surely gone. Bytes are deleted on this word, so absence from one LIST is not it.

A config is gone when a watch told of its deletion and a LIST agrees, or when LISTs at least
`confirm_seconds` apart both lack it. A LIST that has it settles the matter the other way.
"""

from collections.abc import Iterable

UIDS_MAX = 4096
# Agents delete orphans after a day by themselves; then the word is of no more use.
KEPT_SECONDS = 26 * 3600.0


class Deletions:
    """
    Remembers absences within one leadership.

    Args:
        confirm_seconds: Time between the two LISTs.
    """

    def __init__(self, confirm_seconds: float) -> None:
        self._confirm_seconds = confirm_seconds
        self._listed: set[str] = set()
        self._absent_since: dict[str, float] = {}
        self._witnessed: dict[str, None] = {}

    def witness(self, uid: str) -> None:
        """Take note of a watch's DELETED event."""
        self._witnessed[uid] = None
        while len(self._witnessed) > UIDS_MAX:
            self._witnessed.pop(next(iter(self._witnessed)))

    def is_witnessed(self, uid: str) -> bool:
        """Say whether a watch told of the deletion."""
        return uid in self._witnessed

    def observe_list(self, uids: Iterable[str], reported: Iterable[str], now: float) -> None:
        """
        Take note of a complete LIST.

        Args:
            uids: What it has.
            reported: What agents have bytes of; some may be from before this leadership.
            now: When the LIST was complete.
        """
        listed = set(uids)
        for uid in (self._listed | set(reported)) - listed:
            self._absent_since.setdefault(uid, now)
        for uid in listed:
            self._absent_since.pop(uid, None)
            self._witnessed.pop(uid, None)
        self._listed = listed
        kept = [
            (uid, since) for uid, since in self._absent_since.items() if now - since < KEPT_SECONDS
        ]
        # The newest, for the oldest have had the longest time to be acted upon.
        self._absent_since = dict(sorted(kept, key=lambda item: item[1])[-UIDS_MAX:])

    def confirmed(self, now: float) -> frozenset[str]:
        """Return the uids that are gone, `now` being the time of the latest LIST."""
        return frozenset(
            uid
            for uid, since in self._absent_since.items()
            if uid in self._witnessed or now - since >= self._confirm_seconds
        )
