"""The arithmetic: rounds of paired measurements into one figure, its spread, and a verdict."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Detail = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure out of several rounds: the median, with the lowest and the highest round."""

    value: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Goal:
    """What DESIGN asks for; the limit itself is good enough."""

    limit: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        """Whether a value is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit

    def miss_percent(self, value: float) -> float:
        """Return by how many percent of the limit a value misses it; 0 where it does not."""
        if self.is_met(value):
            return 0.0
        return abs(value - self.limit) / self.limit * 100

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


def at_least(limit: float) -> Goal:
    """Return a goal that greater values meet."""
    return Goal(limit, at_least=True)


def at_most(limit: float) -> Goal:
    """Return a goal that smaller values meet."""
    return Goal(limit, at_least=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    key: str
    """Unique; names the row in JSON."""
    title: str
    figure: Figure
    unit: str
    """Such as "x nginx", "ms", "MiB"; shown after the figure."""
    goal: Goal | None = None
    note: str = ""
    """What stands behind the figure: absolute numbers, what went wrong."""
    details: Mapping[str, Detail] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        return None if self.goal is None else self.goal.is_met(self.figure.value)


def figure_of(values: Sequence[float]) -> Figure:
    """Return median and spread of at least one value."""
    if not values:
        raise ValueError("a figure needs at least one round")
    return Figure(statistics.median(values), min(values), max(values), len(values))


def ratio_of(measured: Sequence[float], reference: Sequence[float]) -> Figure:
    """Return the ratio of paired rounds.

    Each round's ratio is taken by itself, before the median: what slowed a round down slowed both.

    Raises:
        ValueError: The rounds are not paired, or a reference measured nothing.
    """
    if len(measured) != len(reference):
        raise ValueError("each round needs its reference")
    if any(value <= 0 for value in reference):
        raise ValueError("a reference must have measured something")
    return figure_of([mine / other for mine, other in zip(measured, reference, strict=True)])


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, name) such that all take turns, and who goes first changes each round."""
    for number in range(rounds):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            yield number, name


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that so many percent of the values do not exceed."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
