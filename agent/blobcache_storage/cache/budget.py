"""Who may use how much disk: bytes are reserved before they are written.

A `Budget` counts what is present, what is reserved for fetches under way, and what was unlinked
but is still open: the file system gives that back only at the last close. Budgets form two
levels, one per configuration below one per root, and a reservation holds in both or in neither.
All calls belong to the event loop's thread and none waits.
"""

from __future__ import annotations

DISK_BLOCK_BYTES = 4096
"""Files are counted in blocks of this size, as most file systems allot them."""


def on_disk(length: int) -> int:
    """Return how much disk `length` bytes take."""
    return -(-length // DISK_BLOCK_BYTES) * DISK_BLOCK_BYTES


class RootBudget:
    """What all configurations of one root may use together.

    Args:
        capacity_bytes: Upper bound of all usage; None has no bound but the disk.
        min_free_bytes: How much of the file system is left to others.
    """

    def __init__(self, capacity_bytes: int | None, min_free_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.min_free_bytes = min_free_bytes
        self.used_bytes = 0
        self.free_bytes = 0
        """Free space when last looked at, less what is reserved and not written yet."""
        self.unwritten_bytes = 0
        """Reserved for chunks that are on their way."""

    def observe_free(self, free_bytes: int) -> None:
        """Take a fresh reading of the file system's free space.

        What is reserved and not written yet is not missing there, and is not free either.
        """
        self.free_bytes = free_bytes - self.unwritten_bytes

    @property
    def excess_bytes(self) -> int:
        """How many bytes must go for capacity and floor to hold; 0 if both do."""
        over = self.min_free_bytes - self.free_bytes
        if self.capacity_bytes is not None:
            over = max(over, self.used_bytes - self.capacity_bytes)
        return max(0, over)

    def has_room(self, length: int) -> bool:
        """Whether `length` more bytes keep the capacity and the floor."""
        if self.capacity_bytes is not None and self.used_bytes + length > self.capacity_bytes:
            return False
        return self.free_bytes - length >= self.min_free_bytes

    def take(self, length: int) -> None:
        """Count bytes as used, whether or not there is room."""
        self.used_bytes += length
        self.free_bytes -= length

    def give_back(self, length: int) -> None:
        """Count bytes as no longer used."""
        assert length <= self.used_bytes, "more bytes given back than were taken"
        self.used_bytes -= length
        self.free_bytes += length


class ConfigBudget:
    """What one configuration may use, within what its root may."""

    def __init__(self, root: RootBudget, capacity_bytes: int | None = None) -> None:
        self._root = root
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0

    def fits(self, length: int) -> bool:
        """Whether the configuration's own capacity has room for `length` more bytes."""
        return self.capacity_bytes is None or self.used_bytes + length <= self.capacity_bytes

    def reserve(self, length: int) -> bool:
        """Reserve bytes, or change nothing and return False; each byte is to be settled."""
        if not self.fits(length) or not self._root.has_room(length):
            return False
        self.take(length)
        self._root.unwritten_bytes += length
        return True

    def settle(self, length: int) -> None:
        """Note that reserved bytes were written, or will not be."""
        assert length <= self._root.unwritten_bytes, "more bytes settled than were reserved"
        self._root.unwritten_bytes -= length

    def take(self, length: int) -> None:
        """Count bytes that are there already."""
        self.used_bytes += length
        self._root.take(length)

    def adopt(self, length: int) -> None:
        """Count bytes found on disk at start, which free space already lacks."""
        self.used_bytes += length
        self._root.used_bytes += length

    def give_back(self, length: int) -> None:
        """Return a reservation, or bytes that are gone from the disk."""
        assert length <= self.used_bytes, "more bytes given back than were taken"
        self.used_bytes -= length
        self._root.give_back(length)
