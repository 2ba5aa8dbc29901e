"""Origins that misbehave in every way of the table, end to end: `origin_rules` is the table."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import scale
from tests.faults.origin_rules import FAULTS, KINDS, STATES, Cell, all_cells
from tests.faults.worker import run_module

pytestmark = [
    pytest.mark.faults,
    pytest.mark.xdist_group("origin-faults"),
    pytest.mark.timeout(600),
]

FAULTS_MIN = 400
BYTES_CHECKED_MIN = 300 * 1000 * 1000
HITS_MIN = 400


@pytest.fixture(scope="module")
def matrix() -> dict[str, Any]:
    """One run of all cells, side by side: what is long in them is waiting."""
    found = run_module("tests.faults.origin_faults", "--seed", scale.seed(), timeout=500)
    print({key: value for key, value in found.items() if key != "stories"})  # noqa: T201
    return found


@pytest.mark.parametrize("cell", all_cells(), ids=str)
def test_cell(matrix: dict[str, Any], cell: Cell) -> None:
    """The rule for the fault held, within the requests allowed, and the blob read right again."""
    story = next(story for story in matrix["stories"] if story["cell"] == str(cell))
    again = f"python -m tests.faults.origin_faults --seed {matrix['seed']} --only '{cell}'"
    assert not story["problems"], "\n".join([*story["problems"], *story["outcomes"], again])


def test_enough_happened(matrix: dict[str, Any]) -> None:
    """Else the run is void: faults were met, bytes compared, hits served."""
    assert matrix["faults"] >= FAULTS_MIN
    assert matrix["bytes_checked"] >= BYTES_CHECKED_MIN
    assert matrix["hits"] >= HITS_MIN


def test_the_table_is_whole() -> None:
    """Each fault meets each kind of origin in each state, or says why it cannot."""
    meaningless = [reason for fault in FAULTS for reason in fault.meaningless.values()]
    assert all(meaningless)
    cells = (len(FAULTS) * len(KINDS) - len(meaningless)) * len(STATES)
    assert len(all_cells()) == cells
    assert len({str(cell) for cell in all_cells()}) == cells
