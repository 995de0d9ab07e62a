"""The files of cluster/monitoring are valid for Grafana and Prometheus, and the alerts fire when they should.

What the panels show of a real run is tested in `tests/jobs/submission/test_client.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard import BOARD, panels
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from paths import ROOT

ALERTS = BOARD.parent / "alerts.yaml"
RULES = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}

REJECTED = 'ray_alit_job_rejects_total{dataset="d",reason="not_an_image"}'
CASES = {  # what brings an alert, and what does not, a value a minute; the alert's labels
    "AlitNoImages": (
        ["ray_alit_waiting 7x60"],  # nothing was encoded ever, so there is no series of images
        ["ray_alit_waiting 7x60", "ray_alit_images_total 0+9x60"],
        {},
    ),
    "AlitRejects": (
        ["ray_alit_rejects_total 0+6x60"],
        ["ray_alit_images_total 0+6x60", "ray_alit_rejects_total 0+4x60"],
        {},
    ),
    "AlitQueue": (
        [f'ray_alit_queue_seconds_bucket{{le="{le}"}} 0+{n}x60' for le, n in (("3", 1), ("10", 9), ("+Inf", 9))],
        [f'ray_alit_queue_seconds_bucket{{le="{le}"}} 0+{n}x60' for le, n in (("3", 9), ("10", 9), ("+Inf", 9))],
        {},
    ),
    "AlitLate": (["ray_alit_late_total 0+1x60"], ["ray_alit_late_total 5x60"], {}),
    "AlitJobRejects": (
        [f"{REJECTED} 0+2x60"],
        ['ray_alit_job_images_total{dataset="d"} 0+98x60', f"{REJECTED} 0+2x60"],
        {"dataset": "d"},
    ),
    "AlitModelsWait": (
        [
            f'ray_alit_job_{name}_total{{dataset="d",WorkerId="{worker}"}} {values}'
            for name, worker, values in (
                ("wait_seconds", "new", "0+45x60"),
                ("seconds", "new", "0+60x60"),
                ("wait_seconds", "lost", "5x60"),
                ("seconds", "lost", "50x60"),
            )
        ],
        ['ray_alit_job_wait_seconds_total{dataset="d"} 0+15x60', 'ray_alit_job_seconds_total{dataset="d"} 0+60x60'],
        {"dataset": "d"},
    ),
    "AlitCheckpointOld": (
        ['ray_alit_train_checkpoint_timestamp_seconds{run="r"} -4500x60'],
        ['ray_alit_train_checkpoint_timestamp_seconds{run="r"} 0x60'],
        {"run": "r"},
    ),
    "AlitGpuIdle": (
        ['ray_node_gpus_utilization{instance="one",GpuIndex="0"} 5x60'],
        ['ray_node_gpus_utilization{instance="one",GpuIndex="0"} 80x60'],
        {"instance": "one"},
    ),
}


def test_dashboard_matches_grafanas_model() -> None:
    """Grafana's own model of a dashboard keeps every field of ours; it drops the fields that it does not know."""
    register_default_plugins()
    ours = json.loads(BOARD.read_text())
    assert lost(ours, understood(ours)) == []
    panel = next(panel for panel in ours["panels"] if panel["type"] == "timeseries")
    panel["targets"][0]["exprr"] = panel["options"]["legend"]["placment"] = "x"
    where = f"/panels/{ours['panels'].index(panel)}"
    assert lost(ours, understood(ours)) == [f"{where}/options/legend/placment", f"{where}/targets/0/exprr"]


def understood(board: dict[str, Any]) -> dict[str, Any]:
    return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))


def lost(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """The fields of ours that theirs lack or have otherwise."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [each for name in ours for each in lost(ours[name], theirs.get(name, KeyError), f"{where}/{name}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [each for i, pair in enumerate(zip(ours, theirs, strict=True)) for each in lost(*pair, f"{where}/{i}")]
    return [] if ours == theirs else [where]


def test_panels_have_distinct_ids_and_positions() -> None:
    """No two panels of the dashboard share an id or a position."""
    board = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in board}) == len(board)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board}) == len(board)


def test_metrics_of_code_and_dashboards_agree() -> None:
    """The code exports exactly the metrics that the panels and alerts query."""
    root = ROOT
    code = "".join(path.read_text() for room in ("jobs", "serve") for path in (root / room).rglob("*.py"))
    made = set(re.findall(r'metrics\.\w+\(\s*"(alit_\w+)"', code)) | set(re.findall(r'\("(alit_train_\w+)", "', code))
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    asked += [rule["expr"] for rule in RULES.values()]
    names = {name for text in asked for name in re.findall(r"\bray_(alit_\w+)", text)} - {"alit_job_"}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in names} == made


@pytest.mark.parametrize("alert", RULES)
def test_alerts_fire_on_bad_series_only(alert: str, tmp_path: Path) -> None:
    """Every alert fires on a series that shows its fault and stays silent on a good one."""
    if shutil.which("promtool") is None:
        pytest.skip("needs prometheus")
    bad, good, labels = CASES[alert]
    rule, texts = RULES[alert], {}
    for key, text in rule["annotations"].items():
        for name, value in labels.items():
            text = text.replace("{{ $labels." + name + " }}", value)
        texts[key] = text
    expected = [{"exp_labels": rule["labels"] | labels, "exp_annotations": texts}]

    def case(lines: list[str], alerts: list[Any]) -> dict[str, Any]:
        series = [dict(zip(("series", "values"), line.rsplit(" ", 1), strict=True)) for line in lines]
        told = {"eval_time": "55m", "alertname": alert, "exp_alerts": alerts}
        return {"interval": "1m", "input_series": series, "alert_rule_test": [told]}

    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": [case(bad, expected), case(good, [])]}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
