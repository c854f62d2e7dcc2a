"""The metrics that the handler declares, and the dashboard that draws them."""

import json
import re
from pathlib import Path

import ts
import yaml
from conftest import REPOSITORY

from handler.serve.server import read_properties
from handler.server_metrics import COUNTER, HISTOGRAM, METRICS

DASHBOARD = json.loads((REPOSITORY / "deploy/grafana-dashboard.json").read_text())
SUFFIXES = ("_bucket", "_sum", "_count")


def torchserve_metrics() -> set[str]:
    """What TorchServe's front end counts by itself."""
    spec = yaml.safe_load((Path(ts.__file__).parent / "configs/metrics.yaml").read_text())
    return {metric["name"] for kind in spec["ts_metrics"].values() for metric in kind}


def test_names_follow_the_conventions_of_prometheus():
    for name, (kind, unit, _) in METRICS.items():
        assert re.fullmatch(r"captioner_[a-z_]+", name)
        assert name.endswith("_total") == (kind is COUNTER)
        assert name.endswith("_seconds") == (unit == "seconds")


def test_the_configuration_lets_the_handler_declare_them():
    settings = read_properties(REPOSITORY / "config.properties")
    assert settings["metrics_mode"] == "prometheus"
    assert settings["model_metrics_auto_detect"] == "true"
    assert "metrics_config" not in settings  # a path that depends on where the server is started


def test_the_dashboard_draws_every_metric_and_no_other():
    expressions = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
    drawn = set(re.findall(r"\b((?:captioner|ts)_\w+|Requests\dXX)", " ".join(expressions)))
    names = {
        next((n.removesuffix(s) for s in SUFFIXES if n.removesuffix(s) in METRICS), n)
        for n in drawn
    }
    assert names - torchserve_metrics() == set(METRICS)
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
    for name, (kind, _, labels) in METRICS.items():
        used = {n for n in drawn if n.startswith(name)}
        assert all(n.endswith(SUFFIXES) for n in used) == (kind is HISTOGRAM)
        assert all(f"by ({label})" in " ".join(expressions) for label in labels)


def test_the_dashboards_panels_do_not_overlap():
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
