"""How large a run is: the gate's numbers, or what `make faults N=…` says.

`N` (or BLOBCACHE_FAULTS_N) is the number of power cuts, 2,000 in the gate; the other suites grow
in proportion. BLOBCACHE_FAULTS_SEED is the first seed.
"""

from __future__ import annotations

import os

GATE_CUTS = 2000


def cuts() -> int:
    """Return how many power cuts there are in all."""
    return int(os.environ.get("BLOBCACHE_FAULTS_N") or os.environ.get("N") or GATE_CUTS)


def scaled(gate: int, least: int = 1) -> int:
    """Return a count that is `gate` in the gate and grows with the number of cuts."""
    return max(least, gate * cuts() // GATE_CUTS)


def seed() -> int:
    """Return the first seed."""
    return int(os.environ.get("BLOBCACHE_FAULTS_SEED", "1"))


def timeout_seconds(gate: float) -> float:
    """Return a time-out that grows with the run: a hang must fail, a long run must not."""
    return gate * max(1.0, cuts() / GATE_CUTS)
