# SPDX-License-Identifier: Apache-2.0
"""Rate-distortion plots of a sweep: PNG and SVG, with published curves beside ours.

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell
apart; every codec also has a marker or line style of its own, so that plots can be read
in grey. Published curves are thin, dashed and grey.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semlic_jax.evaluation.published import PublishedCurve
from semlic_jax.evaluation.results import Results
from semlic_jax.evaluation.summary import curve
from semlic_jax.images import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours except yellow, which is too light for lines on white.
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("s", "^", "D", "v", "P", "X")
_OURS = ("#D55E00", "#8C3B00", "#F08A4B", "#B2182B")
_OUR_MARKERS = ("o", "*", "p", "h")
_LINES = ("-", ":", "-.")  # the next one when colours and markers repeat
_PUBLISHED_MARKERS = ("1", "2", "3", "4", "+", "x")
_GREY = "#6B6B6B"

_STYLE: Any = {
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "semlic",  # the same plot is the same file
}
_WIDTH, _HEIGHT, _DPI = 6.4, 4.6, 160


def require_matplotlib() -> None:
    """Refuse where matplotlib is not installed; nothing imports it before it draws.

    Raises:
      ValueError: says how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'semlic_jax[eval]'")


def new_figure(**options: Any) -> Figure:
    """An empty figure; see `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    return Figure(**options)


def _styled() -> Any:
    """A context in which figures have the style of all plots."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def style_of(codec: str, codecs: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and line style of a codec: the same in every plot of a sweep."""
    ours = [name for name in codecs if name.startswith("semlic")]
    if codec in ours:
        style = _nth(ours.index(codec), _OURS, _OUR_MARKERS)
        return {**style, "linewidth": 2.4, "zorder": 4}
    others = [name for name in codecs if name not in ours]
    style = _nth(others.index(codec), _COLOURS, _MARKERS)
    return {**style, "linewidth": 1.5, "zorder": 3}


def _nth(at: int, colours: Sequence[str], markers: Sequence[str]) -> dict[str, str]:
    rounds, place = divmod(at, len(colours))
    return {
        "color": colours[place],
        "marker": markers[place],
        "linestyle": _LINES[rounds % len(_LINES)],
    }


def plot_metric(
    results: Results,
    metric: str,
    published: Sequence[PublishedCurve] = (),
    *,
    title: str = "",
) -> Figure:
    """The curves of every codec under one metric.

    Args:
      results: results of a sweep.
      metric: name of a metric of images or of the set.
      published: curves over the same images.
      title: title of the plot.
    """
    with _styled():
        figure = new_figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, results, metric, published)
        axes.legend(fontsize=9)
        if title:
            axes.set_title(title, loc="left", fontsize=11)
    return figure


def plot_overview(
    results: Results, published: Sequence[PublishedCurve] = (), *, title: str = ""
) -> Figure:
    """Every metric in one figure with one legend."""
    metrics = [m for m in results.metrics if _has_points(results, m)]
    columns = min(3, len(metrics)) or 1
    rows = math.ceil(len(metrics) / columns) or 1
    with _styled():
        size = (4.6 * columns, 3.7 * rows + 0.8)
        figure = new_figure(figsize=size, layout="constrained")
        handles: dict[str, Any] = {}
        for index, metric in enumerate(metrics):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw(axes, results, metric, published)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if handles:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=min(len(handles), 8),
            )
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _has_points(results: Results, metric: str) -> bool:
    return any(curve(results, codec, metric).points for codec in results.codecs)


def _draw(
    axes: Axes, results: Results, metric: str, published: Sequence[PublishedCurve]
) -> None:
    codecs = list(results.codecs)
    facts = results.metrics[metric]
    largest = 0.0
    for codec in codecs:
        points = curve(results, codec, metric).points
        if not points:
            continue
        axes.plot(
            [point.bpp for point in points],
            [point.value for point in points],
            markersize=5.5,
            label=results.codecs[codec].label,
            **style_of(codec, codecs),
        )
        largest = max(largest, points[-1].bpp)
    for index, system in enumerate(published):
        values = system.values.get(metric)
        # Published curves extend to rates far above those of this sweep.
        inside = [i for i, bpp in enumerate(system.bpp) if bpp <= 1.25 * largest]
        if values is None or not inside:
            continue
        axes.plot(
            [system.bpp[i] for i in inside],
            [values[i] for i in inside],
            color=_GREY,
            linestyle="--",
            linewidth=1.0,
            marker=_PUBLISHED_MARKERS[index % len(_PUBLISHED_MARKERS)],
            markersize=7,
            label=f"{system.name} (published)",
            zorder=2,
        )
    better = "higher is better" if facts.higher_is_better else "lower is better"
    axes.set_xlabel("bits per pixel of the whole file")
    axes.set_ylabel(f"{facts.label}\n{better}")
    axes.set_xlim(left=0)


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """Bytes of a figure's file, "png" or "svg"; the same each time."""
    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with _styled():
        figure.savefig(stream, format=kind, dpi=_DPI, metadata=metadata)
    return stream.getvalue()


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`, replacing older ones; return their paths."""
    paths = []
    for kind in ("png", "svg"):
        path = stem.with_name(f"{stem.name}.{kind}")
        write_file(path, figure_bytes(figure, kind), force=True)
        paths.append(path)
    return paths


def write_plots(
    results: Results, out: Path, published: Sequence[PublishedCurve] = ()
) -> list[Path]:
    """Write `rd_<metric>` and `rd_all`, each as PNG and SVG, replacing older ones.

    Args:
      results: results of a sweep.
      out: folder; created if it is missing.
      published: curves over the same images.

    Returns:
      the paths.
    """
    out.mkdir(parents=True, exist_ok=True)
    count = len(results.images)
    title = f"means over {count} image{'s' * (count > 1)}"
    if published:
        title = f"{published[0].image_set.capitalize()}, {title}"
    figures = {"rd_all": plot_overview(results, published, title=title)}
    for metric in results.metrics:
        if _has_points(results, metric):
            figures[f"rd_{metric}"] = plot_metric(
                results, metric, published, title=title
            )
    paths = []
    for name, figure in figures.items():
        paths += write_figure(figure, out / name)
    return paths
