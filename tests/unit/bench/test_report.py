"""What the benchmarks write: numbers, table, document, JSON and picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from bench import report
from bench.picture import advantage, position, svg
from bench.ratios import Row, at_least, at_most, figure_of

ROWS = [
    Row("a", "hits | all", figure_of([0.9, 1.1, 1.0]), "x nginx", at_least(1.0), "note"),
    Row("b", "memory <peak>", figure_of([192.0]), "MiB", at_most(128.0)),
    Row("c", "beside", figure_of([2.0, 4.0]), "x"),
]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.984, "0.98"), (12.34, "12.3"), (99.96, "100.0"), (123.4, "123")],
)
def test_numbers_have_as_many_digits_as_mean_something(value: float, text: str) -> None:
    """Numbers have as many digits as mean something."""
    assert report.number(value) == text


def test_great_numbers_are_grouped() -> None:
    """Great numbers are grouped."""
    assert report.number(83900.4) == "83,900"


def test_the_table_says_figure_spread_goal_and_verdict() -> None:
    """The table says figure spread goal and verdict."""
    lines = report.markdown(ROWS).splitlines()
    assert lines[2] == r"| hits \| all | 1.00 x nginx (0.90 to 1.10) | ≥ 1 | met | note |"
    assert lines[3] == "| memory <peak> | 192 MiB | ≤ 128 | missed by 50 % |  |"
    assert lines[4] == "| beside | 3.00 x (2.00 to 4.00) |  |  |  |"


def test_a_terminal_shows_a_line_for_each_row() -> None:
    """A terminal shows a line for each row."""
    lines = report.plain(ROWS).splitlines()
    assert [line.split("  ")[0] for line in lines] == [row.title for row in ROWS]
    assert report.plain([]) == ""


def test_json_has_all_and_says_what_failed() -> None:
    """JSON has all and says what failed."""
    document = json.loads(report.to_json(ROWS, {"date": "today"}, {"herd": "no wrk"}))
    assert document["machine"] == {"date": "today"}
    assert document["failed"] == {"herd": "no wrk"}
    assert [row["met"] for row in document["rows"]] == [True, False, None]
    assert document["rows"][0]["figure"] == {"value": 1.0, "low": 0.9, "high": 1.1, "rounds": 3}
    assert document["rows"][0]["goal"] == {"limit": 1.0, "at_least": True}


def test_a_documents_section_is_replaced_and_nothing_else() -> None:
    """A document's section is replaced and nothing else."""
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.put_between(text, "new")
    assert once == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    assert report.put_between(once, "new") == once


@pytest.mark.parametrize(
    "text",
    ["", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)],
)
def test_a_document_without_its_marks_is_refused(text: str) -> None:
    """A document without its marks is refused."""
    with pytest.raises(ValueError, match="once each"):
        report.put_between(text, "new")


def test_better_than_the_goal_is_to_the_right() -> None:
    """Better than the goal is to the right."""
    assert advantage(2.0, at_least(1.0)) == 2.0
    assert advantage(2.0, at_most(1.0)) == 0.5
    assert advantage(0.0, at_most(1.0)) == 4.0
    assert advantage(0.0, at_least(1.0)) == 0.25
    assert [position(times) for times in (0.0001, 0.25, 1.0, 4.0, 9.0)] == [0, 0, 0.5, 1, 1]


def test_the_picture_has_a_bar_for_each_goal() -> None:
    """The picture has a bar for each goal."""
    root = ET.fromstring(svg(ROWS, "A & B"))
    space = "{http://www.w3.org/2000/svg}"
    bars = root.findall(f"{space}rect")[1:]
    met, missed = (bar.get("fill") for bar in bars)
    assert met != missed
    texts = [element.text or "" for element in root.iter(f"{space}text")]
    assert any(text.startswith("memory <peak>") for text in texts)
    assert not any("beside" in text for text in texts)
