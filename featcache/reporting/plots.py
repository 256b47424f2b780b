"""The report's plots, as SVG that a page can hold."""

import base64
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.attribution.scores.score import Score
from featcache.errors import BadInput, printable, without_middle
from featcache.probes.losses import LOSSES
from featcache.probes.runs.run import Run
from featcache.probes.scores.metrics import gain, metric_kind
from featcache.probes.scores.metrics.ece import ECE
from featcache.reporting.configuration import HEAD, describe_head, labels, naming, recipe
from featcache.reporting.localisation import Mean
from featcache.reporting.table import heading, scored

try:
    import matplotlib
except ImportError:
    raise BadInput("the report needs matplotlib: pip install 'featcache[report]'") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Of the first losses, in the order of their registry.
COLOURS = dict(zip(LOSSES, ("#0b6e99", "#c2571a", "#4b8f29", "#8a4fa8"), strict=False))
MARKERS = "osD^vP*X"
# More lines over the learning rate than this are not drawn.
MOST_LINES = 12
# A plot of localisation scores has so many rows at most, and so many means at least.
MOST_ROWS, LEAST_MEANS = 40, 9
# Panels side by side, at most.
MOST_BESIDE = 3
# Names come from data, where a dollar sign begins no formula.
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "featcache",
    "text.parse_math": False,
}  # fmt: skip
# Longer names are drawn without their middle. What tells recipes apart may be anywhere in them.
LONGEST_NAME, LONGEST_RECIPE = 60, 400
# Number of a run, and type of head.
PanelKey = tuple[int, str]


@dataclass(frozen=True)
class RateLine:
    """A line over the learning rate: the loss, and in each panel the scores of all seeds by their rate."""

    loss: str
    panels: dict[PanelKey, dict[float, list[float]]]


def _drawn(name: str, most: int = LONGEST_NAME) -> str:
    """Make a name fit to be drawn: on one line, not too long, and not like "_x", which legends leave out."""
    text = without_middle(printable(name), most)
    return f" {text}" if text.startswith("_") else text


def _embed(figure: Figure) -> str:
    """Close a figure and return it as a data URL of an SVG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _panels(count: int, width: float, height: float, name: str) -> tuple[Figure, list[Axes]]:
    """Make a figure of several axes of a size in inches, which share the vertical one; name: of that."""
    rows = -(-count // MOST_BESIDE)
    columns = -(-count // rows)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        sharey=True,
        squeeze=False,
        gridspec_kw={"hspace": 1.4 / height},
    )
    for axis in axes[:, 0]:
        axis.set_ylabel(name)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def learning_rates(runs: Sequence[Run], metric: str) -> str | None:
    """Plot the validation score over the learning rate: a panel per run and type of head, a line per configuration.

    Points are means over seeds, bars reach from the lowest to the highest seed; the dotted line is chance. Only the
    best MOST_LINES lines are drawn, and the legend says how many there are. Probes without a rate and runs that
    choose nothing are left out. Returns a data URL, or None if nothing is left.
    """
    runs = [run for run in runs if run.chosen_on]
    scale = 100 if metric_kind(metric).unit() else 1
    panels, lines = _rate_lines(runs, metric, scale)
    if not panels:
        return None
    order = sorted(lines, key=lambda name: -_height(lines[name].panels, metric))
    styles = _line_styles(sorted(order[:MOST_LINES]), {name: line.loss for name, line in lines.items()})
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(panels), 3.4, 3, f"{runs[0].chosen_on} {heading(metric)}")
        for axis, (panel, title) in zip(axes, panels.items(), strict=True):
            run = runs[panel[0]]
            for name, style in styles.items():
                if panel in lines[name].panels:
                    _rate_line(axis, lines[name].panels[panel], _drawn(name, LONGEST_RECIPE), style)
            level = run.summary["chance"][run.chosen_on][metric]
            if level is not None:
                axis.axhline(scale * level, color="0.5", linestyle=":")
            axis.set_title(f"{_drawn(run.path.name)}: {title}", fontsize=10)
            _rate_axis(axis, sorted({rate for line in lines.values() for rate in line.panels.get(panel, ())}))
        _legend(figure, axes, f"the best {len(styles)} of {len(lines)}" if len(styles) < len(lines) else None)
        return _embed(figure)


def _rate_lines(runs: Sequence[Run], metric: str, scale: float) -> tuple[dict[PanelKey, str], dict[str, RateLine]]:
    """Return the panels, (number of the run, type of head), with their titles, and the lines by their names."""
    panels: dict[PanelKey, str] = {}
    lines: dict[str, RateLine] = {}
    for number, run in enumerate(runs):
        rows = [row for row in _of(run, metric, run.chosen_on) if row["optimizer.lr"]]
        for head in dict.fromkeys(row["head.type"] for row in rows):
            members = [row for row in rows if row["head.type"] == head]
            texts = naming(run, {row["probe"] for row in members})
            heads = {describe_head(row) for row in members}
            # The title of a panel names its head, if it has only one.
            panels[number, head] = heads.pop() if len(heads) == 1 else head
            implied = ("name", "lr", "seed", *([] if heads else [HEAD]))
            texts = {name: text for name, text in texts.items() if name not in implied}
            for row in members:
                line = lines.setdefault(recipe(row, texts), RateLine(row["loss.type"], {}))
                points = line.panels.setdefault((number, head), {})
                points.setdefault(float(row["optimizer.lr"]), []).append(scale * row["value"])
    return panels, lines


def _rate_axis(axis: Axes, rates: Sequence[float]) -> None:
    """Label a logarithmic axis of learning rates at no more than five of them."""
    step = -(-len(rates) // 5)
    axis.set_xscale("log")
    axis.set_xticks(rates[::step], [f"{rate:.2g}" for rate in rates[::step]])
    axis.minorticks_off()
    axis.set_xlabel("learning rate")


def _of(run: Run, metric: str, split: str | None) -> list[Mapping[str, Any]]:
    """The rows of a run's scores by a metric on a split that have a value."""
    return [r for r in run.scores if r["metric"] == metric and r["split"] == split and r["value"] is not None]


