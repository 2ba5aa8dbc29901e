"""Results as JSON, and as the Markdown table that docs/performance.md shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from bench.ratios import Row

BEGIN = "<!-- written by `python -m bench --docs`: begin -->"
END = "<!-- written by `python -m bench --docs`: end -->"


def number(value: float) -> str:
    """Return a number with as many digits as mean something."""
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}"
    if magnitude >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"


def verdict(row: Row) -> str:
    """Return in a word or two what the goal says."""
    if row.goal is None:
        return ""
    if row.is_met:
        return "met"
    percent = row.goal.miss_percent(row.figure.value)
    return f"missed by {percent:.0f} %" if percent >= 1 else f"missed by {percent:.1f} %"


def figure_text(row: Row) -> str:
    """Return figure and unit, with the spread where there were several rounds."""
    figure = row.figure
    text = f"{number(figure.value)} {row.unit}"
    if figure.rounds > 1:
        text += f" ({number(figure.low)} to {number(figure.high)})"
    return text


def markdown(rows: Sequence[Row]) -> str:
    """Return the table."""
    lines = ["| what | figure (spread) | goal | | behind it |", "|---|---|---|---|---|"]
    for row in rows:
        goal = str(row.goal) if row.goal else ""
        cells = (row.title, figure_text(row), goal, verdict(row), row.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plain(rows: Sequence[Row]) -> str:
    """Return the table for a terminal."""
    cells = [(row.title, figure_text(row), str(row.goal or ""), verdict(row)) for row in rows]
    widths = [max((len(line[at]) for line in cells), default=0) for at in range(3)]
    return "\n".join(
        "  ".join(
            (*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3])
        )
        for line in cells
    )


def to_json(rows: Sequence[Row], machine: Mapping[str, str], failed: Mapping[str, str]) -> str:
    """Return everything that was measured."""
    document = {
        "machine": dict(machine),
        "rows": [{**asdict(row), "met": row.is_met} for row in rows],
        "failed": dict(failed),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def facts(machine: Mapping[str, str]) -> str:
    """Return the machine as a Markdown list."""
    return "".join(f"- {name}: {value}\n" for name, value in machine.items())


def put_between(text: str, section: str) -> str:
    """Return a document with the section between the two marks replaced.

    Raises:
        ValueError: The marks are not there, once each and in order.
    """
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended or BEGIN in after or END in after:
        raise ValueError("the document must hold the marks of the table once each")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"
