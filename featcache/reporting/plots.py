"""The report's pictures, as SVG or PNG text that a page can hold."""

import base64
import io
import warnings

import numpy as np

from featcache.errors import BadInput, printable, without_middle
from featcache.probes.scores.metrics import gain, metric_kind
from featcache.reporting.configuration import HEAD, describe_head, labels, naming, recipe
from featcache.reporting.table import heading, scored

try:
    import matplotlib
except ImportError:
    raise BadInput("the report needs matplotlib: pip install 'featcache[report]'") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402

COLOURS = {"bce": "#0b6e99", "ce": "#c2571a", "focal": "#4b8f29", "asymmetric": "#8a4fa8"}
MARKERS = "osD^vP*X"
# Of the plot of learning rates.
MOST_LINES = 12
BOX_ARRAYS = ("box_examples", "boxes", "box_classes", "box_difficult")
# Names are of data: a dollar sign begins no formula.
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "featcache",
    "text.parse_math": False,
}  # fmt: skip
# Longer names are drawn without their middle. What tells recipes apart may be anywhere in them.
LONGEST_NAME, LONGEST_RECIPE, BESIDE_MAP = 60, 400, 24


def _drawn(name, most=LONGEST_NAME):
    """A name as it can be drawn: on one line, not too long, and in a legend, which leaves out "_x"."""
    text = without_middle(printable(name), most)
    return f" {text}" if text.startswith("_") else text


