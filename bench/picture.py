"""The results as a picture: how far each figure is from its goal, on one logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.ratios import Figure, Goal, Row
from bench.report import figure_text

WIDTH = 900
LABEL_WIDTH = 400
FIGURE_WIDTH = 190
LINE_HEIGHT = 24
TOP = 44
SCALE_MAX = 4.0
"""Figures so many times better or worse than their goal end at the edge."""

_OPENING = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    ' font-family="sans-serif" font-size="12" role="img">'
)
_MET, _MISSED, _INK, _FAINT = "#2a7d4f", "#b3462f", "#222222", "#999999"


def advantage(value: float, goal: Goal) -> float:
    """Return how many times better than its goal a value is; below 1 it misses it."""
    if value <= 0:
        return SCALE_MAX if not goal.at_least else 1 / SCALE_MAX
    return value / goal.limit if goal.at_least else goal.limit / value


def position(times: float) -> float:
    """Return where on the scale, from 0 (much worse) over 0.5 (the goal) to 1 (much better)."""
    bounded = min(max(times, 1 / SCALE_MAX), SCALE_MAX)
    return 0.5 + math.log(bounded) / math.log(SCALE_MAX) / 2


def svg(rows: Sequence[Row], caption: str) -> str:
    """Return a picture of those rows that have a goal."""
    shown = [row for row in rows if row.goal is not None]
    height = TOP + LINE_HEIGHT * len(shown) + 12
    lines = [
        _OPENING.format(width=WIDTH, height=height),
        f"<title>{escape(caption)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(8, 18, caption, _INK),
        _text(LABEL_WIDTH, 36, f"{SCALE_MAX:g} times worse", _FAINT),
        _text(_x(0.5), 36, "goal", _FAINT, "middle"),
        _text(_x(1.0), 36, f"{SCALE_MAX:g} times better", _FAINT, "end"),
        _line((_x(0.5), TOP - 4), (_x(0.5), height - 8), _FAINT),
    ]
    for at, row in enumerate(shown):
        assert row.goal is not None, "chosen above"
        lines += _bar(TOP + at * LINE_HEIGHT, row, row.goal)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _x(share: float) -> float:
    return LABEL_WIDTH + share * (WIDTH - LABEL_WIDTH - FIGURE_WIDTH)


def _bar(top: float, row: Row, goal: Goal) -> list[str]:
    figure = row.figure
    end = _x(position(advantage(figure.value, goal)))
    middle = _x(0.5)
    color = _MET if goal.is_met(figure.value) else _MISSED
    left, width = min(end, middle), max(abs(end - middle), 1.5)
    return [
        _text(8, top + 15, f"{row.title} ({goal} {row.unit})", _INK),
        f'<rect x="{left:.1f}" y="{top + 4:.1f}" width="{width:.1f}" height="14" fill="{color}"/>',
        *_spread(top + 11, figure, goal),
        _text(_x(1.0) + 8, top + 15, figure_text(row), color),
    ]


def _spread(y: float, figure: Figure, goal: Goal) -> list[str]:
    if figure.rounds < 2:
        return []
    ends = [_x(position(advantage(value, goal))) for value in (figure.low, figure.high)]
    return [_line((min(ends), y), (max(ends), y), _INK)]


def _text(x: float, y: float, text: str, color: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(start: tuple[float, float], end: tuple[float, float], color: str) -> str:
    ends = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {ends} stroke="{color}"/>'
