"""The heat map as a PNG, by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import os
from typing import Any

import numpy as np

from semq_state.audit import heatmap
from semq_state.audit.heatmap import Panel
from semq_state.audit.report import Diff
from semq_state.errors import UnsupportedOperationError
from semq_state.stores import atomic_write

_WIDTH, _HEAD, _ROW = 11.0, 0.95, 0.085  # inches
_MARK = "#0077b6"


def save_png(report: Diff, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws relative errors, one panel for each kind of state.

    Raises:
        UnsupportedOperationError: matplotlib is not installed, or no tensor has tokens.
        StoreError: the folder or disk refused.
    """
    panels = heatmap.panels_of(report)
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedOperationError(
            "heat map", expected="matplotlib", found="none", do="pip install 'semq-state[plot]', or save HTML"
        )
    image = io.BytesIO()
    _drawn(report, panels, title or "Differences by layer and token").savefig(image, format="png")
    with atomic_write(path) as file:
        file.write(image.getvalue())


def _drawn(report: Diff, panels: list[Panel], title: str) -> Any:
    # pyplot would keep every figure and choose a display; a figure with its own canvas does neither.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    heights = [max(1.1, _ROW * len(panel.layers)) + 0.6 for panel in panels]
    height = sum(heights) + _HEAD + 0.35
    layout = ConstrainedLayoutEngine(rect=(0.005, 0.03, 0.99, 0.96 - 0.62 / height))
    figure = Figure(figsize=(_WIDTH, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    figure.text(0.012, 1 - 0.16 / height, title, size=14, weight="bold", va="top", parse_math=False)
    top = 1 - 0.46 / height
    figure.text(0.012, top, heatmap.heading(report), size=10, color="#444", va="top", parse_math=False)
    low, high = heatmap.scale_of(panel.values["relative"] for panel in panels)
    colours = LinearSegmentedColormap.from_list("differences", heatmap.STOPS)
    norm = LogNorm(low, high)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        _panel(axis, panel, colours, norm)
        _marks(axis, panel, report)
    axes[-1].set_xlabel("token")
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(axes), pad=0.015, aspect=30, extend="both")
    bar.set_label("relative error of the token's vectors")
    figure.text(0.012, 0.012, _caption(panels), size=8, color="#666", parse_math=False)
    return figure


def _panel(axis: Any, panel: Panel, colours: Any, norm: Any) -> None:
    values = panel.values["relative"]
    n_layers, n_columns = values.shape
    pixels = np.asarray(colours(norm(np.where(values > 0, values, 1))))
    for where, colour in (
        (values == 0, heatmap.EQUAL),
        (np.isnan(values), heatmap.ABSENT),
        (np.isinf(values), heatmap.INFINITE),
    ):
        pixels[where] = _rgba(colour)
    extent = (panel.start, panel.start + n_columns * panel.width, n_layers - 0.5, -0.5)
    axis.imshow(pixels, extent=extent, aspect="auto", interpolation="nearest")
    axis.set_xlim(panel.start, panel.stop)
    step = max(1, -(-n_layers // 8))
    rows = range(0, n_layers, step)
    axis.set_yticks(list(rows), [str(panel.layers[row]) for row in rows])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("layer")
    axis.set_title(panel.name, loc="left", size=11, pad=12, weight="bold", parse_math=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _marks(axis: Any, panel: Panel, report: Diff) -> None:
    """The place where tokens part, or else where states do."""
    parted, first = report.tokens.earliest, report.first_token
    at, words = (first, "states part") if parted is None else (parted, "tokens part")
    if at is None or not panel.start <= at < panel.stop:
        return
    axis.axvline(at, color=_MARK, lw=1.2, ls=(0, (4, 2)))
    axis.plot(at, 1.03, "v", color=_MARK, ms=6, transform=axis.get_xaxis_transform(), clip_on=False)
    axis.set_title(f"{words} at token {at}", loc="right", size=9, pad=12, color=_MARK)


def _caption(panels: list[Panel]) -> str:
    width = max(panel.width for panel in panels)
    said = ["grey: equal, bit for bit", "white: not in both"]
    if any(np.isinf(panel.values["relative"]).any() for panel in panels):
        said.append("blue: NaN or infinity")
    if width > 1:
        said.append(f"a column shows the worst of {width} tokens")
    return "; ".join(said)


def _rgba(colour: str) -> tuple[float, ...]:
    return (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)
