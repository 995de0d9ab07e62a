"""Draws the panels of cluster/monitoring/dashboard.json from what a Prometheus answers, where no Grafana is at hand.

python tests/tools/dashboard.py http://127.0.0.1:9090 dashboard.png [--minutes 10]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from paths import CLUSTER

BOARD = CLUSTER / "monitoring" / "dashboard.json"
COLUMNS = 3


def panels(row: str | None = None) -> Iterator[dict[str, Any]]:
    """The dashboard's panels with queries; those of one row, where it is named."""
    current = ""
    for panel in json.loads(BOARD.read_text())["panels"]:
        if panel["type"] == "row":
            current = panel["title"]
        elif row in (None, current):
            yield panel


def ask(url: str, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """What Prometheus answers to a query: its series.

    Raises:
        ValueError: the query is none.
    """
    found = httpx.get(f"{url}/api/v1/{path}", params=parameters, timeout=30).json()
    if found["status"] != "success":
        raise ValueError(f"{parameters['query']}: {found['error']}")
    return found["data"]["result"]


def filled(expression: str, interval: str) -> str:
    """A panel's query, with an interval in place of Grafana's variables."""
    return expression.replace("$__rate_interval", interval).replace("$__range", interval)


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    text = target["legendFormat"]
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value)
    return text[-40:]


def draw(url: str, row: str, minutes: float, where: Path, interval: str = "1m") -> None:
    """Writes a picture of a row's panels over the last minutes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, PercentFormatter

    shapes = {  # made anew for each axis, which they keep
        "percentunit": lambda: PercentFormatter(1),
        "bytes": lambda: EngFormatter("B"),
        "s": lambda: EngFormatter("s"),
    }
    found = list(panels(row))
    height = math.ceil(len(found) / COLUMNS)
    figure, axes = pyplot.subplots(height, COLUMNS, figsize=(14, 2.9 * height), squeeze=False)
    now = time.time()
    for axis, panel in zip(axes.flat, found, strict=False):
        bars = panel["type"] == "bargauge"
        for target in panel["targets"]:
            if bars:
                query = filled(target["expr"], f"{int(60 * minutes)}s")
                for series in ask(url, "query", query=query, time=now):
                    axis.barh(legend(target, series["metric"]), float(series["value"][1]))
                continue
            span = {"start": now - 60 * minutes, "end": now, "step": max(1, int(minutes * 60 / 200))}
            for series in ask(url, "query_range", query=filled(target["expr"], interval), **span):
                times, values = zip(*series["values"], strict=True)
                ago = [(at - now) / 60 for at in times]
                axis.plot(ago, [float(v) for v in values], label=legend(target, series["metric"]), lw=1.4)
        if not bars:
            axis.set_xlim(-minutes, 0)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("minutes", fontsize=8, loc="right")
            if shape := shapes.get(panel["fieldConfig"]["defaults"]["unit"]):
                axis.yaxis.set_major_formatter(shape())
        axis.set_title(panel["title"], fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7, frameon=False, loc="best")
        elif not axis.patches:
            axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes, color="gray")
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(where, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prometheus")
    parser.add_argument("picture", type=Path, help="with the row's name before its suffix, one for each row")
    parser.add_argument("--minutes", type=float, default=10)
    told = parser.parse_args()
    rows = [panel["title"] for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] == "row"]
    for row in rows:
        where = told.picture.with_stem(f"{told.picture.stem}-{row.lower()}")
        draw(told.prometheus, row, told.minutes, where)
        print(where)


if __name__ == "__main__":
    main()
