"""Alerts and dashboard name metrics that the programs really have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml

from blobcache_agent import metrics as agent_metrics
from blobcache_operator import metrics as operator_metrics

CHART = Path(__file__).resolve().parents[3] / "charts" / "blobcache"
NAME = re.compile(r"\bblobcache_(?:agent|operator)_[a-z0-9_]+")


def _known() -> set[str]:
    """Every sample name of both programs."""
    assert operator_metrics.LEADING is not None
    names = set()
    for family in prometheus_client.REGISTRY.collect():
        names.add(family.name)
        names |= {sample.name for sample in family.samples}
        if family.type == "counter":
            names.add(f"{family.name}_total")
        if family.type == "histogram":
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    for figure in agent_metrics._FIGURES:
        end = "_total" if figure.is_counter else ""
        names.add(f"{agent_metrics.PREFIX}config_{figure.name}{end}")
    # The node's figures need a cache to be collected; their names stand in the collector.
    source = Path(agent_metrics.__file__).read_text()
    names |= {
        f"{agent_metrics.PREFIX}{name}" for name in re.findall(r'"([a-z]+_[a-z_]+)": \(', source)
    }
    names.add(f"{agent_metrics.PREFIX}config_applied")
    return names


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((CHART / "alerts" / "blobcache.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _expressions() -> list[tuple[str, str]]:
    dashboard = json.loads((CHART / "dashboards" / "blobcache.json").read_text())
    found = [(rule["alert"], rule["expr"]) for rule in _rules()]
    for panel in dashboard["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel["targets"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found.append((variable["name"], variable["definition"]))
    return found


@pytest.mark.parametrize(("title", "expression"), _expressions())
def test_every_metric_exists(title: str, expression: str) -> None:
    """A name that no program has would be an alert that never fires."""
    names = NAME.findall(expression)
    assert names, title
    assert set(names) <= _known()
    assert expression.count("(") == expression.count(")")


def test_a_name_that_does_not_exist_is_noticed() -> None:
    """The check can fail."""
    known = _known()
    assert "blobcache_agent_config_hit_bytes_total" in known
    assert "blobcache_agent_cache_min_free_bytes" in known
    assert "blobcache_operator_reconcile_seconds_bucket" in known
    assert "blobcache_agent_config_hit_bytes" not in known
    assert "blobcache_operator_leader" not in known


def test_alerts_tell_what_to_do() -> None:
    """Each has a name of its own, slack, a severity, and words."""
    rules = _rules()
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
    for rule in rules:
        assert rule["alert"].startswith("Blobcache")
        assert rule["for"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