def _height(panels: Mapping[PanelKey, Mapping[float, Sequence[float]]], metric: str) -> float:
    """The best mean over seeds of a line, the higher the better."""
    return max(gain(metric, float(np.mean(values))) for points in panels.values() for values in points.values())


def _line_styles(names: Sequence[str], losses: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each line. The hue says the loss, if the lines of each loss are few enough for shades."""
    alike = {loss: [name for name in names if losses[name] == loss] for loss in losses.values()}
    few = max(map(len, alike.values())) <= 4
    styles = {}
    for number, name in enumerate(names):
        among = alike[losses[name]]
        colour = np.array(to_rgb(COLOURS.get(losses[name], "0.3") if few else f"C{number}"))
        shade = 0.65 * among.index(name) / max(len(among) - 1, 1) if few else 0
        styles[name] = {"color": colour + (1 - colour) * shade, "marker": MARKERS[among.index(name) % len(MARKERS)]}
    return styles


def _rate_line(axis: Axes, points: Mapping[float, Sequence[float]], name: str, style: Mapping[str, Any]) -> None:
    """Draw the scores of all seeds {rate: scores} as their means, with bars from the lowest to the highest."""
    rates = sorted(points)
    means = np.array([np.mean(points[r]) for r in rates])
    bars = [means - [min(points[r]) for r in rates], [max(points[r]) for r in rates] - means]
    axis.errorbar(rates, means, bars, markersize=4, linewidth=1, label=name, **style)


def _legend(figure: Figure, axes: Iterable[Axes], title: str | None) -> None:
    """Draw one legend for all axes: beside them, or below if a name is long."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            entries[name] = handle
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 0)}
    if max(map(len, entries)) < 40:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    figure.legend(list(entries.values()), list(entries), title=title, frameon=False, **place)


def localisation_means(run: Run, means: Mapping[tuple[str, str], Mean], score: type[Score]) -> str | None:
    """Plot a localisation score with its interval: a panel for each method, a row for each probe, dotted for a uniform map.

    A mean that rests on less than half of the maps is hollow. Only the first MOST_ROWS probes are drawn. Returns a data URL,
    or None where there are so few means that a table says it all.
    """
    probes = list(dict.fromkeys(probe for probe, _ in means))[:MOST_ROWS]
    methods = list(dict.fromkeys(method for _, method in means))
    if len(means) < LEAST_MEANS:
        return None
    texts = {probe: _drawn(text, LONGEST_NAME) for probe, text in labels(run, probes).items()}
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(methods), 2.6, 0.9 + 0.2 * len(probes), "")
        for axis, method in zip(axes, methods, strict=True):
            for place, probe in enumerate(reversed(probes)):
                if mean := means.get((probe, method)):
                    colour = COLOURS.get(run.row(probe, run.metric, run.scored_on)["loss.type"], "0.3")
                    axis.plot([100 * mean.low, 100 * mean.high], [place] * 2, color=colour, linewidth=1)
                    axis.plot(
                        100 * mean.mean, place, "o", markersize=4, color=colour, mfc="white" if mean.few else colour
                    )
            axis.axvline(100 * float(np.nanmean([m.uniform for m in means.values()])), color="0.5", linestyle=":")
            axis.set(xlim=(0, 100), ylim=(-0.6, len(probes) - 0.4), xlabel=f"{score.heading}, %")
            axis.set_yticks(range(len(probes)), [texts[probe] for probe in reversed(probes)])
            axis.tick_params(axis="y", length=0)
            axis.set_title(_drawn(method), fontsize=9)
        return _embed(figure)