def _embed(figure, kind, pad=None):
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        if pad is not None:
            figure.tight_layout(pad=pad)
        figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=110, metadata=metadata)
    plt.close(figure)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def learning_rates(runs, metric):
    """Plot the validation score over the learning rate: a panel per run and type of head, a line per configuration.

    Points are means over seeds, bars reach from the lowest to the highest seed; the dotted line is chance. The
    best MOST_LINES lines are drawn, and the legend says of how many. Probes without a rate and runs that choose
    nothing are left out. Returns a data URL, or None if nothing is left.
    """
    runs = [run for run in runs if run.chosen_on]
    rows = [[r for r in _of(run, metric, run.chosen_on) if r["optimizer.lr"]] for run in runs]
    panels = [(n, head) for n, some in enumerate(rows) for head in dict.fromkeys(r["head.type"] for r in some)]
    if not panels:
        return None
    scale = 100 if metric_kind(metric).unit() else 1
    titles, lines, losses = {}, {}, {}
    for number, head in panels:
        members = [r for r in rows[number] if r["head.type"] == head]
        texts = naming(runs[number], {r["probe"] for r in members})
        heads = {describe_head(r) for r in members}
        # A panel of one head says which in its title.
        titles[number, head] = heads.pop() if len(heads) == 1 else head
        implied = ("name", "lr", "seed", *([] if heads else [HEAD]))
        texts = {name: text for name, text in texts.items() if name not in implied}
        for row in members:
            losses.setdefault(name := recipe(row, texts), row["loss.type"])
            points = lines.setdefault(name, {}).setdefault((number, head), {})
            points.setdefault(float(row["optimizer.lr"]), []).append(scale * row["value"])
    order = sorted(lines, key=lambda name: -_height(lines[name], metric))
    styles = _line_styles(sorted(order[:MOST_LINES]), losses)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), sharey=True, squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            run = runs[panel[0]]
            for name, style in styles.items():
                if panel in lines[name]:
                    _rate_line(axis, lines[name][panel], _drawn(name, LONGEST_RECIPE), style)
            level = run.summary["chance"][run.chosen_on][metric]
            if level is not None:
                axis.axhline(scale * level, color="0.5", linestyle=":")
            axis.set_title(f"{_drawn(run.path.name)}: {titles[panel]}", fontsize=10)
            axis.set_xscale("log")
            rates = sorted({rate for points in lines.values() for rate in points.get(panel, ())})
            axis.set_xticks(rates[:: -(-len(rates) // 5)], [f"{r:.2g}" for r in rates[:: -(-len(rates) // 5)]])
            axis.minorticks_off()
            axis.set_xlabel("learning rate")
        axes[0][0].set_ylabel(f"{runs[0].chosen_on} {heading(metric)}")
        entries = dict(zip(*reversed(_legend(axes[0])), strict=True))
        title = f"the best {len(styles)} of {len(lines)}" if len(styles) < len(lines) else None
        beside = max(map(len, entries)) < 40
        place = (
            {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            if beside
            else {"loc": "upper left", "bbox_to_anchor": (0, 0)}
        )
        figure.legend(entries.values(), entries.keys(), title=title, frameon=False, **place)
        return _embed(figure, "svg")


def _of(run, metric, split):
    """The rows of a run's scores by a metric on a split of which there are values."""
    return [r for r in run.scores if r["metric"] == metric and r["split"] == split and r["value"] is not None]


def _height(panels, metric):
    """The best mean over seeds of a line, the higher the better."""
    return max(gain(metric, np.mean(values)) for points in panels.values() for values in points.values())


def _line_styles(names, losses):
    """Colour and marker of each line: the hue says the loss, where the lines of a loss are few enough for shades."""
    alike = {loss: [name for name in names if losses[name] == loss] for loss in losses.values()}
    few = max(map(len, alike.values())) <= 4
    styles = {}
    for number, name in enumerate(names):
        among = alike[losses[name]]
        colour = np.array(to_rgb(COLOURS.get(losses[name], "0.3") if few else f"C{number}"))
        shade = 0.65 * among.index(name) / max(len(among) - 1, 1) if few else 0
        styles[name] = {"color": colour + (1 - colour) * shade, "marker": MARKERS[among.index(name) % len(MARKERS)]}
    return styles


def _rate_line(axis, points, name, style):
    rates = sorted(points)
    means = np.array([np.mean(points[r]) for r in rates])
    bars = [means - [min(points[r]) for r in rates], [max(points[r]) for r in rates] - means]
    axis.errorbar(rates, means, bars, markersize=4, linewidth=1, label=name, **style)


def _legend(axes):
    handles, labels = [], []
    for axis in axes:
        more = axis.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    return handles, labels


def class_bars(run, probes):
    """Draw the average precision of every class on the judged split, a bar a probe; the dots are the share of positives.

    probes: ids. Classes are in order of the first probe's. Returns a data URL.
    """
    columns = {"probe": str, "split": str, "class": str, "ap": float, "positives": int}
    table = run.table("scores_per_class.csv", **columns)
    rows = [r for r in table if r["split"] == run.judge and r["ap"] is not None]
    values = {(r["probe"], r["class"]): 100 * r["ap"] for r in rows}
    shares = {r["class"]: 100 * r["positives"] / run.summary["rows"][run.judge] for r in rows}
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
        axis.set(xlim=(0, 100), ylim=(-0.6, len(names) - 0.4), xlabel=f"{run.judge} AP, %")
        axis.tick_params(axis="y", length=0)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return _embed(figure, "svg")


def reliability(runs, choose):
    """Draw how often what a probe says with some confidence is so: a panel a run, a line a probe.

    choose: function of a run to probe ids. A dot's area grows with its share of the pairs. Returns a data URL.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(runs), figsize=(3.9 * len(runs), 3.2), sharey=True, squeeze=False)
        for axis, run in zip(axes[0], runs, strict=True):
            columns = {"probe": str, "split": str, "pairs": int, "confidence": float, "outcome": float}
            table = [r for r in run.table("calibration.csv", **columns) if r["split"] == run.judge]
            table = [r for r in table if r["confidence"] is not None and r["outcome"] is not None]
            axis.plot([0, 100], [0, 100], color="0.7", linewidth=1)
            probes = choose(run)
            texts, colours = labels(run, probes), _colours(run, probes)
            for probe in probes:
                bins = [r for r in table if r["probe"] == probe]
                x, y = (np.array([100 * r[k] for r in bins]) for k in ("confidence", "outcome"))
                pairs = np.array([r["pairs"] for r in bins])
                error = scored("ece", run.value(probe, "ece", run.judge)["value"])
                axis.plot(x, y, color=colours[probe], linewidth=1, label=f"{_drawn(texts[probe])}: ECE {error}%")
                sizes = 4 + 60 * np.sqrt(pairs / pairs.sum())
                axis.scatter(x, y, sizes, color=colours[probe], alpha=0.8, linewidth=0)
            axis.set(xlim=(0, 100), ylim=(0, 100), xlabel="mean confidence, %")
            axis.set_title(_drawn(run.path.name), fontsize=10)
            axis.legend(loc="upper left", frameon=False, fontsize=8)
        axes[0][0].set_ylabel(f"{runs[0].judge}: share that is so, %")
        return _embed(figure, "svg")


def _colours(run, probes):
    """The colour of each probe: that of its loss, where they differ in it."""
    losses = [run.value(probe, run.metric, run.judge)["loss.type"] for probe in probes]
    known = len(set(losses)) == len(losses)
    return {
        p: COLOURS.get(loss, f"C{n}") if known else f"C{n}"
        for n, (p, loss) in enumerate(zip(probes, losses, strict=True))
    }


def heatmaps(run, kept):
    """Draw example images with boxes, and beside each the maps of every method and probe that the run has.

    kept: the contents of attribution.npz. Returns a data URL, or None if there are no examples.
    """
    there = {row["probe"] for row in run.scores}
    panels = [
        (dict(zip(("probe", "method", "split", "id", "class", "epg", "share"), p, strict=True)), values)
        for p, values in zip(kept["panels"], kept["maps"], strict=True)
        if p[0] in there
    ]
    if not panels:
        return None
    lines = list(dict.fromkeys((p["id"], p["class"]) for p, _ in panels))
    columns = list(dict.fromkeys((p["method"], p["probe"]) for p, _ in panels))
    texts = labels(run, list(dict.fromkeys(probe for _, probe in columns)))
    ids, size = list(kept["ids"]), kept["maps"].shape[1]
    with plt.rc_context(STYLE | {"font.size": 8}):
        shape = (len(lines), len(columns) + 1)
        figure, axes = plt.subplots(*shape, figsize=(1.75 * shape[1], 1.75 * shape[0]), squeeze=False)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
        for axis, (method, probe) in zip(axes[0][1:], columns, strict=True):
            axis.set_title(f"{method}\n{_drawn(texts[probe])}", fontsize=8)
        axes[0][0].set_title("image, boxes", fontsize=8)
        for line, (image_id, label) in zip(axes, lines, strict=True):
            number = ids.index(image_id)
            boxes = [
                (edges, str(name) == label, difficult)
                for at, edges, name, difficult in zip(*(kept[k] for k in BOX_ARRAYS), strict=True)
                if at == number
            ]
            picture = kept["images"][number] if "images" in kept else np.full((size, size, 3), 230, np.uint8)
            line[0].imshow(picture)
            line[0].set_ylabel(f"{_drawn(image_id, BESIDE_MAP)}\n{_drawn(label, BESIDE_MAP)}", fontsize=8)
            _draw_boxes(line[0], boxes)
            for panel, values in panels:
                if (panel["id"], panel["class"]) == (image_id, label):
                    axis = line[1 + columns.index((panel["method"], panel["probe"]))]
                    _draw_map(axis, picture, values)
                    _draw_boxes(axis, boxes)
                    epg = float(panel["epg"])
                    axis.set_xlabel(
                        "no positive energy" if epg != epg else f"EPG {100 * epg:.0f}%", fontsize=7, labelpad=2
                    )
        return _embed(figure, "png", pad=0.4)


def _draw_map(axis, picture, values):
    grey = picture.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
    positive = np.clip(values, 0, None)
    # The 99.5th percentile, or one bright pixel would leave the rest dark.
    peak = np.quantile(positive, 0.995) or positive.max() or 1
    shown = np.clip(positive / peak, 0, 1)
    axis.imshow(grey, alpha=0.5)
    axis.imshow(shown, cmap="inferno", alpha=0.75, vmin=0, vmax=1)


def _draw_boxes(axis, boxes):
    """Draw boxes [(edges, whether of the explained class, difficult)]."""
    for (x0, y0, x1, y1), explained, difficult in boxes:
        colour, width = ("#9ad900", 1.4) if explained else ("white", 0.6)
        edge = dict(fill=False, edgecolor=colour, linewidth=width, linestyle=":" if difficult else "-")
        axis.add_patch(plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, **edge))
