"""The arithmetic of the benchmarks: ratios, spreads, goals and whose turn it is."""

from __future__ import annotations

import pytest
from bench.ratios import (
    Figure,
    Row,
    at_least,
    at_most,
    figure_of,
    percentile,
    ratio_of,
    turns,
)


def test_a_figure_is_the_median_with_its_spread() -> None:
    """A figure is the median with its spread."""
    assert figure_of([3.0, 1.0, 2.0]) == Figure(2.0, 1.0, 3.0, 3)
    assert figure_of([4.0, 1.0]) == Figure(2.5, 1.0, 4.0, 2)
    with pytest.raises(ValueError, match="at least one round"):
        figure_of([])


def test_each_round_has_its_own_ratio() -> None:
    """Each round has its own ratio."""
    # The second round was three times as slow for both: no ratio may show it.
    assert ratio_of([90.0, 30.0, 90.0], [100.0, 33.3333333, 100.0]).value == pytest.approx(0.9)
    # The ratio of the medians would be 1.0 here.
    assert ratio_of([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]) == Figure(1.0, 0.5, 2.0, 3)


@pytest.mark.parametrize(("mine", "other"), [([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([], [])])
def test_rounds_without_a_reference_are_refused(mine: list[float], other: list[float]) -> None:
    """Rounds without a reference are refused."""
    with pytest.raises(ValueError, match=r"must|needs"):
        ratio_of(mine, other)


@pytest.mark.parametrize(
    ("goal", "value", "is_met", "miss_percent"),
    [
        (at_least(1.0), 1.0, True, 0),
        (at_least(1.0), 0.75, False, 25),
        (at_least(0.3), 0.6, True, 0),
        (at_most(2.0), 2.0, True, 0),
        (at_most(2.0), 3.0, False, 50),
        (at_most(128.0), 64.0, True, 0),
    ],
)
def test_a_goal_says_whether_and_by_how_much(
    goal: object, value: float, is_met: bool, miss_percent: float
) -> None:
    """A goal says whether and by how much."""
    row = Row("key", "title", figure_of([value]), "x", goal)  # type: ignore[arg-type]
    assert row.is_met is is_met
    assert row.goal is not None
    assert row.goal.miss_percent(value) == pytest.approx(miss_percent)


def test_a_row_without_a_goal_has_no_verdict() -> None:
    """A row without a goal has no verdict."""
    assert Row("key", "title", figure_of([1.0]), "x").is_met is None


def test_goals_are_written_as_one_reads_them() -> None:
    """Goals are written as one reads them."""
    assert [str(at_least(0.98)), str(at_most(128.0))] == ["≥ 0.98", "≤ 128"]


def test_all_take_turns_and_another_begins_each_round() -> None:
    """All take turns and another begins each round."""
    order = list(turns(["a", "b", "c"], 4))
    assert [name for number, name in order if number == 0] == ["a", "b", "c"]
    assert [name for number, name in order if number == 1] == ["b", "c", "a"]
    assert [name for number, name in order if number == 3] == ["a", "b", "c"]
    assert [number for number, _ in order] == sorted(number for number, _ in order)


def test_percentiles() -> None:
    """A percentile is the smallest value that so many do not exceed."""
    values = [float(number) for number in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)