def class_bars(run: Run, probes: Sequence[str]) -> str:
    """Draw the average precision of every class on the role whose scores are reported, a bar for each probe, and its share of positives.

    probes: ids. Classes are in order of the first probe's scores. Returns a data URL.
    """
    kind = metric_kind(run.metric)
    ap, name_of_ap = (kind.class_column, kind.title.removeprefix("m")) if kind.class_column else ("ap", "AP")
    columns = {"probe": str, "split": str, "class": str, ap: float, "positives": int}
    table = run.table("scores_per_class.csv", **columns)
    rows = [r for r in table if r["split"] == run.scored_on and r[ap] is not None]
    values = {(r["probe"], r["class"]): 100 * r[ap] for r in rows}
    shares = {r["class"]: 100 * r["positives"] / run.summary["rows"][run.scored_on] for r in rows}
    if lacking := [(probe, name) for probe in probes for name in shares if (probe, name) not in values]:
        raise run.damaged("scores_per_class.csv", "no {1} of {0}".format(*lacking[0]))
    names = sorted(shares, key=lambda name: values[probes[0], name])
    height, texts, colours = 0.8 / len(probes), labels(run, probes), _colours(run, probes)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 0.6 + len(names) * (0.12 + 0.11 * len(probes))))
        for number, probe in enumerate(probes):
            places = np.arange(len(names)) + 0.4 - height * (number + 0.5)
            bars = [values[probe, name] for name in names]
            axis.barh(places, bars, 0.9 * height, color=colours[probe], label=_drawn(texts[probe]))
        axis.plot(
            [shares[name] for name in names], range(len(names)), "o", color="0.2", markersize=2.5, label="positives"
        )
        axis.set_yticks(range(len(names)), map(_drawn, names))
        axis.set(xlim=(0, 100), ylim=(-0.6, len(names) - 0.4), xlabel=f"{run.scored_on} {name_of_ap}, %")
        axis.tick_params(axis="y", length=0)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return _embed(figure)


def reliability(runs: Sequence[Run], choose: Callable[[Run], Sequence[str]]) -> str:
    """Draw how often probes are right over their confidence: a panel for each run, a line for each probe.

    choose: from a run to the ids of probes. A dot's area grows with its share of the pairs. Returns a data URL.
    """
    with plt.rc_context(STYLE):
        figure, axes = _panels(len(runs), 3.9, 3.2, f"{runs[0].scored_on}: share that is so, %")
        for axis, run in zip(axes, runs, strict=True):
            columns = {"probe": str, "split": str, "pairs": int, "confidence": float, "outcome": float}
            table = [r for r in run.table("calibration.csv", **columns) if r["split"] == run.scored_on]
            table = [r for r in table if r["confidence"] is not None and r["outcome"] is not None]
            axis.plot([0, 100], [0, 100], color="0.7", linewidth=1)
            probes = choose(run)
            texts, colours = labels(run, probes), _colours(run, probes)
            for probe in probes:
                bins = [row for row in table if row["probe"] == probe]
                error = scored(ECE.word(), run.row(probe, ECE.word(), run.scored_on)["value"])
                _reliability_line(axis, bins, f"{_drawn(texts[probe])}: ECE {error}%", colours[probe])
            axis.set(xlim=(0, 100), ylim=(0, 100), xlabel="mean confidence, %")
            axis.set_title(_drawn(run.path.name), fontsize=10)
            axis.legend(loc="upper left", frameon=False, fontsize=8)
        return _embed(figure)


def _reliability_line(axis: Axes, bins: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
    """Draw the bins of calibration.csv of one probe, as dots on a line."""
    x, y = (np.array([100 * row[column] for row in bins]) for column in ("confidence", "outcome"))
    pairs = np.array([row["pairs"] for row in bins])
    axis.plot(x, y, color=colour, linewidth=1, label=name)
    axis.scatter(x, y, 4 + 60 * np.sqrt(pairs / pairs.sum()), color=colour, alpha=0.8, linewidth=0)


def _colours(run: Run, probes: Sequence[str]) -> dict[str, str]:
    """The colour of each probe: that of its loss, if no two probes have the same."""
    losses = [run.row(probe, run.metric, run.scored_on)["loss.type"] for probe in probes]
    different = len(set(losses)) == len(losses)
    numbered = enumerate(zip(probes, losses, strict=True))
    return {probe: COLOURS.get(loss, f"C{n}") if different else f"C{n}" for n, (probe, loss) in numbered}
