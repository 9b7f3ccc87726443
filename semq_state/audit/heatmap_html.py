"""The heat map as one HTML file: the numbers as JSON, a canvas, and no resource from anywhere else."""

from __future__ import annotations

import html
import json
import math
import os
from typing import Any

import numpy as np

from semq_state.audit import heatmap
from semq_state.audit.heatmap import Doubles, Panel
from semq_state.audit.heatmap_page import PAGE
from semq_state.audit.report import Diff
from semq_state.stores import atomic_write

_ABSENT, _INFINITE = -1, -2  # JSON has no NaN


def save_html(report: Diff, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Writes a page with a map of each kind of state; pointing at it shows layer, token and numbers.

    Raises:
        UnsupportedOperationError: no tensor has tokens.
        StoreError: the folder or disk refused.
    """
    page = rendered(report, title or "Differences by layer and token")
    with atomic_write(path) as file:
        file.write(page.encode("utf-8"))


def rendered(report: Diff, title: str) -> str:
    """The page."""
    panels = heatmap.panels_of(report)
    data = {
        "heading": heatmap.heading(report),
        "states": {"a": report.a, "b": report.b},
        "first": report.first_token,
        "parted": report.tokens.earliest,
        "metrics": heatmap.METRICS,
        "scales": {name: heatmap.scale_of(panel.values[name] for panel in panels) for name in heatmap.METRICS},
        "stops": heatmap.STOPS,
        "colours": {"equal": heatmap.EQUAL, "absent": heatmap.ABSENT, "infinite": heatmap.INFINITE},
        "panels": [_panel(panel) for panel in panels],
    }
    # Within a script element only these three could end it or begin something else.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, after = PAGE.split("__DATA__")
    return before.replace("__TITLE__", html.escape(title)) + text + after


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "name": panel.name,
        "layers": panel.layers,
        "start": panel.start,
        "stop": panel.stop,
        "width": panel.width,
        "values": {name: [_row(row) for row in values] for name, values in panel.values.items()},
    }


def _row(values: Doubles) -> list[float]:
    return [
        _ABSENT if math.isnan(x) else _INFINITE if math.isinf(x) else float(f"{x:.3g}") for x in np.asarray(values)
    ]
